"""A time limit for reading a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from paravt_jax.deadlines import OutOfTime, within_seconds
from pipelines.container import UnreadableVideo

DECODE_SECONDS = 300.0
"""Enough for 64 frames of hours in 4K from a slow disk."""

T = TypeVar("T")


class ReadTimeout:
    """Waits for files to be read, so many seconds for each request; a file that takes longer is not
    tried again."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._given_up: set[str] = set()

    def __call__(self, path: str, work: Callable[[], T]) -> T:
        """What `work`, which reads the file, returns.

        Raises:
            UnreadableVideo: it takes longer, or once did.
            Exception: whatever the work raises.
        """
        try:
            if path not in self._given_up:
                return within_seconds(work, self._seconds)
        except OutOfTime:
            self._given_up.add(path)
        raise UnreadableVideo(
            f"video {path}: decoding takes longer than data.decode_seconds={self._seconds:g}; "
            "re-encode the file with a key frame every few seconds, or raise the limit"
        )
