"""Law 5: the loss depends neither on micro-batching nor on the mesh. Moments stay in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.params import initialise
from tests.support.tiny_models import NEEDLE_MODEL
from tests.support.train_steps import POLICY, TOKENS, random_batch, run_steps
from train.config import OptimizerSettings
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.state import make_state, trainable_names
from train.step import RlStep, SftStep, batch_log_probs

pytestmark = pytest.mark.slow
LOG_PROBS = jax.jit(batch_log_probs, static_argnums=0, static_argnames=("temperature", "budget"))
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
SPARSE = Qwen3VLPolicy(
    Qwen3VLConfig.from_dict(
        {
            **NEEDLE_MODEL,
            "model_type": "qwen3_vl_moe",
            "text_config": {**NEEDLE_MODEL["text_config"], **EXPERTS},
        }
    )
)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_loss_does_not_depend_on_micro_batching(aggregation):
    objective = ObjectiveConfig(kl_weight=0.1, aggregation=aggregation)
    whole, _ = run_steps("data:1", 1, 2, objective)
    parts, _ = run_steps("data:1", 4, 2, objective)
    # The loss itself is 1 % of the terms of which it is the mean.
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=2e-6)


def test_mesh_gives_the_one_device_trajectory():
    alone, _ = run_steps("data:1", 2, 5)
    spread, state = run_steps("data:2,fsdp:2,tensor:2", 2, 5)
    np.testing.assert_allclose(spread, alone, rtol=1e-4)
    assert_nothing_large_is_replicated(state)


@pytest.mark.study
def test_balance_of_experts_is_in_the_loss_whatever_the_micro_batches_and_the_mesh():
    plain, _ = run_steps("data:1", 1, 1, policy=SPARSE)
    whole, _ = run_steps("data:1", 1, 2, policy=SPARSE, balance=0.5)
    spread, state = run_steps("fsdp:2,expert:2,tensor:2", 2, 2, policy=SPARSE, balance=0.5)
    # Nearly even at random weights: about 1 for each learned token.
    assert 0.5 < whole[0, 0] - plain[0, 0] < 0.6
    np.testing.assert_allclose(spread, whole, rtol=1e-4)
    assert_nothing_large_is_replicated(state)


def assert_nothing_large_is_replicated(state, limit: int = 64 * 1024):
    """Parameters and moments above `limit` bytes are split over the mesh; prints the table."""
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.optimizer))
    assert len(leaves) > 3 * len(POLICY.table) * 0.5
    for path, leaf in leaves:
        name, size = jax.tree_util.keystr(path), leaf.size * leaf.dtype.itemsize
        print(f"{name:<90} {size:>10,} {leaf.sharding.spec}")
        assert size <= limit or not leaf.sharding.is_fully_replicated, name


def test_reference_log_probs_do_not_depend_on_micro_batching():
    batch = jax.tree.map(jnp.asarray, random_batch())
    params = initialise(POLICY.table, jax.random.key(0))
    whole, *_ = LOG_PROBS(POLICY, params, batch, temperature=0.8, budget=TOKENS)
    optimizer, objective = optax.sgd(0.1), ObjectiveConfig()
    parts = RlStep(POLICY, optimizer, objective, 0.8, micro_batches=2, budget=TOKENS)
    np.testing.assert_allclose(parts.log_probs(params, batch), whole, atol=1e-5)


def test_master_weights_and_moments_are_float32():
    _, state = run_steps("data:1", 2, 5)
    for leaf in jax.tree.leaves((state.params, state.optimizer)):
        assert leaf.dtype in (jnp.float32, jnp.int32), leaf.dtype


def test_frozen_vision_tower_does_not_move():
    fresh = initialise(POLICY.table, jax.random.key(0))
    _, state = run_steps("data:1", 2, 5)
    moved = {n for n, value in state.params.items() if not np.array_equal(value, fresh[n])}
    assert moved and not any(name.startswith("vision.") for name in moved)
    assert "text.embedding" in moved


def test_supervised_loss_is_the_mean_negative_log_likelihood():
    batch = jax.tree.map(jnp.asarray, random_batch())
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    config = get_recipe("needle_sft")
    optimizer = optax.sgd(0.1)
    params = initialise(POLICY.table, jax.random.key(0), mesh)
    state = make_state(params, trainable_names(POLICY.table, config.model), mesh, optimizer)
    log_probs, *_ = LOG_PROBS(POLICY, params, batch, temperature=1.0, budget=TOKENS)
    expected = -(log_probs * batch.loss_weights).sum() / batch.loss_weights.sum()
    step = SftStep(POLICY, optimizer, micro_rows=8, budgets={"one": TOKENS})
    after, metrics = jax.jit(lambda s, b: step(s, {"one": b}))(state, batch)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    again, *_ = LOG_PROBS(POLICY, after.params, batch, temperature=1.0, budget=TOKENS)
    assert (again * batch.loss_weights).sum() > (log_probs * batch.loss_weights).sum()


def test_non_finite_gradients_change_nothing():
    batch = random_batch()
    bad = dataclasses.replace(batch, patches=np.full_like(batch.patches, np.nan))
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerSettings(), 1, POLICY.table)
    params = initialise(POLICY.table, jax.random.key(0), mesh)
    state = make_state(params, set(params), mesh, optimizer)
    step = SftStep(POLICY, optimizer, micro_rows=8, budgets={"one": TOKENS})
    after, metrics = jax.jit(lambda s, b: step(s, {"one": b}))(state, bad)
    assert not np.isfinite(metrics["grad_norm"])
    for name, value in after.params.items():
        np.testing.assert_array_equal(value, params[name])
