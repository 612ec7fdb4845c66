"""Advantages: hand values, invariances, and the cases in which nothing can be learned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paravt_jax.advantages import (
    AdvantageConfig,
    anchored_advantages,
    group_advantages,
    rollout_advantages,
    shape_rewards,
    token_advantages,
    whiten,
)

rewards_P_G = hnp.arrays(np.float64, (3, 4), elements=st.integers(-40, 40).map(lambda n: n / 8))


def test_hand_values():
    result = group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]]), eps=0.0)
    root = np.sqrt(1 / 3)
    np.testing.assert_allclose(result, [[0.5 / root, -0.5 / root, -0.5 / root, 0.5 / root]])


def test_leave_one_out_hand_values():
    result = group_advantages(np.array([[3.0, 0.0, 0.0]]), leave_one_out=True, scale_by_std=False)
    np.testing.assert_allclose(result, [[3.0, -1.5, -1.5]])


def test_batch_normalisation_forgets_the_groups():
    rewards = np.array([[1.0, 2.0], [3.0, 4.0]])
    one_group = group_advantages(rewards.reshape(1, 4)).reshape(2, 2)
    np.testing.assert_allclose(group_advantages(rewards, normalise="batch"), one_group)
    np.testing.assert_array_equal(group_advantages(rewards, normalise="none"), rewards)


@pytest.mark.parametrize("value", [0.0, 0.1, 2.6, 1e-300, 1e300])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_teach_exactly_nothing(value, leave_one_out):
    """0.1 added seven times and divided by seven is not 0.1; eps would blow the rest up."""
    result = group_advantages(np.full((2, 7), value), leave_one_out=leave_one_out)
    assert (result == 0).all()


def test_a_lone_rollout_has_no_advantage():
    assert group_advantages(np.array([[5.0]])) == 0


@settings(deadline=None)
@given(rewards=rewards_P_G, shift=st.integers(-5, 5), scale=st.integers(1, 8))
def test_invariant_to_shift_and_scale(rewards, shift, scale):
    plain = group_advantages(rewards, eps=1e-12)
    moved = group_advantages(rewards * scale + shift, eps=1e-12)
    np.testing.assert_allclose(moved, plain, atol=1e-6)


@settings(deadline=None)
@given(rewards=rewards_P_G)
def test_each_group_sums_to_zero_and_order_is_kept(rewards):
    result = group_advantages(rewards)
    np.testing.assert_allclose(result.sum(axis=1), 0, atol=1e-9)
    order = np.argsort(rewards, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(result, order, axis=1), axis=1) >= 0).all()
    assert np.abs(result).max() <= 3  # (g - 1) / sqrt(g) for g = 4 is 1.5


def test_the_released_shaping_saturates_and_the_default_does_not():
    high = np.array([[2.2, 2.6]])
    np.testing.assert_allclose(shape_rewards(high, scale=10, bias=-0.2, clip=20), [[20.0, 20.0]])
    np.testing.assert_array_equal(shape_rewards(high), high)


def test_settings_reach_the_result():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 2.0, 9.0]])
    seen = set()
    for config in (
        AdvantageConfig(),
        AdvantageConfig(normalise="batch"),
        AdvantageConfig(normalise="none"),
        AdvantageConfig(scale_by_std=False),
        AdvantageConfig(leave_one_out=True),
        AdvantageConfig(ddof=0),
        AdvantageConfig(eps=0.5),
        AdvantageConfig(reward_scale=10, eps=0.5),
        AdvantageConfig(reward_bias=-0.2, normalise="none"),
        AdvantageConfig(reward_clip=2.0),
    ):
        seen.add(rollout_advantages(rewards, config).tobytes())
    assert len(seen) == 10


@pytest.mark.parametrize(
    "settings_",
    [
        *({"normalise": "rows"}, {"ddof": 2}, {"eps": 0.0}, {"reward_clip": -1.0}),
        {"leave_one_out": True, "normalise": "none"},
    ],
)
def test_settings_without_meaning_are_refused(settings_):
    with pytest.raises(ValueError, match=next(iter(settings_))):
        AdvantageConfig(**settings_)


def test_rewards_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        group_advantages(np.array([[1.0, np.nan]]))


# --- Tokens ---------------------------------------------------------------------------------------

MASK = np.array([[0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
REWARDS = np.array([2.0, -1.0, 7.0], np.float32)


def test_without_kl_every_generated_token_gets_the_reward():
    result = token_advantages(REWARDS, MASK, whiten_tokens=False)
    np.testing.assert_allclose(result, MASK * REWARDS[:, None])


def test_decay_runs_over_generated_tokens_only():
    result = token_advantages(REWARDS, MASK, discount=0.5, gae_lambda=0.5, whiten_tokens=False)
    np.testing.assert_allclose(result[0], [0, 2 / 16, 2 / 4, 0, 2, 0])


def test_a_reward_on_a_token_that_was_not_generated_is_lost_only_as_in_the_release():
    """R6: a rollout that ends on a tool response."""
    lengths = np.array([6, 6, 6])
    assert not token_advantages(REWARDS, MASK, lengths=lengths, whiten_tokens=False).any()
    assert token_advantages(REWARDS, MASK, whiten_tokens=False).any()


def test_kl_is_charged_to_the_past():
    policy = np.full(MASK.shape, -1.0, np.float32)
    reference = policy.copy()
    reference[0, 2] = -3.0
    result = token_advantages(REWARDS, MASK, policy, reference, kl_weight=0.1, whiten_tokens=False)
    np.testing.assert_allclose(result[0], [0, 1.8, 1.8, 0, 2, 0], rtol=1e-6)


def test_kl_without_its_log_probs_is_refused():
    with pytest.raises(ValueError, match=r"kl_weight=0\.1"):
        token_advantages(REWARDS, MASK, kl_weight=0.1)


def test_whitening_is_over_tokens():
    values = np.random.default_rng(0).normal(3, 5, MASK.shape).astype(np.float32)
    result = np.asarray(whiten(values, MASK))
    inside = result[MASK > 0]
    assert inside.mean() == pytest.approx(0, abs=1e-6)
    assert inside.std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert not result[MASK == 0].any()


@pytest.mark.parametrize("mask", [MASK * 0, MASK * 0 + np.eye(3, 6, dtype=int) * [[1], [0], [0]]])
def test_no_token_or_one_token_stays_finite(mask):
    assert np.isfinite(token_advantages(REWARDS, mask)).all()


def test_padding_changes_nothing():
    wide = np.pad(MASK, [(0, 0), (0, 5)])
    np.testing.assert_allclose(
        token_advantages(REWARDS, wide)[:, :6], token_advantages(REWARDS, MASK), rtol=1e-6
    )


def test_anchor_acts_on_structural_generated_tokens_only():
    structural = np.array([[1, 0, 1, 1, 0, 0]] * 3, bool)
    result = anchored_advantages(
        REWARDS, np.array([1.0, -2.0, 3.0], np.float32), structural, MASK, weight=0.5
    )
    np.testing.assert_allclose(result[0], [0, 2, 2.5, 0, 2, 0])
    np.testing.assert_allclose(result[1], [0, -1, 0, 0, 0, 0])
    np.testing.assert_allclose(result[2], 0)
