"""Values of every token that a step learned from: log-probabilities, advantages, the anchor's
credit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from paravt_jax.records import RolloutGroup, Trajectory


@dataclasses.dataclass(frozen=True)
class TokenValues:
    """Values of the tokens after each prompt, float32 `[b, own]`, on the mesh."""

    log_probs: Array | None
    """The learner's, before the first update of the batch, or with ratios to the sampler before the
    first one that saw the token; 0 where nothing is learned."""
    advantages: Array
    """What the objective was given."""
    structural: Array | None = None
    """What the format anchor adds to that at structural tags; None where it adds nothing."""

    def of_rollouts(self, groups: Sequence[RolloutGroup]) -> OfRollouts:
        """By rollout, on every host; all of them must ask."""
        rows = {name: on_host(x) for name, x in vars(self).items() if x is not None}
        rollouts = [t for group in groups for t in group.trajectories]
        return OfRollouts(rows, {id(t): row for row, t in enumerate(rollouts)})


class OfRollouts:
    """Values of tokens by rollout."""

    def __init__(self, rows: dict[str, np.ndarray], row_of: dict[int, int]) -> None:
        """Arrays `[b, own]` by name, and the row of each rollout by its `id`."""
        self._rows, self._row_of = rows, row_of

    def __call__(self, rollout: Trajectory) -> dict[str, np.ndarray]:
        """By name, float32 `[t]` for the tokens of the rollout; empty if it was not learned."""
        if id(rollout) not in self._row_of:
            return {}
        row, size = self._row_of[id(rollout)], len(rollout.tokens)
        return {name: values[row, :size] for name, values in self._rows.items()}


def on_host(values: Array) -> np.ndarray:
    """All of an array, on every host."""
    if values.is_fully_addressable:
        return np.asarray(jax.device_get(values))
    return np.asarray(multihost_utils.process_allgather(values, tiled=True))
