"""Host threads that work while the device decodes, with time limits and no work done twice.

Time never changes a result, but for one case: a job that runs longer than its timeout.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from paravt_jax.deadlines import within_seconds

Job = Future
"""Work that was given to the workers. Several may wait for its `result`."""
Work = Callable[[], Any]
Submit = Callable[[Work], Job]
Share = Callable[[tuple[int, int], Submit, Work], Job]
"""Runs the work of a row on the host that is to do it. Takes the row's place and the number of
rows, `submit` for work that this host does, and the work."""


def done_here(place: tuple[int, int], submit: Submit, work: Work) -> Job:
    """`Share` where one host does everything."""
    return submit(work)


class Workers:
    """A fixed number of working threads, first come, first served.

    Equal keys are one job: whoever asks later, also after it is done, gets the same result, unless
    `max_jobs` younger ones have come since.
    """

    def __init__(self, threads: int, max_jobs: int | None = None, share: Share = done_here) -> None:
        self._pool, self._max_jobs, self._share = ThreadPoolExecutor(threads), max_jobs, share
        self._jobs: OrderedDict[Hashable, Job] = OrderedDict()
        self.submitted = 0
        """How often work was submitted, answered by an earlier job or not."""
        self.jobs = 0
        """How often it was done."""

    def submit(
        self, key: Hashable, work: Work, timeout: float, place: tuple[int, int] = (0, 1)
    ) -> Job:
        """Have `work` done, unless a job of this key is there. Its `result` raises a TimeoutError
        after `timeout` seconds; time spent in the queue does not count. `place` is that of the row
        that asks, and how many there are."""
        self.submitted += 1
        if key not in self._jobs:
            self.jobs += 1
            # A job that hangs gives its place free when its time is over.
            timed = functools.partial(within_seconds, work, timeout)
            self._jobs[key] = self._share(place, self._pool.submit, timed)
        job = self._jobs[key]
        if self._max_jobs is not None and len(self._jobs) > self._max_jobs:
            self._jobs.popitem(last=False)  # whoever waits for it still holds it
        return job

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the threads go; what still waits in the queue is not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)
