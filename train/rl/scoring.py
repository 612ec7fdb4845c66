"""Rewards of rollouts, and the metrics of a batch of them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from paravt_jax.advantages import has_reward_variance
from paravt_jax.protocol import parses_strictly
from paravt_jax.records import RolloutGroup, Row, Trajectory
from paravt_jax.rewards import Judge, LlmJudge, RewardRules, open_judge, score
from train.hosts.share import WORK, busiest, by_share, summed

_LOG = logging.getLogger(__name__)
Scored = tuple[Row, Trajectory]
"""A rollout, and the question that it answers."""


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

        def scored(share: Sequence[Scored]) -> list[dict[str, float]]:
            with WORK.doing("rewards", len(share)):
                return rewards_of_all(share, self._rules, self._judge, progress)

        # Each rollout by one host: a judge, or a function of the user's, might tell two hosts
        # different things.
        rollouts = [(group.row, t) for group in groups for t in group.trajectories]
        rewards, rewarded = iter(by_share(rollouts, scored)), []
        for group in groups:
            filled = [dataclasses.replace(t, rewards=next(rewards)) for t in group.trajectories]
            rewarded.append(dataclasses.replace(group, trajectories=tuple(filled)))
        if self._judge is not None:
            self.metrics = self._judge_metrics(self._judge)
        return rewarded

    @staticmethod
    def _judge_metrics(judge: LlmJudge) -> dict[str, float]:
        """Of the judge on all hosts; says why this one got no verdicts."""
        metrics = judge.metrics()
        if failures := int(metrics["judge/failures"]):
            reason = judge.last_failure
            _LOG.warning("%d messages got no verdict, F1 decides; the last: %s", failures, reason)
        seconds = busiest({"judge/seconds": metrics.pop("judge/seconds")})
        return summed(metrics) | seconds


def rewards_of_all(
    rollouts: Sequence[Scored],
    rules: RewardRules,
    judge: Judge | None = None,
    progress: float = 1.0,
) -> list[dict[str, float]]:
    """Rewards of each rollout, term by term; a judge is asked side by side."""

    def scored(rollout: Scored) -> dict[str, float]:
        # A scheme of the user's may return numpy scalars, which no file of JSON takes.
        terms = rewards_of(*rollout, rules, judge, progress)
        return {name: float(value) for name, value in terms.items()}

    if judge is None:
        return list(map(scored, rollouts))
    with ThreadPoolExecutor(rules.judge.concurrency) as threads:
        return list(threads.map(scored, rollouts))


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
