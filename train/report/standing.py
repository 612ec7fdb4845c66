"""Where a run stands: how fast it learns, and what it takes of the devices."""

from __future__ import annotations

import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np

from train.config import Config
from train.optimizer import learning_rate


def learning_rates(config: Config) -> np.ndarray:
    """The learning rate of each optimiser step of a run, computed at once: what is computed between
    steps would have to be compiled there."""
    schedule = learning_rate(config.optimizer, config.optimizer_steps)
    return np.asarray(jax.vmap(schedule)(jnp.arange(config.optimizer_steps)), np.float64)


def standing(rates: np.ndarray, step: int, updates: int = 1) -> dict[str, float]:
    """For `metrics.jsonl`: the rate of the last optimiser step of `step`, and memory in GiB."""
    return {"optimizer/learning_rate": float(rates[(step + 1) * updates - 1])} | memory()


def memory() -> dict[str, float]:
    """The most that this host's fullest device has held so far, and that this process has; a CPU
    has no memory of its own, and tells the latter twice."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    process = most * (1 if sys.platform == "darwin" else 1024)
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    device = max(own.get("peak_bytes_in_use", process) for own in told)
    return {"memory/device_peak": device / 2**30, "memory/process_peak": process / 2**30}
