"""DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): learn only from groups that teach.

A group whose rollouts all got the same reward has no advantage and only makes the others' gradient
smaller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from paravt_jax.advantages import has_reward_variance
from paravt_jax.records import RolloutGroup
from train.rl.loop import RolloutBatch, RolloutSource
from train.rl.settings import RlSettings
from train.state import FlatParams


@dataclasses.dataclass(frozen=True)
class DynamicSampling:
    """Draws from another source until a batch of groups that teach is full."""

    source: RolloutSource
    settings: RlSettings

    def draw(self, params: FlatParams, step: int, number: int = 0) -> RolloutBatch:
        """See `RolloutSource`."""
        return fill_batch(lambda at: self.source.draw(params, step, at).groups, self.settings)


def fill_batch(draw: Callable[[int], Sequence[RolloutGroup]], settings: RlSettings) -> RolloutBatch:
    """Draw batches of scored groups until one batch of groups with spread is full.

    Every batch is drawn whole, as the engine holds one, and groups beyond those needed are not kept
    for a later step, whose policy would be another. If `filter_redraws` batches more are not
    enough, the first groups without spread fill the rest, so that a step never waits forever.

    Args:
        draw: rolls out and scores the n-th batch of this step.
        settings: which reward must differ, and how often to draw; without `filter_groups` the
            first batch is what is learned from.
    """
    drawn = list(draw(0))
    size, term, redraws = len(drawn), settings.filter_groups, 0
    if term is None:
        return RolloutBatch(drawn, drawn)
    teaches = _teaches(drawn, term, settings.mask_over_turn)
    while teaches.sum() < size and redraws < settings.filter_redraws:
        redraws += 1
        drawn += draw(redraws)
        teaches = _teaches(drawn, term, settings.mask_over_turn)
    first = np.argsort(~teaches, kind="stable")[:size]
    return RolloutBatch([drawn[at] for at in sorted(first)], drawn)


def _teaches(groups: Sequence[RolloutGroup], term: str, mask_over_turn: bool) -> np.ndarray:
    """Which groups have rollouts to learn from whose rewards differ; bool `[groups]`."""
    learned_P_G = [
        [t.rewards[term] for t in group.trajectories if not (mask_over_turn and t.over_turn)]
        for group in groups
    ]
    return np.array(
        [len(own) > 1 and bool(has_reward_variance(np.array([own]))) for own in learned_P_G]
    )
