"""Figures of a batch of rollouts, by hand."""

import dataclasses
import random

import pytest

from paravt_jax.records import CallResult, RolloutGroup, Row, ToolCall, VideoRef
from paravt_jax.rewards import RewardRules, reward_terms
from tests.support.trajectories import ANSWER, trajectory
from train.hosts.share import WORK
from train.rl import scoring
from train.rl.scoring import Scorer, complies, rewards_of, rollout_metrics

BODY = '{"name": "crop_video", "arguments": {"start_time": 0, "end_time": 4}}'
CALL = f"<tool_call>\n{BODY}\n</tool_call>"
GOOD = f"<think>\nI look at one part.\n</think>\n{CALL}\n{CALL}<|im_end|>"
UNCLOSED = "<think>\nI saw a red circle.\n<answer>red</answer><|im_end|>"


@pytest.fixture
def groups():
    row = Row("0", VideoRef("v.mp4", 8.0), "What colour?", "red", "oe")
    tool = trajectory(GOOD, ANSWER, calls=2, executed=2)
    direct, unclosed = trajectory(ANSWER), trajectory(UNCLOSED)
    same = RolloutGroup(row, 8, (direct, direct))
    return Scorer(RewardRules())([RolloutGroup(row, 4, (tool, unclosed)), same])


def test_tool_credit_needs_executed_calls(groups):
    (tool, _), (direct, _) = (group.trajectories for group in groups)
    assert tool.rewards["tool"] == pytest.approx(0.6)
    assert direct.rewards["tool"] == 0.0
    assert tool.rewards["total"] == pytest.approx(2.6)


def test_a_call_that_failed_earns_no_tool_credit():
    row = Row("0", VideoRef("v.mp4", 8.0), "What colour?", "red", "oe")
    failed = trajectory(GOOD, ANSWER, calls=2, executed=0)
    (group,) = Scorer(RewardRules())([RolloutGroup(row, 4, (failed,))])
    assert group.trajectories[0].rewards["tool"] == 0.0


def test_the_calls_that_ran_are_judged_not_those_before_them():
    """The tool refused the first of two calls; the second one saw the evidence."""
    turn = "<think>\nBoth ends.\n</think>\n<tool_call>{}</tool_call><|im_end|>"
    made = trajectory(turn, ANSWER, calls=2)
    windows = [{"start_time": 90, "end_time": 99}, {"start_time": 0, "end_time": 8}]
    calls = tuple(ToolCall("crop_video", window) for window in windows)
    results = CallResult("Error: beyond the end", False), CallResult("seen", True)
    first = dataclasses.replace(made.turns[0], calls=calls, results=results)
    made = dataclasses.replace(made, turns=(first, *made.turns[1:]))
    assert first.executed_calls == calls[1:] and made.executed == 1
    row = Row("0", VideoRef("v.mp4", 60.0), "What colour?", "red", "oe", evidence=((0.0, 8.0),))
    other = dataclasses.replace(row, evidence=((52.0, 60.0),))
    seen, missed = (rewards_of(r, made, RewardRules(scheme="longvt"))["tool"] for r in (row, other))
    assert seen > 0.9 > missed


def test_figures_by_hand(groups):
    metrics = rollout_metrics(groups)
    assert metrics["reward/accuracy"] == 1.0
    assert metrics["format/compliance"] == 0.75
    assert metrics["tool/calls_per_rollout"] == 0.5
    assert metrics["tool/rollouts_with_call"] == 0.25
    assert metrics["tool/calls_per_using_rollout"] == 2.0
    assert metrics["tool/parallel_max"] == 2.0
    assert metrics["tool/success_rate"] == 1.0
    assert metrics["frames/budget_mean"] == 6.0
    assert metrics["group/zero_std"] == 0.5
    assert metrics["length/generated"] == 3.0


def test_compliance_asks_every_turn():
    assert complies(trajectory(GOOD, ANSWER))
    assert not complies(trajectory(GOOD, UNCLOSED))
    assert not complies(trajectory(GOOD.replace('"name"', "name"), ANSWER))


def test_a_turn_that_plays_several_is_one_turn():
    """Calls, then a second thought and an answer in one breath: nothing was executed."""
    pretended = trajectory(GOOD.removesuffix("<|im_end|>") + ANSWER)
    assert not complies(pretended)
    row = Row("0", VideoRef("v.mp4", 8.0), "What colour?", "red", "oe")
    (group,) = Scorer(RewardRules())([RolloutGroup(row, 4, (pretended,))])
    assert group.trajectories[0].rewards["format"] < 0.9
    assert group.trajectories[0].rewards["tool"] == 0.0


@reward_terms(luck=(0, 1))
def lucky(attempt):
    return {"luck": random.random()}


def test_a_host_scores_its_own_rollouts_and_takes_the_word_of_others(groups, monkeypatch):
    def first_alone(items, work):
        own = work(items[:1])
        return own + [own[0] | {"luck": 0.5}] * (len(items) - 1)

    monkeypatch.setattr(scoring, "by_share", first_alone)
    WORK.take()
    scored = Scorer(RewardRules(scheme=lucky))(groups)
    lucks = [t.rewards["luck"] for group in scored for t in group.trajectories]
    assert lucks[0] != 0.5 and set(lucks[1:]) == {0.5}
    assert WORK.take()["hosts/rewards"] == 1
