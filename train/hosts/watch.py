"""Hosts that watch one another: what ends one ends all, with one line that names it.

JAX alone lets the others wait in a collective operation until its heartbeat is missed, and then
ends them with a stack trace. Hosts meet in its key-value store, which lives in the process of
host 0. This module imports nothing heavy: it is there before JAX is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from paravt_jax.failures import complain
from train.hosts.interrupt import end_process

FAILED, ALIVE, END = "paravt/failed", "paravt/alive/", "paravt/end"
GONE = "gone"
"""In place of the beat of a host that has left."""
BEAT_SECONDS = 1.0
SILENT_SECONDS = 80.0
"""Without a sign of life for so long, a host is dead. JAX would end all after 100 seconds."""
CAUSE_SECONDS = 6.0
"""How long a host whose collective operation failed waits to hear why."""
LINGER_SECONDS = 3.0
"""How long host 0, with whom the store ends, waits for the others to end before it."""


class HostLost(ValueError):
    """Another host is dead."""


class Watch:
    """One host among several; without `begin` everything here does nothing."""

    def __init__(self) -> None:
        self.number, self.count = 0, 1
        self._joining = False
        """Whether JAX may still wait for hosts, which nothing but the end of the process stops."""
        self._client: Any = None
        self._first = threading.Lock()
        """Held by the thread that tells why this process ends; it is never given back."""
        self._heard: dict[int, tuple[str, float]] = {}
        self._ended = False
        self._thread: threading.Thread | None = None

    def join(self, number: int, count: int) -> None:
        """The hosts are about to join."""
        self.number, self.count, self._joining = number, count, True
        # Without host 0 JAX aborts the process from a thread of its own, after a stack trace.
        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._last_words)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._aborted)

    def begin(self) -> None:
        """The hosts have joined: watch them from now on."""
        from jax._src import distributed

        self._joining = False
        self._client = distributed.global_state.client
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def report(
        self, error: Exception, code: int, remedies: Sequence[str] = (), way_on: str = ""
    ) -> None:
        """Tell of a failure here and on the other hosts, which it ends with this exit code; does
        not return where another host told before. For the rest see `complain`."""
        error = self._cause(error)
        self.claim()
        self._announce(complain(error, self._prefix(error), remedies, way_on), code)

    def _prefix(self, error: BaseException) -> str:
        """How a line about a failure begins."""
        host = getattr(error, "host", self.number)
        alone = self._client is None or isinstance(error, HostLost)
        return "error" if alone else f"error on host {host}"

    def _cause(self, error: Exception) -> Exception:
        """The error, or what it follows from: a host that is gone breaks operations of all."""
        # A status of XLA's; the kind of exception differs.
        status = re.match(r"([A-Z_]+): ", str(error))
        if not self._client or status is None or status[1] == "RESOURCE_EXHAUSTED":
            return error
        try:
            before = self._beats()
            time.sleep(CAUSE_SECONDS)
            after = self._beats()
        except Exception:
            return self._lost([0])
        others = set(range(self.count)) - {self.number}
        still = sorted(n for n in others if before.get(n) == after.get(n) != GONE)
        return self._lost(still, CAUSE_SECONDS) if still else error

    def claim(self) -> None:
        """Be the one that tells why this process ends; does not return if another thread is.
        A process alone has no other, and may fail more than once (`main` in a notebook)."""
        watched = self._joining or self._thread is not None
        if watched and not self._first.acquire(blocking=False):
            time.sleep(2 * LINGER_SECONDS)

    def announce(self, line: str, code: int) -> None:
        """End the other hosts with this exit code, and a line that says where it was first."""
        if self._client:
            self._announce(f"{line} (host {self.number})", code)

    def _announce(self, line: str, code: int) -> None:
        with contextlib.suppress(Exception):  # another was first, or nobody is left to hear
            self._client.key_value_set(FAILED, json.dumps([line, code]))

    def lost(self, host: int) -> None:
        """The connection with a host has ended: it has left, it tells why in a moment, or it is
        dead."""
        time.sleep(LINGER_SECONDS)
        with contextlib.suppress(Exception):  # the store is gone as well
            if self._beats().get(host) == GONE:
                return
        if not self._ended:
            line = f"error: {self._lost([host])}"
            self._announce(line, 1)
            self._end(line, 1)

    def finish(self) -> None:
        """Wait until the other hosts have come to their end as well, and watch no longer."""
        if self._client and self._thread:
            with contextlib.suppress(Exception):
                self._client.wait_at_barrier(END, 24 * 3600 * 1000)
            self._stop()

    def _stop(self) -> None:
        """A thread within JAX's store while Python ends would abort the process."""
        if self._thread:
            with contextlib.suppress(Exception):
                self._say(GONE)
            self._ended = True
            self._thread.join()
            self._thread = None

    def leave(self, code: int) -> None:
        """End a process that has not finished, without JAX's shutdown, which waits for all."""
        if self._thread or self._joining:
            self._exit(code)

    def _watch(self) -> None:
        beats = 0
        while not self._ended:
            try:
                failure = self._client.blocking_key_value_get(FAILED, int(1000 * BEAT_SECONDS))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error) and not self._ended:
                    self._end(f"error: {self._lost([0])}", 1)
                with contextlib.suppress(Exception):
                    beats += 1
                    self._beat(beats)
            else:
                return self._end(*json.loads(failure))

    def _beat(self, beats: int) -> None:
        if self._ended:
            return
        self._say(str(beats))
        if self.number:
            return
        now = time.monotonic()
        for number, beat in self._beats().items():
            if self._heard.get(number, ("", 0.0))[0] != beat:
                self._heard[number] = beat, now
        silent = [n for n, (beat, at) in self._heard.items() if _is_silent(beat, now - at)]
        if silent:
            line = f"error: {self._lost(silent, SILENT_SECONDS)}"
            self._announce(line, 1)
            self._end(line, 1)

    def _lost(self, hosts: list[int], seconds: float = 0.0) -> Exception:
        names = ", ".join(map(str, hosts))
        since = f" (no sign of life for {seconds:g} s)" if seconds else ""
        return HostLost(
            f"host {names} is gone{since}: see what it printed last, and start all hosts again "
            "with the same --workdir; the run goes on from its last checkpoint"
        )

    def _end(self, line: str, code: int) -> None:
        if self._first.acquire(blocking=False):
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode())
            self._exit(code)

    def _last_words(self, number: int) -> None:
        if self._first.acquire(blocking=False):
            why = "others did not join" if self._joining else self._lost([0])
            line = f"error on host {self.number}: JAX ended it (see above), for {why}"
            os.write(2, f"{line}\n".encode())
        else:
            time.sleep(1.0)  # another thread is about to say why
        os._exit(1)

    def _exit(self, code: int) -> NoReturn:
        end_process(code)  # where the store does not answer
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with contextlib.suppress(Exception):
            self._linger()
        os._exit(code)

    def _linger(self) -> None:
        """Host 0 goes last, for JAX aborts the others where they notice that it is gone."""
        end = time.monotonic() + LINGER_SECONDS
        if self._client:
            self._say(GONE)
        while self.number == 0 and time.monotonic() < end:
            time.sleep(0.2)
            if self._client and all(self._beats().get(n) == GONE for n in range(self.count)):
                return

    def _say(self, beat: str) -> None:
        self._ended = beat == GONE
        self._client.key_value_set(f"{ALIVE}{self.number}", beat, allow_overwrite=True)

    def _beats(self) -> dict[int, str]:
        entries = self._client.key_value_dir_get(ALIVE)
        return {int(name.rpartition("/")[2]): beat for name, beat in entries}


def _is_silent(beat: str, seconds: float) -> bool:
    return beat != GONE and seconds > SILENT_SECONDS


WATCH = Watch()
"""A process is one host; so there is one of these."""
