"""Rewards of rollouts, and the metrics of a batch of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from paravt_jax.advantages import has_reward_variance
from paravt_jax.plugins import is_reference
from paravt_jax.protocol import parses_strictly
from paravt_jax.records import RolloutGroup, Row, Trajectory
from paravt_jax.rewards import Judge, RewardRules, open_judge, score
from train.hosts.cluster import from_first, is_first

_LOG = logging.getLogger(__name__)


class Scorer:
    """Gives rollouts their rewards by the rules of a run; asks its judge, if they need one."""

    def __init__(self, rules: RewardRules) -> None:
        """Raises ValueError where the rules need a judge and its settings are no use."""
        self._rules = rules
        self._judge = open_judge(rules.judge) if rules.mode == "llm" else None
        self.metrics: dict[str, float] = {}
        """Of the judge during the last call, for `metrics.jsonl`; empty without one."""

    def __call__(self, groups: Sequence[RolloutGroup], progress: float = 1.0) -> list[RolloutGroup]:
        """The same groups with `rewards` filled in.

        Args:
          progress: share of the training that is done.
        """
        if self._judge is None:
            scored = score_groups(groups, self._rules, progress=progress)
            # A function of the user's may draw lots or ask a server: hosts must not go apart.
            return _agree(scored) if is_reference(str(self._rules.scheme)) else scored
        # Several hosts could get several verdicts: one asks, the others take its numbers.
        judge = self._judge if is_first() else _silent
        scored = _agree(score_groups(groups, self._rules, judge, progress))
        self.metrics = self._judge.metrics()
        if self.metrics["judge/failures"]:
            failures, reason = int(self.metrics["judge/failures"]), self._judge.last_failure
            _LOG.warning("%d messages got no verdict, F1 decides; the last: %s", failures, reason)
        return scored


def score_groups(
    groups: Sequence[RolloutGroup],
    rules: RewardRules,
    judge: Judge | None = None,
    progress: float = 1.0,
) -> list[RolloutGroup]:
    """The same groups with `rewards` filled in, term by term; a judge is asked side by side."""
    rollouts = [(group.row, t) for group in groups for t in group.trajectories]

    def scored(rollout: tuple[Row, Trajectory]) -> dict[str, float]:
        return rewards_of(*rollout, rules, judge, progress)

    if judge is None:
        return _with_rewards(groups, map(scored, rollouts))
    with ThreadPoolExecutor(rules.judge.concurrency) as threads:
        return _with_rewards(groups, threads.map(scored, rollouts))


def rewards_of(
    row: Row,
    trajectory: Trajectory,
    rules: RewardRules,
    judge: Judge | None = None,
    progress: float = 1.0,
) -> dict[str, float]:
    """Rewards of one rollout from its own text; executed calls are counted, not read from text."""
    return score(
        trajectory.scored_text,
        row.answer,
        row.question_type,
        rules,
        turns=[turn.text for turn in trajectory.turns],
        executed_calls=trajectory.executed,
        calls=[call for turn in trajectory.turns for call in turn.executed_calls],
        call_syntax=trajectory.call_syntax,
        evidence=row.evidence,
        progress=progress,
        question=row.question,
        judge=judge,
    ).as_dict()


def _with_rewards(
    groups: Sequence[RolloutGroup], rewards: Iterable[dict[str, float]]
) -> list[RolloutGroup]:
    """The groups, their rollouts with these rewards in their order."""
    left, replace = iter(rewards), dataclasses.replace
    return [
        replace(g, trajectories=tuple(replace(t, rewards=next(left)) for t in g.trajectories))
        for g in groups
    ]


def _agree(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with the rewards that the first host gave them."""
    rewards = [t.rewards for group in groups for t in group.trajectories]
    # They travel as JSON, which knows no numpy scalars.
    plain = [{name: float(value) for name, value in terms.items()} for terms in rewards]
    return _with_rewards(groups, from_first(plain))


def _silent(message: str) -> str:
    """The judge of a host that does not ask."""
    return ""


def complies(trajectory: Trajectory) -> bool:
    """Whether every turn of the rollout parses strictly."""
    syntax = trajectory.call_syntax
    return all(parses_strictly(turn.text, syntax=syntax) for turn in trajectory.turns)


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Metrics of reward, format and tool of a batch, under the names of `metrics.jsonl`."""
    rollouts = [t for group in groups for t in group.trajectories]
    with_call = [t for t in rollouts if t.calls]
    calls = sum(t.calls for t in rollouts)
    totals = np.array([[t.rewards["total"] for t in g.trajectories] for g in groups])
    terms = {
        f"reward/{name}": _mean(t.rewards[name] for t in rollouts) for name in rollouts[0].rewards
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
        "tool/over_turn": _mean(t.over_turn for t in rollouts),
        "tool/success_rate": sum(t.executed for t in rollouts) / max(calls, 1),
        "frames/budget_mean": _mean(group.frame_budget for group in groups),
        "group/zero_std": _mean(~has_reward_variance(totals)),
        "length/generated": _mean(t.generated.sum() for t in rollouts),
    }


def _mean(values) -> float:
    array = np.array(list(values), np.float64)
    return float(array.mean()) if array.size else 0.0
