"""What both stages report of every step: seconds, learning rate and memory beside their metrics."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from train.optimizer import OptimizerSettings, learning_rate
from train.report.log import RunLog


class Clock:
    """Seconds of each part of a step.

    with clock.time("time/rollout"):
        with clock.time("time/data"):  # counts as this alone
            ...
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A step begins."""
        self._began = self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count the seconds within for `name`; parts of one name are added up."""
        self._lap()
        self._running.append(name)
        try:
            yield
        finally:
            self._lap()
            self._running.pop()

    def _lap(self) -> None:
        """Count the seconds since the last lap for what is running."""
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        """All parts, the whole as `time/step`, and the share of it that data was waited for."""
        step = time.perf_counter() - self._began
        waited = self._seconds.get("time/data", 0.0) / step
        return self._seconds | {"time/step": step, "data/wait": waited}


class StepReport:
    """Writes the metrics of each step, and stops a run whose numbers are none."""

    def __init__(
        self, log: RunLog, clock: Clock, optimizer: OptimizerSettings, steps: int, updates: int = 1
    ) -> None:
        """Of a run of `steps`, with so many optimiser updates in each."""
        self.log, self.clock, self._updates = log, clock, updates
        self._peak = optimizer.learning_rate
        # Not when first asked for: what is computed between steps would be compiled there.
        self._rates = learning_rates(optimizer, steps * updates)

    def __call__(self, step: int, metrics: Mapping[str, float], tokens: int | None = None) -> None:
        """Record a step that is over.

        Args:
          tokens: generated in it, if any were.

        Raises:
          ValueError: its loss or its gradient is no number.
        """
        rate = {"optimizer/learning_rate": float(self._rates[(step + 1) * self._updates - 1])}
        record = {**metrics, **self.clock.metrics(), **rate, **memory()}
        if tokens is not None:
            record["tokens_per_second"] = tokens / record["time/step"]
        self.log.step(step, record)
        stop_if_not_finite(record, step, self._peak)


def learning_rates(settings: OptimizerSettings, steps: int) -> np.ndarray:
    """The learning rate of each of so many optimiser steps, computed at once."""
    schedule = learning_rate(settings, steps)
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(jax.vmap(schedule)(jnp.arange(steps)), np.float64)


def memory() -> dict[str, float]:
    """Peak memory in GiB of this host's fullest device and of this process. On CPU, where devices
    have no memory of their own, both are that of the process."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    process = most * (1 if sys.platform == "darwin" else 1024)
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(each.get("peak_bytes_in_use", process) for each in stats)
    return {"memory/device_peak": device / 2**30, "memory/process_peak": process / 2**30}


def stop_if_not_finite(record: Mapping[str, float], step: int, learning_rate: float) -> None:
    """Stop the run at the step whose loss or gradient is no number."""
    if not np.isfinite(record["loss"] + record["grad_norm"]):
        raise ValueError(
            f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}; continue "
            "from the last checkpoint with the same --workdir and a lower rate, for instance "
            f"--set optimizer.learning_rate={learning_rate / 2:g}"
        )
