"""DAPO's soft over-long punishment (arXiv 2503.14476): long rollouts lose reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from paravt_jax.advantages import overlong_penalty
from paravt_jax.records import RolloutGroup, Trajectory
from pipelines.loader import PromptItem
from train.rl.loop import Sample
from train.rl.settings import RlSettings
from train.state import FlatParams


@dataclasses.dataclass(frozen=True)
class LengthPenalty:
    """Samples like another, and punishes what is long."""

    sample: Sample
    settings: RlSettings

    def __call__(
        self, params: FlatParams, prompts: Sequence[PromptItem], copies: int, seed: int, step: int
    ) -> list[RolloutGroup]:
        """See `Sample`."""
        return with_length_penalty(self.sample(params, prompts, copies, seed, step), self.settings)


def with_length_penalty(groups: Sequence[RolloutGroup], settings: RlSettings) -> list[RolloutGroup]:
    """The same groups, long rollouts punished by a reward term of their own, `length`.

    The penalty (`overlong_penalty`) counts in `total`, and in `task`, which is the total without
    the anchor. Without a limit nothing changes.
    """
    limit, margin = settings.overlong_limit, settings.overlong_margin
    if limit is None or margin is None:
        return list(groups)
    punished = []
    for group in groups:
        lengths = np.array([t.generated.sum() for t in group.trajectories])
        penalties = settings.overlong_weight * overlong_penalty(lengths, limit, margin)
        rollouts = tuple(map(_with_length, group.trajectories, penalties.tolist()))
        punished.append(dataclasses.replace(group, trajectories=rollouts))
    return punished


def _with_length(rollout: Trajectory, penalty: float) -> Trajectory:
    changed = {name: rollout.rewards[name] + penalty for name in ("total", "task")}
    return dataclasses.replace(rollout, rewards=rollout.rewards | changed | {"length": penalty})
