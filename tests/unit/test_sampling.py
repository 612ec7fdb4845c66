"""Dynamic sampling and the punishment of long rollouts, with groups made by hand."""

import dataclasses

import numpy as np
import pytest

from paravt_jax.records import (
    RolloutGroup,
    Row,
    StopReason,
    ToolCall,
    Turn,
    VideoRef,
)
from tests.support.trajectories import NONE, rewarded
from train.batch import streams_of_groups
from train.methods.dynamic_sampling import DynamicSampling
from train.methods.length_penalty import LengthPenalty
from train.rl.loop import RolloutBatch
from train.rl.scoring import rollout_metrics
from train.rl.settings import RlSettings


def group(name, totals, accuracies=(0.0, 0.0)):
    row = Row(name, VideoRef("v.mp4", 8.0), "What?", "red", "oe")
    return RolloutGroup(row, 4, tuple(map(rewarded, totals, accuracies)))


FLAT, SPREAD = (1.0, 1.0), (0.0, 1.0)
BATCHES = [
    [group("a", FLAT), group("b", SPREAD), group("c", FLAT)],
    [group("d", FLAT), group("e", FLAT), group("f", SPREAD)],
    [group("g", SPREAD), group("h", SPREAD), group("i", FLAT)],
]


class Source:
    """Batches in their order."""

    def __init__(self, batches):
        self.batches, self.asked = batches, []

    def draw(self, params, step, number=0):
        self.asked.append((params, step, number))
        return RolloutBatch(self.batches[number], self.batches[number])


def draw(batches, **settings):
    settings = {"filter_groups": "total", **settings}
    own = RlSettings(prompts_per_step=len(batches[0]), **settings)
    drawn = DynamicSampling(Source(batches), own).draw({}, 0)
    return drawn, "".join(g.row.row_id for g in drawn.groups)


def test_a_batch_that_teaches_is_drawn_once():
    drawn, names = draw([BATCHES[2][:2], BATCHES[0][:2]])
    assert names == "gh" and drawn.metrics() == {"group/redraws": 0.0, "group/kept": 1.0}


def test_flat_groups_are_replaced_and_what_is_over_is_left():
    drawn, names = draw(BATCHES)
    assert names == "bfg"
    assert "".join(g.row.row_id for g in drawn.drawn) == "abcdefghi"
    assert drawn.metrics() == {"group/redraws": 2.0, "group/kept": pytest.approx(1 / 3)}


def test_the_limit_ends_the_search_and_flat_groups_fill_up():
    drawn, names = draw(BATCHES, filter_redraws=1)
    assert names == "abf" and drawn.metrics()["group/redraws"] == 1


def test_further_batches_are_drawn_from_the_same_source_and_policy():
    source = Source(BATCHES)
    DynamicSampling(source, RlSettings(prompts_per_step=3, filter_groups="total")).draw({}, 5)
    assert source.asked == [({}, 5, number) for number in range(3)]


def test_the_reward_that_must_differ_is_a_choice():
    """Total rewards differ, but every rollout is right: nothing to learn for `accuracy`."""
    batches = [[group("a", SPREAD, (1.0, 1.0))], [group("b", FLAT, (0.0, 1.0))]]
    assert [draw(batches, filter_groups=term)[1] for term in ("total", "accuracy")] == ["a", "b"]


def test_long_rollouts_are_punished_by_a_term_of_their_own():
    """Limit 100, margin 20, weight 2: 80 tokens are free, 90 cost 1, 300 cost 2."""
    row = BATCHES[0][0].row
    lengths = RolloutGroup(row, 4, tuple(rewarded(1.5, length=n) for n in (80, 90, 300)))
    sample = LengthPenalty(lambda *_: [lengths], weight=2.0, limit=100, margin=20)
    (punished,) = sample({}, [], 3, 0, 0)
    rewards = [t.rewards for t in punished.trajectories]
    assert [r["length"] for r in rewards] == [0.0, -1.0, -2.0]
    assert [r["total"] for r in rewards] == [1.5, 0.5, -0.5]
    assert [r["task"] for r in rewards] == [0.5, -0.5, -1.5]
    assert rollout_metrics([punished])["reward/length"] == -1.0
    assert "reward/length" not in rollout_metrics([lengths])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"prompts_per_step": 8, "minibatches": 2, "micro_groups": 3}, "choose divisors"),
        ({"overlong_limit": 100}, "overlong_margin=none"),
        ({"overlong_margin": 100}, "overlong_limit=none"),
        ({"overlong_limit": 100, "overlong_margin": 101}, "overlong_margin=101: give a limit"),
    ],
)
def test_settings_without_meaning_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(RlSettings(), **settings)


def over_turn(own):
    """The same rollout, but its last turn still calls."""
    turn = Turn(NONE, NONE, np.zeros(0, np.float32), StopReason.END, calls=(ToolCall("x", {}),))
    return dataclasses.replace(own, turns=(turn,))


def test_a_rollout_that_calls_to_the_end_teaches_nothing():
    """Neither by itself nor by telling a group from a flat one."""
    spoiled = group("a", (0.0, 1.0, 1.0), (0.0,) * 3)
    first, *others = spoiled.trajectories
    spoiled = dataclasses.replace(spoiled, trajectories=(over_turn(first), *others))
    batches = [[spoiled], [group("b", SPREAD)]]
    names = [draw(batches, mask_over_turn=mask)[1] for mask in (False, True)]
    assert names == ["a", "b"]
    talkative = dataclasses.replace(
        spoiled,
        trajectories=(over_turn(rewarded(0.0, length=3)), rewarded(1.0, length=3)),
    )
    for mask, learned in ((False, [3, 3]), (True, [0, 3])):
        streams = streams_of_groups([talkative], mask)
        assert [stream.loss_weights.sum() for stream in streams] == learned
