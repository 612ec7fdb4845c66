"""Rollouts of the next steps, drawn while this one learns (`rl.staleness`, docs/adr/0035).

    draw(step):  rollouts of `step + N` are begun under the weights of now
                 rollouts of `step`, begun N steps ago, are waited for

One thread draws, one batch after the other. Under which weights follows from the step, and where
what is under way goes on with newer ones, from the calls of the engine (`train.rl.versions`), never
from the clock. So a run repeats, and goes on after a resume, to the bit: a checkpoint holds the
weights of the last N steps and the position of the prompts, from which what was under way is drawn
again.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.hosts.exchange import EXCHANGE
from train.hosts.interrupt import SIGNALS_OF_RUN
from train.report.steps import Clock
from train.rl.loop import MetricsSource, Resumable, RolloutBatch, RolloutSource, version_of
from train.rl.versions import Versions, WorkTimes
from train.state import FlatParams

REST_SECONDS = 0.05
"""How often who waits for rest looks whether the thread waits for weights."""


class Stopped(BaseException):
    """Nobody waits for these rollouts any more. No `Exception`: it is no failure of a tool."""


class Stop:
    """Ends the rollouts that are under way when a run ends."""

    def __init__(self) -> None:
        self._requested = threading.Event()

    def ask(self) -> None:
        """Let them end at the next step of the engine; on several hosts where they next wait for
        weights, for ended at steps of their own hosts would wait for one another."""
        self._requested.set()

    def check(self) -> None:
        """Before each step of the engine: raises Interrupted if a signal came, on all hosts at the
        same step, or Stopped if that was asked for."""
        if EXCHANGE.count == 1:
            self.check_here()
        SIGNALS_OF_RUN.check()

    def check_here(self) -> None:
        """Where no device waits for this host: raises Stopped if that was asked for."""
        if self._requested.is_set():
            raise Stopped


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
        versions: Versions,
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
          versions: those that draw, nobody else's; `source` goes on with what they give.
          trained: names of the weights that train. Those are copied for the thread, the others
            must outlive all steps.
          mesh: that under which `source` is used.
          clock: that of `source`.
          stop: ends the rollouts of `source`.
        """
        self._source, self._parts, self._sources = source, dict(parts), list(metrics)
        self._steps, self._versions, self._trained = steps, versions, trained
        self._schedule, self._staleness = versions.schedule, versions.schedule.staleness
        self._mesh, self._clock, self._stop = mesh, clock, stop
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._work, self._learned_from = WorkTimes(), time.perf_counter()
        self._under_way: dict[int, Future[DrawnAhead]] = {}
        self._position = {name: part.get_state() for name, part in self._parts.items()}
        self._metrics: dict[str, float] = {}

    def draw(self, params: FlatParams, step: int, number: int = 0) -> RolloutBatch:
        """See `RolloutSource`; `params` may be donated when this returns.

        Raises:
          ValueError: rollouts are of older weights than they may be.
        """
        self._keep(params, step)
        self._begin(step)
        beside = self._beside()
        drawn = self._under_way.pop(step).result()
        self._learned_from = time.perf_counter()
        self._position = dict(drawn.position)
        self._metrics = {**drawn.metrics, **self._ages(drawn.batch, step), **beside}
        return drawn.batch

    def metrics(self) -> dict[str, float]:
        """Of the rollouts that were drawn last."""
        return self._metrics

    def idle(self, step: int, params: FlatParams) -> None:
        """Wait until nothing is drawn before `step`, whose weights are `params`: until all that is
        under way is there, or waits for weights of later steps, with its caches."""
        if self._schedule.updates:
            self._keep(params, step)
        while wait(self._under_way.values(), REST_SECONDS).not_done and not self._versions.awaited:
            pass

    def close(self) -> None:
        """End what is under way. On several hosts nothing is after the last step, a signal ends it
        everywhere, and a failure the process: its thread may wait for hosts that have failed."""
        self._stop.ask()
        self._thread.shutdown(wait=EXCHANGE.count == 1, cancel_futures=True)

    def older(self, step: int) -> dict[str, FlatParams]:
        """What trains as it was 1, 2, ... N steps before `step`, by that number."""
        return self._versions.older(step)

    def go_on(self, step: int, older: Mapping[str, FlatParams]) -> None:
        """Go on before `step`, from what `older` gave for it."""
        self._versions.go_on(step, older)

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
        self._versions.keep(step, params, self._trained)

    def _begin(self, step: int) -> None:
        """Begin all rollouts up to N steps ahead, then forget weights that no other will need."""
        last = min(step + self._staleness, self._steps - 1)
        for ahead in range(max([step - 1, *self._under_way]) + 1, last + 1):
            policy = self._versions[self._schedule.version(ahead, 0)]
            self._under_way[ahead] = self._thread.submit(self._draw, policy, ahead)
        self._versions.forget(before=version_of(step + 1, self._staleness))

    def _draw(self, params: FlatParams, step: int) -> DrawnAhead:
        """In the thread: the rollouts of a step."""
        # The active mesh is known to the thread that set it alone.
        with jax.set_mesh(self._mesh), self._work.noted():
            self._clock.start()
            self._versions.begin(step, params)
            batch = self._source.draw(params, step)
            metrics = {"time/data": self._clock.metrics().get("time/data", 0.0)}
            for source in self._sources:
                metrics |= source()
            position = {name: part.get_state() for name, part in self._parts.items()}
        return DrawnAhead(batch, position, metrics)

    def _beside(self) -> dict[str, float]:
        """How long rollouts were drawn since the last ones were there, or waited for weights."""
        since = self._learned_from, time.perf_counter()
        waited = self._versions.waited(*since)
        times = {"time/overlap": self._work.within(*since) - waited}
        return times | ({"time/weights_wait": waited} if self._schedule.updates else {})

    def _ages(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """By how many steps the weights that drew each token are behind; never more than N."""
        rollouts = [t for group in batch.drawn for t in group.trajectories]
        everyone = [*rollouts, *(own for t in rollouts for own in t.subagents)]
        ages = step - np.concatenate([t.drawn_by for t in everyone])
        if ages.max() > self._staleness:
            raise ValueError(
                f"step {step}: rollouts of weights that are {ages.max()} steps old, more than "
                f"rl.staleness={self._staleness} allows; raise it"
            )
        mean, most = float(ages.mean()), float(ages.max())
        return {"rollout/staleness": mean, "rollout/staleness_max": most}


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
