"""The weights that draw rollouts, by version: kept by the loop, taken by the thread that draws.

A version is the number of steps that were learned before. Which one draws what follows from the
step and from the calls of the engine since its rollouts began, never from the clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from rollout.engine.session import VersionedWeights
from train.rl.loop import version_of
from train.state import FlatParams

LOOK_SECONDS = 0.05
"""How often who waits for weights looks whether the run has ended."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which version draws what."""

    staleness: int
    """Most steps by which weights may be behind."""
    updates: int = 0
    """How often at most the rollouts of a step go on with the next version."""
    calls: int = 1
    """Calls of the engine between two of these updates."""

    def version(self, step: int, call: int) -> int:
        """The version under which the engine makes this call, from 0, for the rollouts of a step.

        Never above `step`: that one is there before anybody waits for these rollouts, so that
        whoever waits for it can wait until it is there.
        """
        newer = min(call // self.calls, self.updates)
        return min(step, version_of(step, self.staleness) + newer)


class Versions:
    """Copies of what trains, by version, and which of them the rollouts of a step go on with."""

    def __init__(
        self,
        schedule: Schedule,
        check: Callable[[], None] = lambda: None,
        prepare: Callable[[FlatParams], FlatParams] = lambda params: params,
    ) -> None:
        """
        Args:
          check: called again and again while weights are waited for, and may raise.
          prepare: makes, in the loop's thread, what the other one draws from.
        """
        self.schedule, self._check, self._prepare = schedule, check, prepare
        self._kept: dict[int, FlatParams] = {}
        self._ready: dict[int, FlatParams] = {}
        self._changed = threading.Condition()
        self._awaited: int | None = None
        self._waits = WorkTimes()
        self._step, self._call = 0, 0
        self._current = VersionedWeights(0, {})

    def __getitem__(self, version: int) -> FlatParams:
        """All weights as they were before that step, prepared."""
        return self._ready[version]

    def keep(self, version: int, params: FlatParams, trained: Collection[str]) -> None:
        """Keep these weights, of which those that are `trained` are copied."""
        kept = self._kept
        if version not in kept:
            # The learner donates them while they are still drawn from.
            copies = {name: x.copy() for name, x in params.items() if name in trained}
            kept = {**kept, version: copies}
        missing = {at: own for at, own in kept.items() if at not in self._ready}
        ready = {at: self._prepare({**params, **own}) for at, own in missing.items()}
        with self._changed:
            self._kept, self._ready = kept, self._ready | ready
            self._changed.notify_all()

    def forget(self, before: int) -> None:
        """Forget older ones."""
        with self._changed:
            self._kept = {at: weights for at, weights in self._kept.items() if at >= before}
            self._ready = {at: self._ready[at] for at in self._kept}

    def older(self, step: int) -> dict[str, FlatParams]:
        """Those before `step`, by how many steps they are older."""
        return {str(step - at): weights for at, weights in self._kept.items() if at < step}

    def go_on(self, step: int, older: Mapping[str, FlatParams]) -> None:
        """Hold what `older` gave for `step`."""
        self._kept = {step - int(age): weights for age, weights in older.items()}
        self._ready = {}

    def begin(self, step: int, params: FlatParams) -> None:
        """In the thread: the rollouts of a step begin under these weights."""
        self._step, self._call = step, 0
        self._current = VersionedWeights(self.schedule.version(step, 0), params)

    def __call__(self) -> VersionedWeights:
        """In the thread, before each call of the engine: the weights to go on with."""
        version = self.schedule.version(self._step, self._call)
        self._call += 1
        if version != self._current.version:
            self._current = VersionedWeights(version, self._wait_for(version))
        return self._current

    def _wait_for(self, version: int) -> FlatParams:
        with self._changed:
            if version in self._ready:
                return self._ready[version]
            self._awaited = version
            try:
                with self._waits.noted():
                    while not self._changed.wait_for(lambda: version in self._ready, LOOK_SECONDS):
                        self._check()
            finally:
                self._awaited = None
            return self._ready[version]

    @property
    def awaited(self) -> bool:
        """Whether the thread waits for weights that are not there."""
        with self._changed:
            return self._awaited is not None and self._awaited not in self._ready

    def waited(self, start: float, end: float) -> float:
        """Seconds between two times in which it did."""
        return self._waits.within(start, end)


class WorkTimes:
    """When a thread worked, for another that asks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[list[float]] = []
        """Beginnings and ends; what goes on ends never."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """What is done within is work."""
        span = [time.perf_counter(), math.inf]
        with self._lock:
            self._spans.append(span)
        try:
            yield
        finally:
            span[1] = time.perf_counter()

    def within(self, start: float, end: float) -> float:
        """Seconds of work between two times; what was over before is forgotten."""
        with self._lock:
            self._spans = [span for span in self._spans if span[1] > start]
            return sum(max(0.0, min(b, end) - max(a, start)) for a, b in self._spans)
