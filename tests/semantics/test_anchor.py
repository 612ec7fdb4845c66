"""The three readings of the anchor: each pulls where it should, and nowhere else."""

import dataclasses

import jax
import numpy as np
import pytest

from paravt_jax.objectives import policy_loss
from paravt_jax.rewards import RewardRules, score
from tests.scripted_rollouts import RENDERER, Learnable, configured, group, learner, rollout
from train.scoring import score_groups

THOUGHT = "I look at all of it."
CLOSED = f"{THOUGHT}</think><answer>red</answer><|im_end|>"
UNCLOSED = f"{THOUGHT}<answer>red</answer><|im_end|>"
PREFIX = "<think>"


def trained(*settings, texts=(CLOSED, UNCLOSED), prefix=PREFIX, **options):
    """The learner's batch of one group, and the gradient of its loss by log-probability."""
    config = configured("objective.kl_weight=0", *settings)
    groups = score_groups(
        [group(*(rollout(text, prefix=prefix, **options) for text in texts))], config.rewards
    )
    teacher = learner(config)
    batch = teacher.with_advantages(groups, teacher.batch(Learnable().init(), groups))

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
    return batch, np.asarray(slope), groups[0].trajectories, teacher


def generated_text(batch, row, where):
    """What stands at the chosen tokens of a row."""
    return RENDERER.decode(np.asarray(batch.tokens)[row][np.asarray(where)].tolist())


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
    batch, slope, _, _ = trained("objective.anchor=position", "rewards.anchor_weight=0.5")
    generated, tags = np.asarray(batch.loss_weights) > 0, np.asarray(batch.structural)
    assert generated_text(batch, 0, tags[0]) == "</think><answer></answer>"
    assert generated_text(batch, 1, tags[1]) == "<answer></answer>"
    count, unit = generated.sum(), 0.5**0.5
    np.testing.assert_allclose(slope[0][generated[0] & ~tags[0]], -unit / count, rtol=1e-3)
    np.testing.assert_allclose(slope[0][tags[0]], -1.5 * unit / count, rtol=1e-3)
    np.testing.assert_allclose(slope[1][tags[1]], 1.5 * unit / count, rtol=1e-3)


def test_position_moves_tags_alone_where_only_the_anchor_differs():
    """Equal task rewards, unequal anchors: all of the gradient is at the tags."""
    both = rollout(CLOSED, prefix=PREFIX), rollout(UNCLOSED, prefix=PREFIX)
    config = configured("objective.anchor=position", "objective.kl_weight=0")
    scored = score_groups([group(*both)], config.rewards)[0]
    same = scored.trajectories[0].rewards["task"]
    even = [
        dataclasses.replace(t, rewards={**t.rewards, "task": same}) for t in scored.trajectories
    ]
    groups, teacher = [group(*even)], learner(config)
    batch = teacher.with_advantages(groups, teacher.batch(Learnable().init(), groups))
    moved = np.asarray(batch.advantages) != 0
    np.testing.assert_array_equal(moved, batch.structural)
    assert moved.any(axis=1).all()


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
    batch, _, _, teacher = trained(f"objective.anchor={reading}", *weights, texts=texts)
    tags = np.asarray(batch.structural)
    # The forced `<think>` opens what the first rollout closes; the second closes nothing.
    assert generated_text(batch, 0, tags[0]) == "</think><answer></answer>"
    assert not tags[1].any()
    # `<think> </think> <answer> </answer>`, then `<think>` in vain; what it holds is spoken of.
    assert teacher.figures["format/tag_validity"] == pytest.approx(4 / 6)


def test_tags_of_a_tool_response_are_no_structure():
    response = "so </think><answer>red</answer>"
    batch, _, _, _ = trained(
        texts=("a</think><tool_call>{}</tool_call><|im_end|>", CLOSED), responses=(response,)
    )
    assert generated_text(batch, 0, np.asarray(batch.structural)[0]) == "</think></tool_call>"


def test_a_forced_prefix_is_scored_and_not_trained():
    forced = trained(prefix=PREFIX)
    spelled = trained(prefix="", texts=(PREFIX + CLOSED, PREFIX + UNCLOSED))
    missing = trained(prefix="")
    assert forced[2][0].rewards == spelled[2][0].rewards != missing[2][0].rewards
    row = np.asarray(forced[0].loss_weights)[0] > 0
    assert PREFIX not in generated_text(forced[0], 0, row)
    assert forced[3].figures == spelled[3].figures != missing[3].figures


def test_answer_suffix_credits_a_final_answer():
    """A bare answer: 0.5 for it and 0.1 for balance of 1.45 that a perfect turn earns; without the
    credit 0.3 and 0.1 of 1.35 (anchor weight 0.5 of at most 0.7)."""
    answer = "<answer>red</answer>"
    for suffix, expected in ((True, 0.6 / 1.45), (False, 0.4 / 1.35)):
        rules = RewardRules(answer_suffix=suffix)
        assert score(answer, "red", rules=rules).format == pytest.approx(expected)
