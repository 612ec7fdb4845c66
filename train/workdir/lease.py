"""One run at a time in a workdir of a bucket, where no kernel holds locks.

An object says who writes there and is renewed every few seconds. No clocks are compared: who finds
one watches whether it is still renewed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid

from paravt_jax.remote import storage_errors, store_of

NAME = ".lease"
SECONDS = "PARAVT_LEASE_SECONDS"
"""Environment variable: how long an abandoned lease is watched before it is taken over."""
BEATS = 4
"""Renewals within that time."""


class Lease:
    """The right to write below a URL, held by this process until it is released or dies."""

    def __init__(self, url: str):
        """Take it, or wait until it is clear that nobody has it.

        Raises:
          ValueError: another run has it.
        """
        self._url, self._object, self._token = url, f"{url}/{NAME}", uuid.uuid4().hex
        self._seconds = float(os.environ.get(SECONDS, 40))
        self._beat, self.lost, self._end = 0, False, threading.Event()
        with storage_errors(url):
            self._wait_for_others()
            self._renew()
        threading.Thread(target=self._keep, daemon=True).start()

    def _wait_for_others(self) -> None:
        """Return when nobody has renewed a lease for its time."""
        first = lease = self._read()
        end = time.monotonic() + self._seconds
        while lease and time.monotonic() < end:
            if lease != first:
                raise ValueError(
                    f"--workdir {self._url} is in use by {lease['holder']}: wait until that run "
                    "ends, stop it, or choose another --workdir"
                )
            time.sleep(self._seconds / BEATS / 2)
            lease = self._read()

    def _read(self) -> dict[str, str]:
        store = store_of(self._url)
        store.invalidate_cache()
        try:
            return json.loads(store.cat_file(self._object))
        except FileNotFoundError:
            return {}

    def _renew(self) -> None:
        self._beat += 1
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        record = {"holder": holder, "token": self._token, "beat": self._beat}
        store_of(self._url).pipe_file(self._object, json.dumps(record).encode())

    def _keep(self) -> None:
        """Renew it, unless another run has it by now: of two that took it at once, the later."""
        while not self.lost and not self._end.wait(self._seconds / BEATS):
            with contextlib.suppress(Exception):  # a store that does not answer may do so later
                self.lost = self._read().get("token") != self._token
                if not self.lost and not self._end.is_set():
                    self._renew()

    def release(self) -> None:
        """Let others write there at once."""
        self._end.set()
        with contextlib.suppress(Exception):  # it runs out by itself
            if self._read().get("token") == self._token:
                store_of(self._url).rm_file(self._object)
