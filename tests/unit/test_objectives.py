"""The policy objective: hand values, limits, and what the loss must not depend on."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.cispo import cispo
from paravt_jax.corrections import CorrectionConfig
from paravt_jax.objectives import ObjectiveConfig, aggregate, divergence, policy_loss

ROWS, TOKENS, GROUP = 6, 10, 2
REGRESSION = {"surrogate": "regression", "ratio": "trajectory", "aggregation": "sequence"}


def batch(seed=0):
    """Log-probs that differ enough for clips and the cap to bind somewhere."""
    rng = np.random.default_rng(seed)
    log_probs, proximal, behaviour = -rng.gamma(2.0, 1.0, (3, ROWS, TOKENS)).astype(np.float32)
    advantages = rng.normal(size=(ROWS, TOKENS)).astype(np.float32)
    mask = (rng.random((ROWS, TOKENS)) < 0.6).astype(np.float32)
    mask[-1] = 0
    return log_probs, proximal, behaviour, advantages, mask


def mean_loss(config, arrays, **extras):
    total, count, _ = policy_loss(*arrays, config, **extras)
    return total / jnp.maximum(count, 1)


def gradient(config, arrays, **extras):
    log_probs, *others = arrays
    return jax.grad(lambda x: mean_loss(config, (x, *others), **extras))(jnp.asarray(log_probs))


def one_token(log_ratio, advantage, gap=0.0, **config):
    """Loss of a single token; behaviour is `gap` below the proximal policy."""
    arrays = [np.full((1, 1), x, np.float32) for x in (log_ratio, 0.0, -gap, advantage, 1.0)]
    return float(mean_loss(ObjectiveConfig(**config), arrays))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (0.5, -2.0, 1.6), (1.5, -2.0, 3.0)],
)
def test_clipped_surrogate(ratio, advantage, loss):
    assert one_token(np.log(ratio), advantage) == pytest.approx(loss, rel=1e-6)


def test_clip_higher_widens_one_side():
    assert one_token(np.log(1.5), 2.0, clip_high=0.28) == pytest.approx(-2.56, rel=1e-6)


def test_dual_clip_bounds_bad_tokens():
    assert one_token(np.log(9.0), -2.0) == pytest.approx(18.0, rel=1e-6)
    assert one_token(np.log(9.0), -2.0, dual_clip=3.0) == pytest.approx(6.0, rel=1e-6)
    assert one_token(np.log(9.0), 2.0, dual_clip=3.0) == pytest.approx(-2.4, rel=1e-6)


def test_behaviour_weight_multiplies_and_the_cap_drops():
    assert one_token(0.0, 1.0, gap=np.log(4.0)) == pytest.approx(-4.0, rel=1e-6)
    assert one_token(0.0, 1.0, gap=np.log(6.0)) == 0.0
    assert one_token(0.0, 1.0, gap=np.log(6.0), behaviour_cap=None) == pytest.approx(-6.0, rel=1e-6)


@pytest.mark.slow
def test_soft_gate_is_ppo_to_first_order():
    """SAPO: slope 1 at ratio 1 for both signs, and vanishing far away."""
    for advantage in (1.0, -1.0):
        arrays = [np.full((1, 1), x, np.float32) for x in (0.0, 0.0, 0.0, advantage, 1.0)]
        slope = gradient(ObjectiveConfig(surrogate="soft"), arrays)
        assert float(slope[0, 0]) == pytest.approx(-advantage, rel=1e-6)
    assert one_token(50.0, 1.0, surrogate="soft") == pytest.approx(-4.0, rel=1e-6)


def ppo(ratio, advantages):
    """`surrogates.clipped`, as a user may write it."""
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 0.8, 1.2))


@pytest.mark.slow
def test_a_surrogate_of_ones_own_takes_the_place_of_ours():
    own, arrays = ObjectiveConfig(surrogate=ppo), batch()
    assert own.surrogate == f"{__file__}:ppo"
    np.testing.assert_array_equal(mean_loss(own, arrays), mean_loss(ObjectiveConfig(), arrays))
    expected = gradient(ObjectiveConfig(), arrays)
    np.testing.assert_array_equal(gradient(own, arrays), expected)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("advantage", [2.0, -1.0])
def test_cispo_clips_the_weight_and_never_the_gradient(ratio, advantage):
    """MiniMax-M1, arXiv 2506.13585, equation 4: min(q, 5) A is what multiplies grad log pi."""
    arrays = [np.full((1, 1), x, np.float32) for x in (np.log(ratio), 0.0, 0.0, advantage, 1.0)]
    slope = gradient(ObjectiveConfig(surrogate=cispo), arrays)
    np.testing.assert_allclose(slope, [[-min(ratio, 5.0) * advantage]], rtol=1e-5)


def one_per_row(ratio, advantages):
    return (ratio * advantages).sum(axis=1)


def test_a_loss_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"objective\.surrogate=.*one_per_row returned \(6,\)"):
        policy_loss(*batch(), ObjectiveConfig(surrogate=one_per_row))


def test_at_the_proximal_policy_the_gradient_is_the_policy_gradient():
    log_probs, _, behaviour, advantages, mask = batch()
    config = ObjectiveConfig(behaviour_cap=None)
    slope = gradient(config, (log_probs, log_probs, behaviour, advantages, mask))
    weights = np.exp(log_probs - behaviour)
    np.testing.assert_allclose(
        slope, -mask * advantages * weights / mask.sum(), rtol=1e-4, atol=1e-7
    )


@pytest.mark.slow
def test_sequence_ratio_is_the_geometric_mean():
    """GSPO: one ratio and one advantage per row."""
    log_probs = np.log(np.array([[1.1, 1.2, 9.0]], np.float32))
    zero, mask = np.zeros((1, 3), np.float32), np.array([[1.0, 1.0, 0.0]], np.float32)
    advantages = np.array([[1.0, 3.0, 99.0]], np.float32)
    loss = mean_loss(ObjectiveConfig(ratio="sequence"), (log_probs, zero, zero, advantages, mask))
    assert float(loss) == pytest.approx(-2.0 * np.sqrt(1.1 * 1.2), rel=1e-6)


def test_trajectory_ratio_is_that_of_the_whole_answer():
    """RLOO: one action of probability 1.1 * 1.2 times that of before."""
    log_probs = np.log(np.array([[1.1, 1.2, 9.0]], np.float32))
    zero, mask = np.zeros((1, 3), np.float32), np.array([[1.0, 1.0, 0.0]], np.float32)
    config = ObjectiveConfig(ratio="trajectory", aggregation="sequence", clip_high=1.0)
    loss = mean_loss(config, (log_probs, zero, zero, 2 * mask, mask))
    assert float(loss) == pytest.approx(-2.0 * 1.1 * 1.2, rel=1e-6)


# --- Reg-GRPO -------------------------------------------------------------------------------------


def rollouts(log_ratios, advantages, mask=None):
    """One group: a row of two tokens each, whose log-ratios add up to those given."""
    log_probs = np.repeat(np.asarray(log_ratios, np.float32)[:, None] / 2, 2, axis=1)
    rows = np.repeat(np.asarray(advantages, np.float32)[:, None], 2, axis=1)
    zero = np.zeros_like(log_probs)
    return log_probs, zero, zero, rows, np.ones_like(zero) if mask is None else mask


def regression(arrays, **settings):
    config = ObjectiveConfig(**(REGRESSION | {"regression_eps": 1e-6} | settings))
    return mean_loss(config, arrays, group_size=len(arrays[0]))


def regression_slope(arrays, **settings):
    """Slope of the loss by each rollout's log-ratio (its two tokens share it)."""
    log_probs, *others = arrays
    slope = jax.grad(lambda x: regression((x, *others), **settings))(jnp.asarray(log_probs))
    np.testing.assert_allclose(slope[:, 0], slope[:, 1], rtol=1e-6)
    return np.asarray(slope[:, 0])


@pytest.mark.slow
def test_regression_by_hand():
    """rho = 0, 1, 2 has mean 1 and std 1: fitted -1, 0, 1; against 1, 0, -1 that costs 4, 0, 4."""
    arrays = rollouts([0.0, 1.0, 2.0], [1.0, 0.0, -1.0])
    assert float(regression(arrays)) == pytest.approx(8 / 3, rel=1e-5)
    # Detached: 2 (fitted - A) / std, by three rollouts.
    np.testing.assert_allclose(regression_slope(arrays), [-4 / 3, 0.0, 4 / 3], rtol=1e-5)
    halved = regression(arrays, ratio="sequence")
    assert float(halved) == pytest.approx(8 / 3, rel=1e-5), "normalising forgets the length"


@pytest.mark.slow
def test_a_perfect_fit_costs_nothing():
    advantages = np.array([1.2, -0.7, -0.5], np.float32)
    advantages -= advantages.mean()
    advantages /= advantages.std(ddof=1)
    arrays = rollouts(0.3 * advantages + 5.0, advantages)
    assert float(regression(arrays)) == pytest.approx(0, abs=1e-8)
    np.testing.assert_allclose(regression_slope(arrays), 0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("detached", [True, False])
def test_regression_forgets_shift_and_scale_of_log_ratios(detached):
    ratios, advantages = np.array([0.1, -0.4, 0.9, 0.2]), [1.0, -1.0, 0.5, -0.5]
    settings = {"regression_detached": detached, "regression_eps": 1e-6}
    plain = regression(rollouts(ratios, advantages), **settings)
    moved = regression(rollouts(3 * ratios + 2, advantages), **settings)
    assert float(moved) == pytest.approx(float(plain), rel=1e-4)
    small = regression_slope(rollouts(ratios, advantages), **settings)
    large = regression_slope(rollouts(3 * ratios + 2, advantages), **settings)
    np.testing.assert_allclose(large, small / 3, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("detached", [True, False])
def test_regression_begins_as_a_policy_gradient(detached):
    """At the proximal policy rho and its std are 0: finite, and downhill is where A points."""
    advantages = np.array([1.5, -0.5, -0.5, -0.5])
    arrays = rollouts(np.zeros(4), advantages)
    slope = regression_slope(arrays, regression_eps=0.01, regression_detached=detached)
    np.testing.assert_allclose(slope, -2 / 0.01 * advantages / 4, rtol=1e-5)


@pytest.mark.slow
def test_gradient_through_the_statistics_has_none_along_the_log_ratios():
    ratios = np.array([0.1, -0.4, 0.9, 0.2])
    arrays = rollouts(ratios, [1.0, -1.0, 0.5, -0.5])
    through = regression_slope(arrays, regression_detached=False)
    assert ratios @ through == pytest.approx(0, abs=1e-3)
    assert abs(ratios @ regression_slope(arrays)) > 0.05


@pytest.mark.slow
def test_a_rollout_without_tokens_is_no_part_of_its_group():
    mask = np.ones((3, 2), np.float32)
    mask[2] = 0
    with_empty = rollouts([0.0, 1.0, 77.0], [1.0, -1.0, 9.0], mask)
    without = rollouts([0.0, 1.0], [1.0, -1.0])
    assert float(regression(with_empty)) == pytest.approx(float(regression(without)), rel=1e-6)


def test_regression_needs_whole_groups():
    with pytest.raises(ValueError, match="group_size=4 must divide the 6 rows"):
        policy_loss(*batch(), ObjectiveConfig(**REGRESSION), group_size=4)
    with pytest.raises(ValueError, match="group_size=None"):
        policy_loss(*batch(), ObjectiveConfig(**REGRESSION))


# --- Divergence, anchor, metrics ------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "value"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.10653066)])
def test_divergences(estimator, value):
    result = divergence(jnp.array([-1.0]), jnp.array([-1.5]), estimator)
    np.testing.assert_allclose(result, value, rtol=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergence_of_a_policy_from_itself_is_zero(estimator):
    log_probs = jnp.linspace(-30, 0, 7)
    np.testing.assert_array_equal(divergence(log_probs, log_probs, estimator), 0)


def test_kl_is_added_and_measured():
    arrays, reference = batch(), batch(seed=1)[0]
    config = ObjectiveConfig(kl_weight=0.5, kl_estimator="k2")
    without = mean_loss(dataclasses.replace(config, kl_weight=0.0), arrays)
    metrics = policy_loss(*arrays, config, reference=reference)[2]
    with_kl = mean_loss(config, arrays, reference=reference)
    mean_kl = metrics.means()["kl"]
    assert float(with_kl - without) == pytest.approx(0.5 * float(mean_kl), rel=1e-4)
    assert float(mean_kl) > 0.1


def test_logprob_anchor_pulls_structural_tokens_up():
    log_probs, *others = batch()
    structure = np.zeros((ROWS, TOKENS), bool)
    structure[:, 3] = True
    config = ObjectiveConfig(anchor="logprob", anchor_weight=0.5)
    plain = gradient(ObjectiveConfig(), (log_probs, *others))
    anchored = gradient(config, (log_probs, *others), structure=structure)
    mask = others[-1]
    np.testing.assert_allclose(anchored - plain, -0.5 * structure * mask / mask.sum(), atol=1e-7)


def test_metrics_by_hand():
    log_probs = np.log(np.array([[1.0, 1.5, 1.5, 0.5]], np.float32))
    zero = np.zeros((1, 4), np.float32)
    behaviour = np.array([[-3.0, 0.0, 0.5, 1.0]], np.float32)
    advantages = np.array([[1.0, 1.0, -1.0, 1.0]], np.float32)
    mask = np.array([[1.0, 1.0, 1.0, 0.0]], np.float32)
    arrays = (log_probs, zero, behaviour, advantages, mask)
    entropy = np.array([[0.5, 1.0, 3.0, np.nan]], np.float32)
    metrics = policy_loss(*arrays, ObjectiveConfig(), entropy=entropy)[2]
    means = {name: float(value) for name, value in metrics.means().items()}
    assert means["ratio"] == pytest.approx(4 / 3, rel=1e-6)
    assert means["clip_fraction"] == pytest.approx(1 / 3)
    assert means["dropped_fraction"] == pytest.approx(1 / 3)
    assert means["logprob/gap_mean"] == pytest.approx(3.5 / 3, rel=1e-6)
    assert means["logprob/gap_max"] == 3.0
    assert means["entropy"] == pytest.approx(1.5)


ALL = [
    ObjectiveConfig(),
    ObjectiveConfig(aggregation="sequence"),
    ObjectiveConfig(ratio="sequence", aggregation="sequence", clip_low=3e-4, clip_high=4e-4),
    ObjectiveConfig(surrogate="soft", behaviour_cap=None),
    ObjectiveConfig(dual_clip=3.0, kl_weight=0.1, kl_estimator="k3"),
    ObjectiveConfig(anchor="logprob", anchor_weight=0.2),
    ObjectiveConfig(aggregation="constant", constant_length=TOKENS, clip_high=0.28),
    ObjectiveConfig(ratio="trajectory", kl_weight=0.1, kl_estimator="k1"),
    ObjectiveConfig(**REGRESSION, kl_weight=0.1, kl_estimator="k2"),
    ObjectiveConfig(**{**REGRESSION, "ratio": "sequence"}, regression_detached=False),
    ObjectiveConfig(surrogate=cispo),
    ObjectiveConfig(
        correction=CorrectionConfig(
            weights="product", beyond="truncate", floor=0.2, reject="geometric", reject_cap=1.5
        )
    ),
    ObjectiveConfig(
        aggregation="sequence",
        correction=CorrectionConfig(proximal="sampler", reject="any", reject_floor=0.05),
    ),
]
every = pytest.mark.parametrize("config", ALL)


def extras():
    return {
        "reference": batch(seed=1)[0],
        "structure": batch(seed=2)[4] > 0,
        "entropy": -batch(seed=3)[0],
    }


def groups_of(config):
    return {"group_size": GROUP if config.surrogate == "regression" else None}


@pytest.mark.slow
@every
@pytest.mark.parametrize("sizes", [[1] * ROWS, [2, 4], [5, 1]])
def test_micro_batches_change_nothing(config, sizes):
    """Rows are divided anywhere, or between groups where a group belongs together."""
    arrays, more, groups = batch(), extras(), groups_of(config)
    sizes = sizes if groups["group_size"] is None else [GROUP, ROWS - GROUP]
    edges = np.cumsum([0, *sizes])
    whole = policy_loss(*arrays, config, **more, **groups)
    parts = [
        policy_loss(
            *(x[a:b] for x in arrays),
            config,
            **{name: x[a:b] for name, x in more.items()},
            **groups,
        )
        for a, b in itertools.pairwise(edges)
    ]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole[0], rtol=1e-5)
    np.testing.assert_allclose(sum(p[1] for p in parts), whole[1])
    merged = parts[0][2]
    for part in parts[1:]:
        merged = merged.merge(part[2])
    for name, value in merged.means().items():
        np.testing.assert_allclose(value, whole[2].means()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@every
def test_padding_changes_nothing_whatever_it_holds(config):
    """Neither NaN nor infinities outside of the mask reach the loss or its gradient."""
    arrays, more, groups = batch(), extras(), groups_of(config)
    wide = [np.pad(x, [(0, 2), (0, 3)], constant_values=np.nan) for x in arrays[:-1]]
    wide[1][-1] = np.inf
    wide.append(np.pad(arrays[-1], [(0, 2), (0, 3)]))
    padding = {"reference": np.nan, "structure": True, "entropy": np.nan}
    more_wide = {
        name: np.pad(x, [(0, 2), (0, 3)], constant_values=padding[name]) for name, x in more.items()
    }
    np.testing.assert_allclose(
        mean_loss(config, wide, **more_wide, **groups),
        mean_loss(config, arrays, **more, **groups),
        rtol=1e-5,
    )
    slope = gradient(config, wide, **more_wide, **groups)
    np.testing.assert_allclose(
        slope[:ROWS, :TOKENS], gradient(config, arrays, **more, **groups), rtol=1e-4, atol=1e-7
    )
    assert not np.asarray(slope[ROWS:]).any() and not np.asarray(slope[:, TOKENS:]).any()
    wide_metrics = policy_loss(*wide, config, **more_wide, **groups)[2].means()
    for name, value in policy_loss(*arrays, config, **more, **groups)[2].means().items():
        np.testing.assert_allclose(wide_metrics[name], value, rtol=1e-5, err_msg=name)


@every
def test_an_empty_mask_gives_zero_everywhere(config):
    *arrays, mask = batch()
    more = extras() | groups_of(config)
    total, count, metrics = policy_loss(*arrays, mask * 0, config, **more)
    assert (float(total), float(count)) == (0.0, 0.0)
    assert not any(float(value) for value in metrics.means().values())
    assert not np.asarray(gradient(config, (*arrays, mask * 0), **more)).any()


@every
def test_zero_advantages_stay_finite(config):
    """A group without spread, at the proximal policy and away from it."""
    log_probs, proximal, behaviour, advantages, mask = batch()
    more = extras() | groups_of(config)
    for policy in (log_probs, proximal):
        arrays = (policy, proximal, behaviour, advantages * 0, mask)
        assert np.isfinite(mean_loss(config, arrays, **more))
        assert np.isfinite(gradient(config, arrays, **more)).all()


@pytest.mark.parametrize(
    "config", [c for c in ALL if c.surrogate != "regression" and not c.kl_weight + c.anchor_weight]
)
def test_the_loss_is_proportional_to_the_advantages(config):
    """So it is 0, and has no gradient, where they are 0."""
    log_probs, proximal, behaviour, advantages, mask = batch()
    tripled = mean_loss(config, (log_probs, proximal, behaviour, 3 * advantages, mask))
    plain = mean_loss(config, (log_probs, proximal, behaviour, advantages, mask))
    np.testing.assert_allclose(tripled, 3 * plain, rtol=1e-5)
    assert not gradient(config, (log_probs, proximal, behaviour, 0 * advantages, mask)).any()


@every
def test_the_same_shift_of_all_policies_changes_nothing(config):
    """Only differences of log-probabilities count, but for the likelihood of the anchor."""
    log_probs, proximal, behaviour, advantages, mask = batch()
    more = extras() | groups_of(config)
    moved = (log_probs - 1, proximal - 1, behaviour - 1, advantages, mask)
    shifted = mean_loss(config, moved, **(more | {"reference": more["reference"] - 1}))
    anchored = config.anchor_weight * (more["structure"] * mask).sum() / mask.sum()
    plain = mean_loss(config, batch(), **more) + anchored
    np.testing.assert_allclose(shifted, plain, rtol=1e-4)


@every
def test_extreme_log_probs_stay_finite(config):
    log_probs, proximal, behaviour, advantages, mask = batch()
    arrays = (log_probs * 1e4, proximal * 1e-4, behaviour * 1e4, advantages, mask)
    more = extras() | groups_of(config)
    assert np.isfinite(mean_loss(config, arrays, **more))
    assert np.isfinite(gradient(config, arrays, **more)).all()


@every
def test_jit_agrees(config):
    arrays, more, groups = batch(), extras(), groups_of(config)
    jitted = jax.jit(lambda *arrays, **more: mean_loss(config, arrays, **more, **groups))
    np.testing.assert_allclose(
        jitted(*arrays, **more), mean_loss(config, arrays, **more, **groups), rtol=1e-5
    )


def test_only_the_trained_policy_has_a_gradient():
    arrays = batch()
    slopes = jax.grad(
        lambda *x: mean_loss(ObjectiveConfig(), (*x, arrays[-1])), argnums=(0, 1, 2, 3)
    )(*map(jnp.asarray, arrays[:-1]))
    assert np.asarray(slopes[0]).any()
    assert not any(np.asarray(slope).any() for slope in slopes[1:])


def test_aggregations_by_hand():
    values = jnp.array([[1.0, 2.0, 3.0], [10.0, 99.0, 99.0], [5.0, 5.0, 5.0]])
    weight = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert [float(x) for x in aggregate(values, weight, "token")] == [16.0, 4.0]
    assert [float(x) for x in aggregate(values, weight, "sequence")] == [12.0, 2.0]
    assert [float(x) for x in aggregate(values, weight, "constant", 8)] == [2.0, 2.0]


def test_constant_length_weighs_tokens_of_long_and_short_rows_alike():
    """Dr. GRPO: a mean of each row makes the tokens of a long one count less."""
    _, proximal, *_ = batch()
    mask = (np.arange(TOKENS) < np.array([[1], [2], [4], [6], [8], [10]])).astype(np.float32)
    arrays = (proximal, proximal, proximal, np.ones_like(mask), mask)
    constant = ObjectiveConfig(aggregation="constant", constant_length=TOKENS)
    slope = gradient(constant, arrays)[mask > 0]
    np.testing.assert_allclose(slope, -1 / (ROWS * TOKENS), rtol=1e-6)
    by_row = np.asarray(gradient(ObjectiveConfig(aggregation="sequence"), arrays))
    assert by_row[0, 0] == pytest.approx(10 * by_row[5, 0])


@pytest.mark.parametrize(
    "setting",
    [
        *({"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 0.5}, {"behaviour_cap": 0.0}),
        *({"kl_weight": -1.0}, {"soft_positive": 0.0}),
        *({"constant_length": 0}, {"regression_eps": 0.0}),
    ],
)
def test_settings_without_meaning_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        ObjectiveConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"surrogate": "regression"}, "set ObjectiveConfig.ratio=trajectory"),
        ({"aggregation": "constant"}, "set ObjectiveConfig.constant_length"),
    ],
)
def test_settings_that_need_another_are_refused(setting, named):
    with pytest.raises(ValueError, match=named):
        ObjectiveConfig(**setting)
