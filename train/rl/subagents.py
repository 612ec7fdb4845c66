"""Sub-agents in the loss: their streams as rows beside those of the rollouts that called them.

Rows stay with the group of their rollout and every group has equally many, filled up with rows
without a loss, so that minibatches and micro-batches cut both alike. The number is one of few, and
so is the number of shapes that are compiled. The release could train sub-agents, and would do it
wrongly (paravt/rl at cf55249): with the advantage of a prompt token, which is 0, with masks and
log-probabilities shifted by one against those of the main agents, and without their reference.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from paravt_jax.records import RolloutGroup, Trajectory
from paravt_jax.shapes import bucket
from train.batch import LearnerStream, stream_of


def rows_per_group(most: int, group_size: int) -> int:
    """Rows of each group where the busiest has `most` sub-agents: a multiple of its rollouts,
    so that they divide over a mesh as those do. 0 without sub-agents."""
    return group_size * bucket(-(-most // group_size)) if most else 0


def possible_rows(calls: int, group_size: int) -> list[int]:
    """All that `rows_per_group` can return where a rollout makes at most `calls` crops."""
    return sorted({rows_per_group(most, group_size) for most in range(calls * group_size + 1)})


def most_crops(groups: Sequence[RolloutGroup]) -> int:
    """Sub-agents of the group that has most."""
    return max(len(_crops(group)) for group in groups)


def subagent_streams(
    groups: Sequence[RolloutGroup], rows: int, mask_over_turn: bool = False
) -> list[LearnerStream]:
    """`rows` streams for each group: its sub-agents in call order, trained like their rollouts
    (see `streams_of_groups`), then copies of the first of the batch that are not trained."""
    first = next(stream_of(crop) for group in groups for crop in _crops(group))
    nothing = np.zeros_like(first.log_probs)
    silent = np.zeros_like(first.generated)
    idle = dataclasses.replace(first, loss_weights=nothing, log_probs=nothing, generated=silent)
    streams: list[LearnerStream] = []
    for group in groups:
        crops = [
            stream_of(crop, not (mask_over_turn and rollout.over_turn))
            for rollout in group.trajectories
            for crop in rollout.subagents
        ]
        streams += crops + [idle] * (rows - len(crops))
    return streams


def subagent_advantages(
    groups: Sequence[RolloutGroup], advantages: np.ndarray, rows: int, credit: str
) -> np.ndarray:
    """The advantage of each row of `subagent_streams`, float32 `[p * rows]`; 0 where it is idle.

    Args:
      advantages: of each rollout, `[p * g]`.
      credit: `full` gives each sub-agent the advantage of its episode, `share` divides it by the
        sub-agents of the episode.
    """
    episodes = advantages.reshape(len(groups), -1)
    earned = np.zeros((len(groups), rows), np.float32)
    for row, group, of_group in zip(earned, groups, episodes, strict=True):
        counts = [len(t.subagents) for t in group.trajectories]
        parts = of_group / np.maximum(counts, 1) if credit == "share" else of_group
        row[: sum(counts)] = np.repeat(parts, counts)
    return earned.reshape(-1)


def _crops(group: RolloutGroup) -> list[Trajectory]:
    return [crop for rollout in group.trajectories for crop in rollout.subagents]
