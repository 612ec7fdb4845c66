"""Images and videos that requests bring: as data URLs, as files below the allowed root, or fetched
where the server was told to."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator

from evaluate.serving.errors import ApiError
from evaluate.serving.fetching import NotFetched, fetch
from evaluate.serving.limits import Limits
from paravt_jax.records import VideoRef
from pipelines.arrays import Picture
from pipelines.decode import video_ref
from pipelines.images import decode_image
from pipelines.media import Media, MissingFile

FRAMES = "video/jpeg"
"""Media type of videos that are a list of frames, one JPEG file in base64 after the other."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video as a file."""

    ref: VideoRef
    lasting: bool
    """Whether the file was there before the request, so that its frames are worth keeping."""


class Fetcher:
    """Opens what addresses name, within limits. Used by several threads."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._files = None if limits.media_root is None else Media(str(limits.media_root))

    def image(self, url: str, where: str) -> Picture:
        """The pixels of an image, upright.

        Raises:
          ApiError: it cannot be had; `where` is the field at fault.
        """
        path, content = self._open(url, where)
        with _refused(where):
            return decode_image(path or io.BytesIO(content), "the image")

    @contextlib.contextmanager
    def video(self, url: str, where: str) -> Iterator[Video]:
        """A video as a file, which may be gone afterwards.

        Raises:
          ApiError: it cannot be had.
        """
        path, content = self._open(url, where)
        with contextlib.ExitStack() as stack:
            if not path:
                file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".mp4"))
                file.write(content)
                file.flush()
            with _refused(where):
                ref = video_ref(path or file.name)
            yield Video(ref, lasting=bool(path))

    def frames(self, url: str, where: str) -> list[Picture] | None:
        """The frames of a video that is sent as a list of them; None for any other.

        Raises:
          ApiError: one of them is no image, or they are too many.
        """
        head, comma, listed = url.partition(",")
        if not comma or head.lower() != f"data:{FRAMES};base64":
            return None
        pieces = listed.split(",")
        if len(pieces) > self._limits.frames:
            raise ApiError(
                f"{where}: {len(pieces)} frames are more than {self._limits.frames} (--max-frames)",
                where,
            )
        with _refused(where):
            return [decode_image(io.BytesIO(_decoded(p, where)), "a frame") for p in pieces]

    def _open(self, url: str, where: str) -> tuple[str, bytes]:
        """The path of a file, or else the bytes."""
        scheme = url.partition(":")[0].lower() if ":" in url else "file"
        if scheme == "data":
            return "", _data(url, where)
        if scheme in ("http", "https"):
            return "", self._fetched(url, where)
        if scheme == "file":
            return self._found(url, where), b""
        raise ApiError(f"{where}: give a data: or file: address", where)

    def _found(self, url: str, where: str) -> str:
        if self._files is None:
            raise ApiError(
                f"{where}: this server opens no files; start it with --media-root DIR, or send "
                "the content as a data: address",
                where,
            )
        try:
            return self._files.find(url)
        except (MissingFile, ValueError) as error:
            raise ApiError(f"{where}: no such file below the media root", where) from error

    def _fetched(self, url: str, where: str) -> bytes:
        if not self._limits.fetch:
            raise ApiError(
                f"{where}: this server fetches nothing from http(s) addresses; start it with "
                "--fetch-media, or send the content as a data: address",
                where,
            )
        try:
            return fetch(url, self._limits.body_bytes, self._limits.fetch_hosts)
        except NotFetched as error:
            raise ApiError(f"{where}: {error}", where) from error


@contextlib.contextmanager
def _refused(where: str) -> Iterator[None]:
    """What is wrong with a file, told without the name that it has here."""
    try:
        yield
    except ValueError as error:
        words = " ".join(str(error).split())
        for part in words.split():
            if os.sep in part:
                words = words.replace(part, "the file")
        raise ApiError(f"{where}: cannot be read: {words[:300]}", where) from error


def _data(url: str, where: str) -> bytes:
    head, comma, content = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(f"{where}: a data: address must be data:TYPE;base64,CONTENT", where)
    return _decoded(content, where)


def _decoded(content: str, where: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"{where}: the content is no base64", where) from error
