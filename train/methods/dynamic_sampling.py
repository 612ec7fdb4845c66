"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): learn only from groups that teach.

A group whose rollouts all got the same reward has no advantage and only makes the others' gradient
smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from paravt_jax.advantages import has_reward_variance
from paravt_jax.records import RolloutGroup
from train.rl.loop import RolloutBatch, RolloutSource
from train.rl.settings import RlSettings
from train.state import FlatParams


@dataclasses.dataclass(frozen=True)
class DynamicSampling:
    """Draws from another source until a batch of groups with spread is full.

    Every batch is drawn whole, as the engine holds one, and groups beyond those needed are not kept
    for a later step, whose policy would be another. If `filter_redraws` batches more are not
    enough, the first groups without spread fill the rest, so that a step never waits forever.
    """

    source: RolloutSource
    settings: RlSettings

    def draw(self, params: FlatParams, step: int, number: int = 0) -> RolloutBatch:
        """See `RolloutSource`."""
        settings, drawn = self.settings, list(self.source.draw(params, step).groups)
        size, redraws = len(drawn), 0
        teaches = _teaches(drawn, settings)
        while teaches.sum() < size and redraws < settings.filter_redraws:
            redraws += 1
            drawn += self.source.draw(params, step, redraws).groups
            teaches = _teaches(drawn, settings)
        first = np.argsort(~teaches, kind="stable")[:size]
        return RolloutBatch([drawn[at] for at in sorted(first)], drawn)


def _teaches(groups: Sequence[RolloutGroup], settings: RlSettings) -> np.ndarray:
    """Which groups have rollouts to learn from whose rewards differ; bool `[groups]`."""
    learned_P_G = [
        [
            t.rewards[str(settings.filter_groups)]
            for t in group.trajectories
            if not (settings.mask_over_turn and t.over_turn)
        ]
        for group in groups
    ]
    return np.array([len(r) > 1 and bool(has_reward_variance(np.array([r]))) for r in learned_P_G])
