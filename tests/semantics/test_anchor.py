"""The three readings of the anchor: each pulls where it should, and nowhere else."""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from paravt_jax.objectives import policy_loss
from paravt_jax.rewards import RewardRules, score
from paravt_jax.structure import ANCHOR_TAGS
from tests.support.scripted_rollouts import (
    RENDERER,
    Learnable,
    as_state,
    configured,
    group,
    learner,
    rollout,
)
from train.batch import streams_of_groups, turn_numbers
from train.rl.scoring import Scorer

pytestmark = pytest.mark.slow
THOUGHT = "I look at all of it."
CLOSED = f"{THOUGHT}</think><answer>red</answer><|im_end|>"
UNCLOSED = f"{THOUGHT}<answer>red</answer><|im_end|>"
PREFIX = "<think>"


def trained(*settings, texts=(CLOSED, UNCLOSED), prefix=PREFIX, **options):
    """The learner's batch of one group, the gradient of its loss by log-probability, the rollouts
    and what the learner says of them."""
    config = configured("objective.kl_weight=0", *settings)
    groups = Scorer(config.rewards)(
        [group(*(rollout(text, prefix=prefix, **options) for text in texts))]
    )
    batch, metrics = learner(config).prepare(as_state(Learnable().init()), groups)

    def mean_loss(log_probs):
        total, count, _ = policy_loss(
            log_probs,
            batch.behaviour_log_probs,
            batch.behaviour_log_probs,
            batch.advantages,
            batch.loss_weights,
            config.objective,
            structure=batch.structural,
        )
        return total / count

    slope = jax.grad(mean_loss)(batch.behaviour_log_probs)
    return batch, np.asarray(slope), groups[0].trajectories, metrics


def generated_text(batch, row, where):
    """What stands at the chosen tokens of a row."""
    return RENDERER.decode(np.asarray(batch.own_tokens)[row][np.asarray(where)].tolist())


def test_sequence_spreads_the_anchor_over_all_generated_tokens():
    batch, slope, (closed, unclosed), _ = trained("objective.anchor=sequence")
    generated = np.asarray(batch.loss_weights) > 0
    assert generated_text(batch, 0, generated[0]) == CLOSED
    # Two rollouts: (r - mean) / (std + eps) is 1 / sqrt(2) for the better one.
    assert closed.rewards["total"] > unclosed.rewards["total"]
    count = generated.sum()
    np.testing.assert_allclose(slope[0][generated[0]], -(0.5**0.5) / count, rtol=1e-3)
    np.testing.assert_allclose(slope[1][generated[1]], 0.5**0.5 / count, rtol=1e-3)
    assert not slope[~generated].any()


def test_position_adds_the_anchor_at_tags_only():
    """Where `</think>` is missing, the tag in its place pays for it, and no other."""
    batch, slope, _, _ = trained("objective.anchor=position", "rewards.anchor_weight=0.5")
    generated, tags = np.asarray(batch.loss_weights) > 0, np.asarray(batch.structural)
    assert generated_text(batch, 0, tags[0]) == "</think><answer></answer>"
    assert generated_text(batch, 1, tags[1]) == "<answer></answer>"
    count, unit = generated.sum(), 0.5**0.5
    np.testing.assert_allclose(slope[0][generated[0] & ~tags[0]], -unit / count, rtol=1e-3)
    np.testing.assert_allclose(slope[0][tags[0]], -1.5 * unit / count, rtol=1e-3)
    opening, closing = slope[1][tags[1]][:8], slope[1][tags[1]][8:]
    np.testing.assert_allclose(opening, 1.5 * unit / count, rtol=1e-3)
    np.testing.assert_allclose(closing, unit / count, rtol=1e-3)


def test_position_moves_tags_alone_where_only_the_anchor_differs():
    """Equal task rewards, unequal anchors: all of the gradient is at the tags."""
    both = rollout(CLOSED, prefix=PREFIX), rollout(UNCLOSED, prefix=PREFIX)
    config = configured("objective.anchor=position", "objective.kl_weight=0")
    scored = Scorer(config.rewards)([group(*both)])[0]
    same = scored.trajectories[0].rewards["task"]
    even = [
        dataclasses.replace(t, rewards={**t.rewards, "task": same}) for t in scored.trajectories
    ]
    batch, _ = learner(config).prepare(as_state(Learnable().init()), [group(*even)])
    moved = np.asarray(batch.advantages) != 0
    assert generated_text(batch, 0, moved[0]) == "</think><answer></answer>"
    assert generated_text(batch, 1, moved[1]) == "<answer>"


def test_logprob_raises_the_likelihood_of_tags_whatever_the_reward():
    weights = "rewards.anchor_weight=0", "objective.anchor_weight=0.3"
    batch, slope, _, _ = trained("objective.anchor=logprob", *weights, texts=(CLOSED, CLOSED))
    generated, tags = np.asarray(batch.loss_weights) > 0, np.asarray(batch.structural)
    np.testing.assert_allclose(slope[tags], -0.3 / generated.sum(), rtol=1e-5)
    assert tags.any() and not slope[~tags].any()


@pytest.mark.parametrize("reading", ["position", "logprob"])
def test_only_paired_tags_on_request(reading):
    weights = ["objective.anchor_paired_only=true"]
    if reading == "logprob":
        weights += ["rewards.anchor_weight=0", "objective.anchor_weight=0.3"]
    texts = CLOSED, f"{THOUGHT}<answer>red<|im_end|>"
    batch, _, _, metrics = trained(f"objective.anchor={reading}", *weights, texts=texts)
    tags = np.asarray(batch.structural)
    # The forced `<think>` opens what the first rollout closes; the second closes nothing.
    assert generated_text(batch, 0, tags[0]) == "</think><answer></answer>"
    assert not tags[1].any()
    # `<think> </think> <answer> </answer>`, then `<think>` in vain; what it holds is spoken of.
    assert metrics["format/tag_validity"] == pytest.approx(4 / 6)


def test_tags_of_a_tool_response_are_no_structure():
    response = "so </think><answer>red</answer>"
    batch, _, _, _ = trained(
        texts=("a</think><tool_call>{}</tool_call><|im_end|>", CLOSED), responses=(response,)
    )
    tags = generated_text(batch, 0, np.asarray(batch.structural)[0])
    assert tags == "</think><tool_call></tool_call>"


def test_a_forced_prefix_is_scored_and_not_trained():
    forced = trained(prefix=PREFIX)
    spelled = trained(prefix="", texts=(PREFIX + CLOSED, PREFIX + UNCLOSED))
    missing = trained(prefix="")
    assert forced[2][0].rewards == spelled[2][0].rewards != missing[2][0].rewards
    row = np.asarray(forced[0].loss_weights)[0] > 0
    assert PREFIX not in generated_text(forced[0], 0, row)
    assert forced[3] == spelled[3] != missing[3]


def test_answer_suffix_credits_a_final_answer():
    """A bare answer: 0.5 for it and 0.1 for balance of 1.45 that a perfect turn earns; without the
    credit 0.3 and 0.1 of 1.35 (anchor weight 0.5 of at most 0.7)."""
    answer = "<answer>red</answer>"
    for suffix, expected in ((True, 0.6 / 1.45), (False, 0.4 / 1.35)):
        rules = RewardRules(answer_suffix=suffix)
        assert score(answer, "red", rules=rules).format == pytest.approx(expected)


# --- Turn by turn ---------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "crop_video", "arguments": {}}</tool_call>'
TURNS = {
    "calls": f"{THOUGHT}</think>{CALL}{CALL}",
    "calls, thought open": f"{THOUGHT}{CALL}{CALL}",
    "calls, no JSON": f"{THOUGHT}</think><tool_call>{{</tool_call>{CALL}",
    "calls, one open": f"{THOUGHT}</think>{CALL}<tool_call>{{",
    "answers": f"{THOUGHT}</think><answer>red</answer>",
    "answers, thought open": f"{THOUGHT}<answer>red</answer>",
    "answers, answer open": f"{THOUGHT}</think><answer>red",
    "answers in vain": f"{THOUGHT}</think>red</answer>",
    "answers within a call": f"{THOUGHT}</think><tool_call><answer>red</answer>",
    "answers, no thought": "</think><answer>red</answer>",
    "thinks on": THOUGHT,
}
TAG = re.compile("|".join(ANCHOR_TAGS))
HALF = 0.5**0.5
"""(r - mean) / std of the better one of two."""


def credits_of(*groups, settings=()):
    """What the anchor is to the tags of rollouts, given as names of their turns: for each group,
    rollout and turn, `(tag, credit)` in order. No other token gets any."""
    config = configured("objective.anchor=position", *settings)
    made = Scorer(config.rewards)(
        [
            group(
                *(
                    rollout(
                        *(f"{TURNS[name]}<|im_end|>" for name in names),
                        prefix=PREFIX,
                        responses=("seen",) * (len(names) - 1),
                    )
                    for names in rollouts
                )
            )
            for rollouts in groups
        ]
    )
    own = learner(config)
    batch = own.batches.shared(streams_of_groups(made), len(groups[0]))
    credit = np.asarray(own.advantages.anchor.credit(made, batch))
    numbers = turn_numbers(made, batch.loss_weights.shape[1])
    rows = iter(zip(np.asarray(batch.own_tokens), numbers, credit, strict=True))
    return [[by_turn(*next(rows), len(names)) for names in rollouts] for rollouts in groups]


def by_turn(tokens, numbers, credit, count):
    """`(tag, credit)` of each turn of a row; every character of a tag has the same."""
    turns, untouched = [], credit.copy()
    for number in range(1, count + 1):
        place = np.flatnonzero(numbers == number)
        # All characters of a turn are tokens; its end is one as a whole.
        text = RENDERER.decode(tokens[place[:-1]].tolist())
        assert len(text) == len(place) - 1
        own = [(m.group(), credit[place[m.start() : m.end()]]) for m in TAG.finditer(text)]
        for match in TAG.finditer(text):
            untouched[place[match.start() : match.end()]] = 0
        turns.append([(tag, float(values[0])) for tag, values in own])
        assert all(np.ptp(values) == 0 for _, values in own)
    assert not untouched.any()
    return turns


def credits_in_one_turn(better, worse, settings=()):
    """Credits of two rollouts of one turn."""
    ((first,), (second,)) = credits_of([[better], [worse]], settings=settings)[0]
    return [round(c / HALF, 2) for _, c in first], [round(c / HALF, 2) for _, c in second]


@pytest.mark.parametrize(
    ("worse", "praised", "blamed"),
    [
        # The tag in the place of `</think>` pays, `</answer>`, which was right, does not.
        ("answers, thought open", [1, 1, 1], [-1, 0]),
        # What is not there cannot pay, and what is there does not pay for it.
        ("answers, answer open", [0, 1, 1], [0, 0]),
        ("thinks on", [1, 1, 1], []),
        # A tag that closes nothing, and one where another should have been closed.
        ("answers in vain", [0, 1, 1], [0, -1]),
        # A well-formed block counts for nothing where the turn does not do what it should.
        ("answers, no thought", [1, 1, 1], [0, 0, 0]),
    ],
)
def test_each_tag_gets_what_is_about_it(worse, praised, blamed):
    assert credits_in_one_turn("answers", worse) == (praised, blamed)


def test_a_tag_within_an_open_call_pays_and_the_call_does_not():
    good, bad = credits_of([["calls", "answers"], ["answers within a call", "answers"]])[0]
    own = [("</think>", 0), ("<tool_call>", 0), ("<answer>", pytest.approx(-HALF, rel=1e-3))]
    assert bad[0] == [*own, ("</answer>", 0)]
    assert all(credit >= 0 for _, credit in good[0])


def test_a_broken_turn_costs_no_other_turn():
    """The faults of an anchor that is averaged over turns: good tags of the second turn paid for
    the first one, and `</tool_call>` for a missing `</think>`."""
    good, broken = credits_of([["calls", "answers"], ["calls, thought open", "answers"]])[0]
    tags = ("</think>", *("<tool_call>", "</tool_call>") * 2)
    assert good[0] == [(tag, pytest.approx(HALF, rel=1e-3)) for tag in tags]
    assert broken[0] == [(tags[1], pytest.approx(-HALF, rel=1e-3)), *((tag, 0) for tag in tags[2:])]
    assert good[1] == broken[1] == [(tag, 0) for tag in ("</think>", "<answer>", "</answer>")]


def test_calls_that_cannot_be_read_cost_no_tag():
    """Their JSON is content. The task reward has what it costs."""
    for name in ("calls, no JSON", "calls, one open"):
        good, bad = credits_of([["calls", "answers"], [name, "answers"]])[0]
        assert [c for _, c in good[0][1:]] == [pytest.approx(HALF, rel=1e-3)] * 4
        assert not any(c for _, c in bad[0])


def test_blame_is_left_out_where_only_pairs_count():
    only = ("objective.anchor_paired_only=true",)
    assert credits_in_one_turn("answers", "answers, thought open", only) == ([1, 1, 1], [0, 0])


def test_a_turn_that_no_other_rollout_has_gets_nothing():
    two, one = credits_of([["calls", "answers"], ["answers, thought open"]])[0]
    assert not any(c for _, c in two[1])
    assert two[0][0][1] > 0 > one[0][0][1]


WRONG = {
    "calls, thought open": ("<tool_call>",),
    "answers, thought open": ("<answer>",),
    "answers in vain": ("</answer>",),
    "answers within a call": ("<answer>",),
}
"""The one tag of a turn that cannot stand where it stands; all tags of other turns can."""


def random_groups(dice, count):
    """Groups of four rollouts of up to three turns, most of them good."""

    def turns():
        length = dice.integers(1, 4)
        good = ["calls"] * (length - 1) + ["answers"]
        return [t if dice.random() < 0.6 else dice.choice(list(TURNS)) for t in good]

    return [[turns() for _ in range(4)] for _ in range(count)]


def test_right_tags_never_pay_and_no_turn_pays_for_another():
    """In random groups: no tag gets less than 0 but the one that is wrong itself, and no tag of a
    turn gets less because another turn of its rollout broke."""
    dice = np.random.default_rng(0)
    groups = random_groups(dice, 60)
    broken = [[list(names) for names in rollouts] for rollouts in groups]
    for rollouts in broken:
        first = rollouts[0]
        first[dice.integers(len(first))] = dice.choice(list(TURNS))
    found = credits_of(*groups, *broken)
    blamed = 0
    for rollouts, credits in zip([*groups, *broken], found, strict=True):
        names, turns = itertools.chain(*rollouts), itertools.chain(*credits)
        for name, turn in zip(names, turns, strict=True):
            paying = [tag for tag, credit in turn if credit < 0]
            assert not paying or tuple(paying) == WRONG.get(name), (name, turn)
            blamed += len(paying)
    assert blamed > 50
    kept = 0
    for names, others, before, after in zip(groups, broken, found[:60], found[60:], strict=True):
        for turn in np.flatnonzero(np.array(names[0]) == np.array(others[0])):
            assert before[0][turn] == after[0][turn]
            kept += names != others
    assert kept > 30
