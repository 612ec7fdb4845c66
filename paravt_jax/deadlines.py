"""A time limit for work that may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


class OutOfTime(TimeoutError):
    """Work took longer than it may."""


def within_seconds(work: Callable[[], T], seconds: float | int) -> T:
    """What `work` returns.

    Neither a thread nor a call of the operating system that hangs can be ended from outside: the
    work has a thread of its own, which is left behind when its time is over.

    Raises:
        OutOfTime: it takes longer.
        Exception: whatever the work raises.
    """
    done: Future[T] = Future()
    end = time.monotonic() + seconds
    # A daemon, so that it does not keep the program from ending either.
    threading.Thread(target=_fulfil, args=(work, done), daemon=True).start()
    wait([done], min(seconds, threading.TIMEOUT_MAX))
    # Also what came late while this thread had to wait for its turn was late.
    if done.done() and time.monotonic() <= end:
        return done.result()
    raise OutOfTime(f"took longer than {seconds:g} seconds")


def _fulfil(work: Callable[[], T], done: Future[T]) -> None:
    try:
        done.set_result(work())
    except BaseException as error:
        done.set_exception(error)
