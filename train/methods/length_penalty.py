"""DAPO's soft over-long punishment (arXiv 2503.14476): long rollouts lose reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from paravt_jax.advantages import overlong_penalty
from paravt_jax.records import RolloutGroup, Trajectory
from pipelines.loader import PromptItem
from train.rl.loop import RolloutSampler
from train.state import FlatParams


@dataclasses.dataclass(frozen=True)
class LengthPenalty:
    """Samples like another, and punishes what is long by a reward term of its own, `length`.

    The penalty (`overlong_penalty`) counts in `total`, and in `task`, which is the total without
    the anchor.
    """

    sample: RolloutSampler
    weight: float
    limit: int
    """Generated tokens that cost all of the weight."""
    margin: int
    """Tokens below the limit from which on they cost something."""

    def __call__(
        self, params: FlatParams, prompts: Sequence[PromptItem], copies: int, seed: int, step: int
    ) -> list[RolloutGroup]:
        """See `RolloutSampler`."""
        return list(map(self.punished, self.sample(params, prompts, copies, seed, step)))

    def punished(self, group: RolloutGroup) -> RolloutGroup:
        """The same group with the term `length`."""
        lengths = np.array([t.generated.sum() for t in group.trajectories])
        penalties = self.weight * overlong_penalty(lengths, self.limit, self.margin)
        rollouts = tuple(map(_with_length, group.trajectories, penalties.tolist()))
        return dataclasses.replace(group, trajectories=rollouts)


def _with_length(rollout: Trajectory, penalty: float) -> Trajectory:
    changed = {name: rollout.rewards[name] + penalty for name in ("total", "task")}
    return dataclasses.replace(rollout, rewards=rollout.rewards | changed | {"length": penalty})
