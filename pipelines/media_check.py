"""Decodes a few frames of the files of a data set, before a run is paid for."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from paravt_jax.records import Conversation, ImageRef, Row, VideoRef
from pipelines.images import read_image
from pipelines.video import VideoReader

MediaFile = VideoRef | ImageRef

FRAMES = 4
"""Frames of a video that are decoded: an overview of the fewest that recipes show."""
MOST_FILES = 512
SECONDS = 60.0
"""When to stop, on a machine that is slow or with files that are large."""
TOLD = 10
"""Faults that are shown."""


@dataclasses.dataclass(frozen=True)
class MediaCheck:
    """How decoding some of the files of a data set went."""

    files: int
    """Distinct files that the rows show."""
    tried: int
    faults: dict[str, str]
    """Why a file cannot be decoded, by its path."""

    def report(self) -> list[str]:
        """Lines for people."""
        chosen = "" if self.tried == self.files else ", drawn at random"
        first = f"decoded frames of {self.tried} of {self.files} files{chosen}: "
        reasons = [f"  {reason}" for reason in list(self.faults.values())[:TOLD]]
        more = [f"  and {len(self.faults) - TOLD} more"] if len(self.faults) > TOLD else []
        return [first + f"{len(self.faults)} of them cannot be decoded", *reasons, *more]

    def shows(self, row: Row | Conversation) -> bool:
        """Whether none of the files of a row has turned out to be unreadable."""
        return not any(file.path in self.faults for file in shown_files(row))

    def check(self, setting: str, limit: float) -> None:
        """Refuse a data set of which a run would leave out too much.

        Raises:
            ValueError: the share of files that cannot be decoded is above `limit`, the value of
                `setting`.
        """
        if len(self.faults) > limit * self.tried:
            raise ValueError(
                f"{len(self.faults)} of the {self.tried} files that were tried cannot be decoded, "
                f"more than {setting}={limit:g} allows; mend or remove them, or raise it. The "
                f"first one: {next(iter(self.faults.values()))}"
            )


def shown_files(row: Row | Conversation) -> list[MediaFile]:
    """The videos and images of a row."""
    if isinstance(row, Row):
        return list(row.videos)
    parts = (part for message in row.messages for part in message.content)
    return [part for part in parts if not isinstance(part, str)]


def check_media(
    rows: Iterable[Row | Conversation],
    reader: VideoReader,
    most: int = MOST_FILES,
    seconds: float = SECONDS,
) -> MediaCheck:
    """Decode an overview of each video and each image that the rows show, in a drawn order, until
    `most` of them are done or the time is over."""
    distinct = {file.path: file for row in rows for file in shown_files(row)}
    files = sorted(distinct.values(), key=lambda file: file.path)
    random.Random(0).shuffle(files)
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(max(4, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(lambda file: _try(file, reader, end), files[:most]))
    done = {f.path: r for f, r in zip(files, reasons, strict=False) if r is not None}
    return MediaCheck(
        len(files), len(done), {path: reason for path, reason in done.items() if reason}
    )


def _try(file: MediaFile, reader: VideoReader, end: float) -> str | None:
    """Why a file cannot be decoded; empty if it can be, None if there was no time to try."""
    if time.monotonic() > end:
        return None
    try:
        if isinstance(file, VideoRef):
            reader.overview(file, FRAMES)
        else:
            read_image(file)
    except ValueError as error:
        return str(error)
    return ""
