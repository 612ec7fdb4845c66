"""Rollouts of the next steps, drawn while this one learns (`rl.staleness`, docs/adr/0035).

    draw(step):  rollouts of `step + N` are begun under the weights of now
                 rollouts of `step`, begun N steps ago, are waited for

One thread draws, one batch after the other. Under which weights follows from the step alone
(`version_of`) and never from the clock, so that a run repeats, and goes on after a resume, to the
bit: a checkpoint holds the weights of the last N steps and the position of the prompts, from which
what was under way is drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.hosts.interrupt import SIGNALS_OF_RUN
from train.report.steps import Clock
from train.rl.loop import MetricsSource, Resumable, RolloutBatch, RolloutSource, version_of
from train.state import FlatParams


class Stopped(BaseException):
    """Nobody waits for these rollouts any more. No `Exception`: it is no failure of a tool."""


class Stop:
    """Ends the rollouts that are under way when a run ends."""

    def __init__(self) -> None:
        self._requested = threading.Event()

    def ask(self) -> None:
        """Let them end at the next step of the engine."""
        self._requested.set()

    def check(self) -> None:
        """Raises Stopped if that was asked for, or Interrupted if a signal came."""
        if self._requested.is_set():
            raise Stopped
        SIGNALS_OF_RUN.check()


@dataclasses.dataclass(frozen=True)
class DrawnAhead:
    """The rollouts of a step, and how things stood when they were there."""

    batch: RolloutBatch
    position: Mapping[str, Any]
    """States of the parts that the source goes on from."""
    metrics: Mapping[str, float]


class RolloutsAhead:
    """Draws from another source up to N steps ahead, in a thread of its own."""

    def __init__(
        self,
        source: RolloutSource,
        parts: Mapping[str, Resumable],
        metrics: Sequence[MetricsSource],
        *,
        steps: int,
        staleness: int,
        trained: Collection[str],
        mesh: Mesh,
        clock: Clock,
        stop: Stop,
    ) -> None:
        """
        Args:
          source: used by the thread alone from the first `draw` on, as are `parts`, what it goes
            on from, and `metrics`, what it says of each batch.
          steps: of the whole run; nothing is drawn for later ones.
          staleness: N, 1 or more.
          trained: names of the weights that train. Those are copied for the thread, the others
            must outlive all steps.
          mesh: that under which `source` is used.
          clock: that of `source`.
          stop: ends the rollouts of `source`.
        """
        self._source, self._parts, self._sources = source, dict(parts), list(metrics)
        self._steps, self._staleness, self._trained = steps, staleness, trained
        self._mesh, self._clock, self._stop = mesh, clock, stop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._work, self._learned_from = WorkTimes(), time.perf_counter()
        self._weights: dict[int, FlatParams] = {}
        """Copies of what trains, by the step before which it was so."""
        self._under_way: dict[int, Future[DrawnAhead]] = {}
        self._position = {name: part.get_state() for name, part in self._parts.items()}
        self._metrics: dict[str, float] = {}

    def draw(self, params: FlatParams, step: int, number: int = 0) -> RolloutBatch:
        """See `RolloutSource`; `params` may be donated when this returns.

        Raises:
          ValueError: rollouts are of older weights than they may be.
        """
        self._keep(params, step)
        self._begin(params, step)
        began = time.perf_counter()
        drawn = self._under_way.pop(step).result()
        beside = self._work.within(self._learned_from, began)
        self._learned_from = time.perf_counter()
        self._position = dict(drawn.position)
        self._metrics = {**drawn.metrics, **self._ages(drawn.batch, step), "time/overlap": beside}
        return drawn.batch

    def metrics(self) -> dict[str, float]:
        """Of the rollouts that were drawn last."""
        return self._metrics

    def idle(self) -> None:
        """Wait until nothing is drawn."""
        wait(self._under_way.values())

    def close(self) -> None:
        """End what is under way."""
        self._stop.ask()
        self._thread.shutdown(cancel_futures=True)

    def older(self, step: int) -> dict[str, FlatParams]:
        """What trains as it was 1, 2, ... N steps before `step`, by that number."""
        return {str(step - version): weights for version, weights in self._weights.items()}

    def go_on(self, step: int, older: Mapping[str, FlatParams]) -> None:
        """Go on before `step`, from what `older` gave for it."""
        self._weights = {step - int(age): weights for age, weights in older.items()}

    @property
    def resumable(self) -> dict[str, Resumable]:
        """The parts of the source, as they were when the rollouts of the last step were drawn."""
        return {name: _AsLearned(self, name) for name in self._parts}

    def position(self, name: str) -> Any:
        """The state of a part when the rollouts of the last step were drawn."""
        return self._position[name]

    def set_position(self, name: str, state: Any) -> None:
        """Have a part go on from such a state."""
        self._parts[name].set_state(state)
        self._position[name] = self._parts[name].get_state()

    def _keep(self, params: FlatParams, step: int) -> None:
        """Copies of these weights, and of the last ones as long as rollouts may need them."""
        # The learner donates them while they are still drawn from.
        self._weights[step] = {
            name: x.copy() for name, x in params.items() if name in self._trained
        }

    def _begin(self, params: FlatParams, step: int) -> None:
        """Begin all rollouts up to N steps ahead, then forget weights that no other will need."""
        last = min(step + self._staleness, self._steps - 1)
        for ahead in range(max([step - 1, *self._under_way]) + 1, last + 1):
            policy = {**params, **self._weights[version_of(ahead, self._staleness)]}
            self._under_way[ahead] = self._thread.submit(self._draw, policy, ahead)
        oldest = version_of(step + 1, self._staleness)
        self._weights = {at: weights for at, weights in self._weights.items() if at >= oldest}

    def _draw(self, params: FlatParams, step: int) -> DrawnAhead:
        """In the thread: the rollouts of a step."""
        # The active mesh is known to the thread that set it alone.
        with jax.set_mesh(self._mesh), self._work.noted():
            self._clock.start()
            batch = self._source.draw(params, step)
            metrics = {"time/data": self._clock.metrics().get("time/data", 0.0)}
            for source in self._sources:
                metrics |= source()
            position = {name: part.get_state() for name, part in self._parts.items()}
        return DrawnAhead(batch, position, metrics)

    def _ages(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """By how many steps the weights of the rollouts are behind; never more than N."""
        rollouts = [t for group in batch.drawn for t in group.trajectories]
        ages = np.array([step - t.policy_version for t in rollouts])
        if ages.max() > self._staleness:
            raise ValueError(
                f"step {step}: rollouts of weights that are {ages.max()} steps old, more than "
                f"rl.staleness={self._staleness} allows; raise it"
            )
        return {"rollout/staleness": ages.mean(), "rollout/staleness_max": float(ages.max())}


@dataclasses.dataclass(frozen=True)
class _AsLearned:
    """See `RolloutsAhead.resumable`."""

    ahead: RolloutsAhead
    name: str

    def get_state(self) -> Any:
        """See `Resumable`."""
        return self.ahead.position(self.name)

    def set_state(self, state: Any) -> None:
        """See `Resumable`."""
        self.ahead.set_position(self.name, state)


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
