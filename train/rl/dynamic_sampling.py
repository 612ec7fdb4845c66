"""Which rollouts a step learns from: all that it drew, or only groups that teach anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from paravt_jax.advantages import has_spread, overlong_penalty
from paravt_jax.records import RolloutGroup, Trajectory
from train.rl.settings import RlSettings


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Rollouts of one step."""

    groups: tuple[RolloutGroup, ...]
    """Those to learn from, as many as a batch holds."""
    everything: tuple[RolloutGroup, ...]
    """All that were drawn, those to learn from included: what the policy does."""
    redraws: int
    """Batches of prompts that were drawn beyond the first."""

    def figures(self) -> dict[str, float]:
        """For `metrics.jsonl`."""
        return {
            "group/redraws": float(self.redraws),
            "group/kept": len(self.groups) / len(self.everything),
        }


def draw_groups(draw: Callable[[int], Sequence[RolloutGroup]], settings: RlSettings) -> Drawn:
    """Draw batches of scored groups until one batch of groups with spread is full.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): a group whose rollouts all got the same
    reward has no advantage and only makes the others' gradient smaller. Every batch is drawn
    whole, as the engine holds one, and groups beyond those needed are not kept for a later step,
    whose policy would be another. If `filter_redraws` batches more are not enough, the first groups
    without spread fill the rest, so that a step never waits forever.

    Args:
        draw: rolls out and scores the n-th batch of this step.
        settings: which reward must differ, and how often to draw; without `filter_groups` the
            first batch is what is learned from.
    """
    everything = list(draw(0))
    size, term, redraws = len(everything), settings.filter_groups, 0
    if term is None:
        return Drawn(tuple(everything), tuple(everything), 0)
    teaches = _teaches(everything, term, settings.mask_over_turn)
    while teaches.sum() < size and redraws < settings.filter_redraws:
        redraws += 1
        everything += draw(redraws)
        teaches = _teaches(everything, term, settings.mask_over_turn)
    first = np.argsort(~teaches, kind="stable")[:size]
    return Drawn(tuple(everything[at] for at in sorted(first)), tuple(everything), redraws)


def _teaches(groups: Sequence[RolloutGroup], term: str, mask_over_turn: bool) -> np.ndarray:
    """Which groups have rollouts to learn from whose rewards differ; bool `[groups]`."""
    learned_P_G = [
        [t.rewards[term] for t in group.trajectories if not (mask_over_turn and t.over_turn)]
        for group in groups
    ]
    return np.array([len(own) > 1 and bool(has_spread(np.array([own]))) for own in learned_P_G])


def with_length_penalty(
    groups: Sequence[RolloutGroup], settings: RlSettings
) -> Sequence[RolloutGroup]:
    """The same groups, long rollouts punished by a reward term of their own, `length`.

    The penalty (`overlong_penalty`) counts in `total`, and in `task`, which is the total without
    the anchor. Without a limit nothing changes.
    """
    limit, margin = settings.overlong_limit, settings.overlong_margin
    if limit is None or margin is None:
        return groups
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
