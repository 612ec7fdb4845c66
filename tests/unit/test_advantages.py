"""Advantages: hand values, invariances, and the cases in which nothing can be learned."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paravt_jax.advantages import (
    AdvantageConfig,
    anchored_advantages,
    annealed,
    difficulty_weights,
    group_advantages,
    has_reward_variance,
    kl_to_go,
    overlong_penalty,
    reweighted_advantages,
    rollout_advantages,
    shape_rewards,
    turn_advantages,
    whiten,
)

RLOO = AdvantageConfig(leave_one_out=True, scale_by_std=False)
rewards_P_G = hnp.arrays(np.float64, (3, 4), elements=st.integers(-40, 40).map(lambda n: n / 8))


def test_hand_values():
    result = group_advantages(np.array([[1.0, 0.0, 0.0, 1.0]]), AdvantageConfig(eps=1e-12))
    root = np.sqrt(1 / 3)
    np.testing.assert_allclose(result, [[0.5 / root, -0.5 / root, -0.5 / root, 0.5 / root]])


def test_leave_one_out_hand_values():
    result = group_advantages(np.array([[3.0, 0.0, 0.0]]), RLOO)
    np.testing.assert_allclose(result, [[3.0, -1.5, -1.5]])


def test_batch_normalisation_forgets_the_groups():
    rewards = np.array([[1.0, 2.0], [3.0, 4.0]])
    one_group = group_advantages(rewards.reshape(1, 4)).reshape(2, 2)
    np.testing.assert_allclose(
        group_advantages(rewards, AdvantageConfig(normalise="batch")), one_group
    )
    np.testing.assert_array_equal(
        group_advantages(rewards, AdvantageConfig(normalise="none")), rewards
    )


@pytest.mark.parametrize("value", [0.0, 0.1, 2.6, 1e-300, 1e300])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equal_rewards_teach_exactly_nothing(value, leave_one_out):
    """0.1 added seven times and divided by seven is not 0.1; eps would blow the rest up."""
    result = group_advantages(np.full((2, 7), value), AdvantageConfig(leave_one_out=leave_one_out))
    assert (result == 0).all()


def test_a_lone_rollout_has_no_advantage():
    assert group_advantages(np.array([[5.0]])) == 0


@settings(deadline=None)
@given(rewards=rewards_P_G, shift=st.integers(-5, 5), scale=st.integers(1, 8))
def test_invariant_to_shift_and_scale(rewards, shift, scale):
    exact = AdvantageConfig(eps=1e-12)
    plain = group_advantages(rewards, exact)
    moved = group_advantages(rewards * scale + shift, exact)
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
    released = AdvantageConfig(reward_scale=10, reward_bias=-0.2, reward_clip=20)
    np.testing.assert_allclose(shape_rewards(high, released), [[20.0, 20.0]])
    np.testing.assert_array_equal(shape_rewards(high, AdvantageConfig()), high)


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
        AdvantageConfig(difficulty_weighted=True),
    ):
        seen.add(rollout_advantages(rewards, config).tobytes())
    assert len(seen) == 11


# --- Groups: VITAL, RLOO, DAPO --------------------------------------------------------------------


def test_difficulty_weights_by_hand():
    """Mean 0.5 and 1: full weight. 1.5: 3/4. 2 and above: half."""
    means = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 2.0], [2.0, 2.0], [2.5, 3.0]])
    np.testing.assert_allclose(difficulty_weights(means)[:, 0], [1.0, 1.0, 0.75, 0.5, 0.5])


def test_difficulty_weighs_advantages_and_would_cancel_on_rewards():
    """VITAL: the paper's form, R * w before the normalisation, changes nothing at all."""
    rewards = np.array([[1.0, 2.0, 3.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    plain, config = AdvantageConfig(eps=1e-12), AdvantageConfig(eps=1e-12, difficulty_weighted=True)
    weights = difficulty_weights(rewards)
    assert weights[0] < 1 == weights[1]
    on_rewards = rollout_advantages(rewards * weights, plain)
    np.testing.assert_allclose(on_rewards, rollout_advantages(rewards, plain), rtol=1e-9)
    on_advantages = rollout_advantages(rewards, config)
    np.testing.assert_allclose(on_advantages, weights * rollout_advantages(rewards, plain))


def test_difficulty_may_be_told_by_another_reward():
    """A term of the reward is weighed by how hard the group is as a whole."""
    config, term = AdvantageConfig(difficulty_weighted=True), np.array([[0.0, 0.3]])
    easy = rollout_advantages(term, config, difficulty=term + 2.0)
    np.testing.assert_allclose(easy, 0.5 * rollout_advantages(term, config))


@settings(deadline=None)
@given(rewards=rewards_P_G)
def test_leave_one_out_is_a_multiple_of_no_std(rewards):
    """RLOO's advantage is Dr. GRPO's times g / (g - 1)."""
    plain = group_advantages(rewards, AdvantageConfig(scale_by_std=False))
    np.testing.assert_allclose(group_advantages(rewards, RLOO), plain * 4 / 3, atol=1e-9)


def test_spread_of_groups():
    rewards = np.array([[0.1 + 0.2, 0.3], [0.0, 1e-3], [1.0, 1.0]])
    assert has_reward_variance(rewards).tolist() == [False, True, False]


def test_overlong_penalty_by_hand():
    """Limit 100, margin 20: free up to 80, half at 90, full from 100 on."""
    result = overlong_penalty(np.array([0, 80, 85, 90, 100, 500]), limit=100, margin=20)
    np.testing.assert_allclose(result, [0, 0, -0.25, -0.5, -1, -1])


@pytest.mark.parametrize("margin", [0, 101])
def test_overlong_margin_must_fit(margin):
    with pytest.raises(ValueError, match=f"margin={margin}"):
        overlong_penalty(np.array([1]), limit=100, margin=margin)


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings_",
    [
        *({"eps": 0.0}, {"reward_clip": -1.0}, {"kl_weight": -1.0}),
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


@pytest.mark.parametrize(("estimator", "paid"), [("k1", 2.0), ("k2", 2.0), ("k3", np.exp(-2) + 1)])
def test_kl_to_go_by_hand(estimator, paid):
    """Tokens 1, 2 and 4 were generated; at 2 the policy is 2 above the reference."""
    policy = np.full(MASK.shape, -1.0, np.float32)
    reference = policy.copy()
    reference[0, 2], policy[:, 0], policy[:, 3] = -3.0, np.nan, np.inf
    result = kl_to_go(MASK, policy, reference, estimator)
    np.testing.assert_allclose(result[0], [0, paid, paid, 0, 0, 0], rtol=1e-6)
    assert not result[1:].any()


def test_whitening_is_over_tokens():
    values = np.random.default_rng(0).normal(3, 5, MASK.shape).astype(np.float32)
    result = np.asarray(whiten(values, MASK))
    inside = result[MASK > 0]
    assert inside.mean() == pytest.approx(0, abs=1e-6)
    assert inside.std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert not result[MASK == 0].any()


@pytest.mark.parametrize("mask", [MASK * 0, MASK * 0 + np.eye(3, 6, dtype=int) * [[1], [0], [0]]])
def test_no_token_or_one_token_stays_finite(mask):
    assert np.isfinite(whiten(REWARDS[:, None] * np.ones(mask.shape, np.float32), mask)).all()


def test_padding_changes_nothing():
    policy = np.random.default_rng(0).normal(size=(2, *MASK.shape)).astype(np.float32)
    wide, wider = np.pad(MASK, [(0, 0), (0, 5)]), np.pad(policy, [(0, 0), (0, 0), (0, 5)])
    np.testing.assert_allclose(
        kl_to_go(wide, *wider)[:, :6], kl_to_go(MASK, *policy), rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(whiten(wider[0], wide)[:, :6], whiten(policy[0], MASK), rtol=1e-6)


def test_the_anchor_is_added_at_generated_tokens_only():
    anchor = np.array([[1.0, 0, 1, 1, 0, 0], [-2, 0, -2, -2, 0, 0], [3, 0, 3, 3, 0, 0]], np.float32)
    result = anchored_advantages(REWARDS, anchor, MASK, weight=0.5)
    np.testing.assert_allclose(result[0], [0, 2, 2.5, 0, 2, 0])
    np.testing.assert_allclose(result[1], [0, -1, 0, 0, 0, 0])
    np.testing.assert_allclose(result[2], 0)


TURNS = np.array(
    [
        [[0.4, 0.3, 0.0], [0.4, np.nan, np.nan], [-0.3, 0.0, np.nan], [0.1, 0.3, 0.3]],
        [[0.4, np.nan, np.nan], [0.4, np.nan, np.nan], [0.4, np.nan, np.nan], [0.4, 0.2, np.nan]],
    ]
)
TOTALS = np.array([[0.0, 1.0, 2.0, 3.0], [4.0, 4.0, 4.0, 4.0]])


@pytest.mark.parametrize(
    "settings",
    [{}, {"scale_by_std": False}, {"leave_one_out": True}, {"normalise": "none"}, {"ddof": 0}],
)
def test_turns_are_normalised_among_those_of_their_number(settings):
    config = AdvantageConfig(**settings)
    result = turn_advantages(TURNS, config, TOTALS)
    np.testing.assert_array_equal(result[0, :, :1].T, rollout_advantages(TURNS[:1, :, 0], config))
    second = rollout_advantages(np.array([[0.3, 0.0, 0.3]]), config)[0]
    np.testing.assert_array_equal(result[0, :, 1], [second[0], 0, second[1], second[2]])
    if config.normalise != "none":
        assert not result[1].any(), "equal turns, and a turn that no other rollout has"
    assert not result[np.isnan(TURNS)].any()


def test_turns_over_the_batch_and_by_difficulty():
    whole = turn_advantages(TURNS, AdvantageConfig(normalise="batch"), TOTALS)
    second = rollout_advantages(np.array([[0.3, 0.0, 0.3, 0.2]]), AdvantageConfig())[0]
    np.testing.assert_allclose(whole[..., 1][np.isfinite(TURNS[..., 1])], second)
    weighed = turn_advantages(TURNS, AdvantageConfig(difficulty_weighted=True), TOTALS)
    plain = turn_advantages(TURNS, AdvantageConfig(), TOTALS)
    np.testing.assert_allclose(weighed, plain * np.array([0.75, 0.5])[:, None, None])


# --- VISD -----------------------------------------------------------------------------------------


def test_reweighted_advantages_by_hand():
    """Weights e^0.1, the lower and the upper bound, and e^0.1 where both signs turn."""
    advantages = np.array([[2.0, 2.0, 2.0, -2.0, 0.0]], np.float32)
    gap = np.array([[0.1, -3.0, 3.0, -0.1, np.nan]], np.float32)
    result = reweighted_advantages(advantages, gap, coefficient=0.5)
    inner = 0.5 + 0.5 * np.exp(0.1)
    np.testing.assert_allclose(result, [[2 * inner, 2 * 0.9, 2 * 1.1, -2 * inner, 0.0]], rtol=1e-6)


def test_reweighting_keeps_sign_and_bounds():
    advantages, gap = np.random.default_rng(0).normal(0, [[[3.0]], [[200.0]]], (2, 40, 50))
    ratio = np.asarray(reweighted_advantages(advantages, gap, coefficient=1.0)) / advantages
    assert ratio.min() == pytest.approx(0.8, rel=1e-6)
    assert ratio.max() == pytest.approx(1.2, rel=1e-6)


def test_no_strength_or_no_gap_changes_nothing():
    advantages = np.array([[1.5, -0.5]], np.float32)
    gap = np.array([[0.7, 0.7]], np.float32)
    np.testing.assert_array_equal(reweighted_advantages(advantages, gap, 0.0), advantages)
    np.testing.assert_array_equal(reweighted_advantages(advantages, gap * 0, 0.7), advantages)


def test_strength_falls_linearly_to_nothing():
    assert [annealed(0.5, step, 600) for step in (0, 300, 600, 900)] == [0.5, 0.25, 0.0, 0.0]
