"""Media files that a data set names, found below one folder and probed once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from paravt_jax.records import ImageRef, VideoRef
from paravt_jax.remote import absolute, is_file, is_remote
from pipelines.decode import video_ref
from pipelines.faults import MISSING

T = TypeVar("T")

OUTSIDE = "(outside)"
"""Bucket of paths that lead out of the root."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Distinct files of one bucket, which is the first component of a path below the root."""

    files: int = 0
    missing: int = 0
    """Not there, or not below the root."""
    unreadable: int = 0
    """There, but no video."""

    def __add__(self, other: Bucket) -> Bucket:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Bucket(*map(sum, pairs))


class MissingFile(ValueError):
    """A file is not there, or not below the root."""

    kind = MISSING


class Media:
    """Finds files below a root, and reads the length of each video once.

    Data sets write paths relative to a root that everybody mounts elsewhere (ParaVT-Parquet's
    `longvt_source/...`, `museg/...`, `selfqa/...`), as `file://` URIs or absolute. All of them
    must lead to a file below the root, symbolic links resolved: a data set from elsewhere does
    not choose which other files of this machine are opened.

    Args:
        root: the folder.
        trusted: the user wrote the data set and keeps it in the root. It may then name files
            absolutely, and what is linked directly below the root counts as lying there: a path
            may lead through this link, and must stay below what it points to.
    """

    def __init__(self, root: str, trusted: bool = False):
        self.root, self._trusted = os.path.realpath(root), trusted
        self._videos: dict[str, VideoRef | ValueError] = {}
        self._images: dict[str, ImageRef | ValueError] = {}

    def find(self, written: str) -> str:
        """Absolute path of an existing file.

        Raises:
            MissingFile: there is no such file, or it lies outside of the root.
        """
        plain, full = _plain(written), self._named(written)
        path = os.path.realpath(full)
        if not (_below(self.root, path) or (self._trusted and self._is_own(plain, full, path))):
            raise MissingFile(
                f"{written}: leads out of {self.root}; set the video root to the folder that "
                "holds the files themselves (links are followed)"
            )
        if not os.path.isfile(path):
            raise MissingFile(f"{written}: no such file below {self.root}")
        return path

    def _named(self, written: str) -> str:
        """The path itself, links left as they are."""
        return os.path.normpath(os.path.join(self.root, _plain(written)))

    def _is_own(self, plain: str, full: str, path: str) -> bool:
        """Whether the user pointed to a file outside of the root: absolutely, or by a link."""
        if os.path.isabs(plain):
            return True
        first = os.path.relpath(full, self.root).partition(os.sep)[0]
        link = os.path.join(self.root, first)
        return first != os.pardir and os.path.islink(link) and _below(os.path.realpath(link), path)

    def video(self, written: str) -> VideoRef:
        """The video at a path.

        Raises:
            ValueError: it cannot be found or read.
        """
        return _remembered(self._videos, written, self._open_video)

    def image(self, written: str) -> ImageRef:
        """The image at a path.

        Raises:
            ValueError: it cannot be found.
        """
        return _remembered(self._images, written, lambda path: ImageRef(self.find(path)))

    def probe(self, written: Iterable[str]) -> None:
        """Read the lengths of many videos side by side: opening a file is mostly waiting."""
        new = [path for path in dict.fromkeys(written) if path not in self._videos]
        with ThreadPoolExecutor(max(4, os.cpu_count() or 1)) as pool:
            results = pool.map(lambda path: _attempt(self._open_video, path), new)
            self._videos.update(zip(new, results, strict=True))

    @property
    def buckets(self) -> dict[str, Bucket]:
        """What was looked for so far, by bucket."""
        buckets: dict[str, Bucket] = {}
        for written, value in (self._videos | self._images).items():
            missing = isinstance(value, MissingFile)
            unreadable = isinstance(value, ValueError) and not missing
            name = self._bucket(written)
            buckets[name] = buckets.get(name, Bucket()) + Bucket(1, missing, unreadable)
        return dict(sorted(buckets.items()))

    def _open_video(self, written: str) -> VideoRef:
        return video_ref(self.find(written))

    def _bucket(self, written: str) -> str:
        path = self._named(written)
        if not _below(self.root, path):
            return OUTSIDE
        first, _, rest = os.path.relpath(path, self.root).partition(os.sep)
        return first if rest else "."


class RemoteMedia(Media):
    """Files below a URL. There are no links; a path is relative to it, or a URL below it."""

    def __init__(self, root: str):
        super().__init__(root)
        self.root = absolute(root)

    def find(self, written: str) -> str:
        """See `Media`: the URL of a file that is there.

        Raises:
            MissingFile: there is none, or it lies outside of the root.
            OSError: the store does not answer.
        """
        url = self._named(written)
        if not url.startswith(f"{self.root}/"):
            raise MissingFile(f"{written}: leads out of {self.root}; set the video root")
        if not is_file(url):
            raise MissingFile(f"{written}: no such file below {self.root}")
        return url

    def _named(self, written: str) -> str:
        plain = _plain(written)
        outside = plain.startswith("/") or is_remote(plain)
        return absolute(plain if outside else f"{self.root}/{plain}")

    def _bucket(self, written: str) -> str:
        url = self._named(written)
        if not url.startswith(f"{self.root}/"):
            return OUTSIDE
        first, _, rest = url.removeprefix(f"{self.root}/").partition("/")
        return first if rest else "."


def _below(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _plain(written: str) -> str:
    """The path without its scheme. Some tools put one before paths that have one already."""
    while written.startswith("file://"):
        written = written.removeprefix("file://")
    return written


def _remembered(results: dict[str, T | ValueError], written: str, make: Callable[[str], T]) -> T:
    """What `make` gives for a path, made once; a failure is raised each time."""
    if written not in results:
        results[written] = _attempt(make, written)
    value = results[written]
    if isinstance(value, ValueError):
        raise value
    return value


def _attempt(make: Callable[[str], T], written: str) -> T | ValueError:
    try:
        return make(written)
    except ValueError as error:
        return error
