"""Rows of a stream that several hosts make: each row is made by one and told to the others."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


@runtime_checkable
class RowShare(Protocol):
    """Which host makes which row of a stream, and how the others get it."""

    here: str
    """Put after the reason why a row cannot be read: which host says so."""
    hosts: int

    def begin(self, per_step: int) -> Callable[[int], bool]:
        """A stream begins, of so many rows a step, and an earlier one is over; which of its rows
        are this host's. What is returned can be sent to worker processes."""
        ...

    def tell(self, index: int, made: Future[Any]) -> None:
        """What came of a row of this host."""
        ...

    def expect(self, index: int) -> Future[Any]:
        """What comes of a row of another host."""
        ...

    def used(self, seconds: float) -> None:
        """A row of this host is taken from the stream; it took so long to make."""
        ...


class OneHost:
    """`RowShare` where there are no others."""

    here, hosts = "", 1

    def begin(self, per_step: int) -> Callable[[int], bool]:
        """All rows are made here."""
        return _every

    def tell(self, index: int, made: Future[Any]) -> None:
        """There is nobody to tell."""

    def expect(self, index: int) -> Future[Any]:
        """No row is made elsewhere."""
        raise AssertionError(index)

    def used(self, seconds: float) -> None:
        """Nobody counts."""


def _every(index: int) -> bool:
    return True


ONE_HOST = OneHost()


class Made(NamedTuple):
    """A row of the stream, and what came of it where it was made."""

    index: int
    row: Any
    outcome: Any = None
    """An Exception of making it included; None where another host makes it."""
    seconds: float = 0.0


class Taken(NamedTuple):
    """A row, and what was made of it."""

    row: Any
    outcome: Any


@dataclasses.dataclass(frozen=True)
class OwnRows(Generic[T]):
    """Makes this host's rows, by `make(index, row)`, which never gives None."""

    make: Callable[[int, T], Any]
    owns: Callable[[int], bool]

    def __call__(self, index: int, row: T) -> Made:
        if not self.owns(index):
            return Made(index, row)
        began = time.perf_counter()
        try:
            outcome = self.make(index, row)
        except Exception as error:  # of which other hosts hear before it is raised here
            outcome = error
        return Made(index, row, outcome, time.perf_counter() - began)


@dataclasses.dataclass(frozen=True)
class Coming:
    """A row, and what comes of it."""

    made: Made
    outcome: Future[Any]
    share: RowShare

    def taken(self) -> Taken:
        """Once it is known.

        Raises:
            Exception: that of the host that made it.
        """
        outcome = self.outcome.result()
        if self.made.outcome is not None:
            self.share.used(self.made.seconds)
        return Taken(self.made.row, outcome)


def shared(share: RowShare, made: Made) -> Coming:
    """Tell what came of a row, or expect to be told; does not wait."""
    if made.outcome is None:
        return Coming(made, share.expect(made.index), share)
    done: Future[Any] = Future()
    if isinstance(made.outcome, Exception):
        done.set_exception(made.outcome)
    else:
        done.set_result(made.outcome)
    share.tell(made.index, done)
    return Coming(made, done, share)
