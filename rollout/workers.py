"""Host threads that work while the device decodes, with time limits and no work done twice.

Time never changes a result, but for one case: a job that runs longer than its timeout.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Hashable
from types import TracebackType
from typing import Any


class Job:
    """Work that was given to the workers. Several may wait for one job."""

    def __init__(
        self, work: Callable[[], Any], timeout: float, replace_thread: Callable[[], None]
    ) -> None:
        """`replace_thread` is called once, when a thread is given up as hanging in this job."""
        self._work, self._timeout, self._replace_thread = work, timeout, replace_thread
        self._lock = threading.Lock()
        self._began, self._done = threading.Event(), threading.Event()
        self._start = 0.0
        self._abandoned = False
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> bool:
        """Do the work on this thread; False if this thread has been replaced meanwhile."""
        self._start = time.monotonic()
        self._began.set()
        value, error = None, None
        try:
            value = self._work()
        except Exception as raised:
            error = raised
        with self._lock:
            if self._abandoned:
                return False
            self._value, self._error = value, error
            self._done.set()
        return True

    def result(self) -> Any:
        """Wait for the result; time spent in the queue does not count.

        Raises:
            TimeoutError: the work took longer than its timeout.
            Exception: whatever the work raised.
        """
        self._began.wait()
        left = self._start + self._timeout - time.monotonic()
        if not self._done.wait(max(left, 0.0)):
            self._abandon()
        if not self._done.is_set():
            raise TimeoutError(f"took longer than {self._timeout:g} seconds")
        if self._error is not None:
            raise self._error
        return self._value

    def _abandon(self) -> None:
        with self._lock:
            if self._abandoned or self._done.is_set():
                return
            self._abandoned = True
        # A thread cannot be ended from outside: another one takes its place.
        self._replace_thread()


class Workers:
    """A fixed number of working threads, first come, first served.

    Equal keys are one job: whoever asks later, also after it is done, gets the same result.
    Whoever submits must wait for the results in the order of submission: then a hanging job is
    noticed before the jobs that queue behind it are waited for.
    """

    def __init__(self, threads: int) -> None:
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: dict[Hashable, Job] = {}
        self._threads = threads
        self.submitted = 0
        """How often work was submitted, answered by an earlier job or not."""
        for _ in range(threads):
            self._start_thread()

    @property
    def jobs(self) -> int:
        """Different jobs so far."""
        return len(self._jobs)

    def submit(self, key: Hashable, work: Callable[[], Any], timeout: float) -> Job:
        """Have `work` done, unless a job of this key is there; `timeout` seconds are allowed."""
        self.submitted += 1
        if key not in self._jobs:
            self._jobs[key] = job = Job(work, timeout, self._start_thread)
            self._queue.put(job)
        return self._jobs[key]

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the threads go; what still waits in the queue is not begun."""
        while not self._queue.empty():
            self._queue.get()
        for _ in range(self._threads):
            self._queue.put(None)

    def _start_thread(self) -> None:
        # Threads that hang must not keep the program from ending.
        threading.Thread(target=self._work, daemon=True, name="tool").start()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None and job.run():
            pass
