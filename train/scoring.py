"""Rewards of rollouts and the figures that describe a batch of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from paravt_jax.protocol import parses_strictly
from paravt_jax.records import RolloutGroup, Row, Trajectory
from paravt_jax.rewards import RewardRules, score


def score_groups(groups: Sequence[RolloutGroup], rules: RewardRules) -> list[RolloutGroup]:
    """The same groups with `rewards` filled in, term by term."""
    return [
        dataclasses.replace(
            group,
            trajectories=tuple(score_trajectory(group.row, t, rules) for t in group.trajectories),
        )
        for group in groups
    ]


def score_trajectory(row: Row, trajectory: Trajectory, rules: RewardRules) -> Trajectory:
    """Score one rollout from its own text; executed calls are counted, not read from text."""
    breakdown = score(
        trajectory.scored_text,
        row.answer,
        row.question_type,
        rules,
        turns=[turn.text for turn in trajectory.turns],
        executed_calls=trajectory.executed,
    )
    return dataclasses.replace(trajectory, rewards=dataclasses.asdict(breakdown))


def complies(trajectory: Trajectory) -> bool:
    """Whether every turn of the rollout parses strictly."""
    syntax = trajectory.call_syntax
    return all(parses_strictly(turn.text, syntax=syntax) for turn in trajectory.turns)


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Reward, format and tool figures of a batch, under the names of `metrics.jsonl`."""
    rollouts = [t for group in groups for t in group.trajectories]
    with_call = [t for t in rollouts if t.calls]
    calls = sum(t.calls for t in rollouts)
    totals = np.array([[t.rewards["total"] for t in g.trajectories] for g in groups])
    terms = {
        f"reward/{name}": _mean(t.rewards[name] for t in rollouts)
        for name in ("total", "accuracy", "format", "tool")
    }
    return terms | {
        "format/compliance": _mean(complies(t) for t in rollouts),
        "format/score": terms["reward/format"],
        "tool/calls_per_rollout": calls / len(rollouts),
        "tool/calls_per_using_rollout": calls / max(len(with_call), 1),
        "tool/rollouts_with_call": len(with_call) / len(rollouts),
        "tool/parallel_max": float(
            max((len(turn.calls) for t in rollouts for turn in t.turns), default=0)
        ),
        "tool/success_rate": sum(t.executed for t in rollouts) / max(calls, 1),
        "frames/budget_mean": _mean(group.frame_budget for group in groups),
        "group/zero_std": _mean(totals.std(axis=1) < 1e-9),
        "length/generated": _mean(t.generated.sum() for t in rollouts),
    }


def accuracy_by_type(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Mean accuracy of each question type present."""
    values: dict[str, list[float]] = {}
    for group in groups:
        for trajectory in group.trajectories:
            kind = str(group.row.question_type)
            values.setdefault(kind, []).append(trajectory.rewards["accuracy"])
    return {f"accuracy/{kind}": _mean(found) for kind, found in sorted(values.items())}


def _mean(values) -> float:
    array = np.array(list(values), np.float64)
    return float(array.mean()) if array.size else 0.0
