"""A time limit for reading a file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from pipelines.container import UnreadableVideo

DECODE_SECONDS = 300.0
"""Enough for 64 frames of hours in 4K from a slow disk."""

T = TypeVar("T")


class ReadTimeout:
    """Waits for files to be read, so many seconds for each request; a file that takes longer is not
    tried again.

    Neither a thread nor a call of the operating system that hangs can be ended from outside: each
    request has a thread of its own, which is left behind when its time is over.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._given_up: set[str] = set()

    def __call__(self, path: str, work: Callable[[], T]) -> T:
        """What `work`, which reads the file, returns.

        Raises:
            UnreadableVideo: it takes longer, or once did.
            Exception: whatever the work raises.
        """
        if path not in self._given_up:
            done: Future[T] = Future()
            end = time.monotonic() + self._seconds
            threading.Thread(target=_work, args=(work, done), daemon=True).start()
            wait([done], min(self._seconds, threading.TIMEOUT_MAX))
            # Also what came late while this thread had to wait for its turn was late.
            if done.done() and time.monotonic() <= end:
                return done.result()
            self._given_up.add(path)
        raise UnreadableVideo(
            f"video {path}: decoding takes longer than data.decode_seconds={self._seconds:g}; "
            "re-encode the file with a key frame every few seconds, or raise the limit"
        )


def _work(work: Callable[[], T], done: Future[T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
