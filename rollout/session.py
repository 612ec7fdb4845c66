"""What goes between the engine and whoever uses it."""

from __future__ import annotations

import dataclasses

import numpy as np

from paravt_jax.records import StopReason


@dataclasses.dataclass(frozen=True)
class Stream:
    """Handle of one row."""

    number: int


@dataclasses.dataclass(frozen=True)
class Generated:
    """What one row generated in one turn."""

    tokens: np.ndarray
    """int32 `[t]`, the end-of-turn token included if there was one."""
    log_probs: np.ndarray
    """float32 `[t]`, under the tempered, untruncated distribution."""
    stop_reason: StopReason
