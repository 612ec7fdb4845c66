"""Host threads that work while the device decodes, with time limits and no work done twice.

Time never changes a result, but for one case: a job that runs longer than its timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from paravt_jax.deadlines import within_seconds

Job = Future
"""Work that was given to the workers. Several may wait for its `result`."""


class Workers:
    """A fixed number of working threads, first come, first served.

    Equal keys are one job: whoever asks later, also after it is done, gets the same result.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads)
        self._jobs: dict[Hashable, Job] = {}
        self.submitted = 0
        """How often work was submitted, answered by an earlier job or not."""

    @property
    def jobs(self) -> int:
        """Different jobs so far."""
        return len(self._jobs)

    def submit(self, key: Hashable, work: Callable[[], Any], timeout: float) -> Job:
        """Have `work` done, unless a job of this key is there. Its `result` raises a TimeoutError
        after `timeout` seconds; time spent in the queue does not count."""
        self.submitted += 1
        if key not in self._jobs:
            # A job that hangs gives its place free when its time is over.
            self._jobs[key] = self._pool.submit(within_seconds, work, timeout)
        return self._jobs[key]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the threads go; what still waits in the queue is not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
