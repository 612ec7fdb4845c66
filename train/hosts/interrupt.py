"""SIGTERM and SIGINT: what they end at once, and what they end after the state is saved.

Without `deferred` a first signal ends the run where it stands, as there is nothing to save. Within
it the run goes on to the next `check`, which several hosts pass together. A second signal always
ends the process at once. This module imports nothing heavy: it is there before JAX is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 5.0
"""Seconds after which a process that has nothing to save is ended, also within a compilation."""

TELL_SECONDS = 2.0
"""How long such a process tries to tell other hosts."""


class Interrupted(BaseException):
    """A signal asked the run to end. No `Exception`, so that nothing takes it for a failure."""

    def __init__(self, number: int, synced: bool = False):
        super().__init__(number)
        self.number = signal.Signals(number)
        self.synced = synced
        """Whether all hosts end here, not this one alone."""

    @property
    def code(self) -> int:
        """The exit code: 0 for SIGTERM, which schedulers send; 130 for SIGINT, as in shells."""
        return exit_code(self.number)


def exit_code(number: int) -> int:
    """See `Interrupted.code`."""
    return 0 if number == signal.SIGTERM else 130


class Signals:
    """What arrived, and how it is acted upon."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal, 0 before."""
        self.doing = ""
        """What a signal waits for while it is deferred."""
        self.details: Callable[[], str] = str
        """Says more of it, or nothing."""
        self.told = False
        """Whether the user knows that the process ends."""
        self.remedy = ""
        """How the run is continued, once that is known."""
        self.announce: Callable[[str, int], None] = lambda line, code: None
        """Tells other hosts that this one ends at once, with which line and exit code."""
        self._deferred = 0
        self._sync: Callable[[int], int] = lambda number: number

    def install(self) -> None:
        """Take both signals, for the main thread; what they did before is over."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        # Python calls handlers between two steps of its own. A thread that reads this pipe hears
        # of a signal also while the main thread is in a compilation.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()

    def sync_by(self, sync: Callable[[int], int]) -> None:
        """How hosts make one of the signals that reached them: the largest number."""
        self._sync = sync

    @contextlib.contextmanager
    def deferred(self, doing: str) -> Iterator[None]:
        """Signals wait for `check`, and meanwhile for what is being done."""
        outer, self.doing = self.doing, doing
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
            self.doing = outer

    def check(self) -> None:
        """Where a run can be ended; raises Interrupted if a signal has reached any host."""
        number = self._sync(self.received)
        if number:
            raise Interrupted(number, synced=True)

    def _handle(self, number: int, frame: object) -> None:
        self.received = self.received or number
        # Raised within a step, it could leave locks of Grain and Orbax held (ADR 21).
        if not self._deferred:
            raise Interrupted(number)

    def _watch(self, reading: int) -> None:
        first = 0
        while heard := os.read(reading, 1):
            number = heard[0]
            if number not in SIGNALS:
                continue
            if first:
                self._end(number, 128 + number)
            first = self.received = number
            if self._deferred:
                waits = f"waiting for {self._busy()}, then the run ends; once more ends it at once"
                _tell(number, waits)
            else:
                threading.Thread(target=self._end_if_stuck, args=(number,), daemon=True).start()

    def _end_if_stuck(self, number: int) -> None:
        time.sleep(GRACE_SECONDS)
        if self._deferred:
            return
        if self.told:
            os._exit(exit_code(number))
        self._end(number, exit_code(number))

    def _end(self, number: int, code: int) -> None:
        """End the process here and now, with one line."""
        parts = ["ended at once", self._busy() and f"during {self._busy()}"]
        line = " ".join(filter(None, parts)) + (self.remedy and f"; {self.remedy}")
        _tell(number, line)
        failure = f"{signal.Signals(number).name}: {line}", code
        telling = threading.Thread(target=self.announce, args=failure, daemon=True)
        telling.start()
        telling.join(TELL_SECONDS)
        os._exit(code)

    def _busy(self) -> str:
        """What is being done."""
        details = self.details()
        return f"{self.doing} ({details})" if self.doing and details else self.doing or details


def _tell(number: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{signal.Signals(number).name}: {line}\n".encode())


SIGNALS_OF_RUN = Signals()
"""Signals come to the process; so there is one of these."""


def end_process(code: int, seconds: float = 10.0) -> None:
    """End the process within these seconds, also where a thread of a library hangs."""

    def end() -> None:
        time.sleep(seconds)
        os._exit(code)

    threading.Thread(target=end, daemon=True).start()
