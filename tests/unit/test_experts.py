"""Mixture of experts: grouped products, dispatch, and the mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.experts import BLOCK, _blocked_matmul, mix, permute
from models.qwen3_vl import Qwen3VLPolicy
from models.qwen3_vl.config import ExpertsConfig
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from tests.support.tiny_models import EXPERTS as CONFIG

pytestmark = pytest.mark.slow

SIZES = {
    "even": [40, 40, 40],
    "one has all": [0, 120, 0],
    "whole blocks": [BLOCK, 2 * BLOCK, BLOCK - 8],
    "the last rows have no group": [3, 0, 50],
    "no rows at all": [0, 0, 0],
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("name", SIZES)
def test_blocked_product_equals_ragged_dot(name):
    """Values and both gradients, on the rows that belong to a group."""
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    rows, weights = normal(0, 120, 5), normal(1, 3, 5, 7)
    used = (jnp.arange(120) < sizes.sum())[:, None]

    def loss(product, rows, weights):
        return jnp.sum(jnp.where(used, product(rows, weights, sizes), 0) ** 2)

    results = [
        jax.jit(jax.value_and_grad(lambda r, w, f=f: loss(f, r, w), argnums=(0, 1)))(rows, weights)
        for f in (_blocked_matmul, jax.lax.ragged_dot)
    ]
    for own, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-5)


def test_permute_has_the_gradient_of_indexing():
    order = jnp.asarray(np.random.default_rng(0).permutation(9))
    rows, weight = normal(0, 9, 4), normal(1, 9, 4)
    own = jax.grad(lambda x: jnp.sum(permute(x, order, jnp.argsort(order)) * weight))(rows)
    np.testing.assert_array_equal(own, jax.grad(lambda x: jnp.sum(x[order] * weight))(rows))


def test_mix_by_hand():
    """Expert 0 passes half of x, expert 1 of it three times as much; a foreign choice adds 0."""
    eye = jnp.eye(2)
    gate_up = jnp.stack([jnp.stack([eye, eye], axis=1)] * 2)
    down = jnp.stack([0.5 * eye, 1.5 * eye])
    x = jnp.asarray([[[1.0, 2.0], [3.0, 4.0]]])
    choices = jnp.asarray([[[0, 1], [1, 2]]])
    shares = jnp.asarray([[[0.25, 0.75], [0.5, 0.5]]])
    mixed = mix(x, choices, shares, gate_up, down, "relu", jnp.float32)
    square = np.asarray(x) ** 2
    share = np.array([[[0.25 * 0.5 + 0.75 * 1.5], [0.5 * 1.5]]])
    np.testing.assert_allclose(mixed, share * square, rtol=1e-6)


def sparse_everywhere(num_experts=4):
    experts = ExpertsConfig(num_experts, 2, 12)
    return dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, experts=experts))


def inputs(rows):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (rows, 9)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(9)[None, :, None], (rows, 9, 3))
    return tokens, positions.astype(jnp.int32), jnp.full((rows, 9), -1, jnp.int32)


def loss_and_gradients(policy, params, arguments):
    def loss(params):
        hidden, router_logits = policy.hidden_and_router(params, *arguments)
        return jnp.mean(policy.logits(params, hidden) ** 2) + jnp.mean(router_logits**2)

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    ("mesh_text", "rows"),
    [
        ("data:2,expert:2,tensor:2", 8),
        pytest.param("fsdp:2,expert:4", 3, marks=pytest.mark.study),
        pytest.param("expert:8", 8, marks=pytest.mark.study),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(mesh_text, rows):
    """Also where the axis does not divide the experts (expert:8) or the batch (3 rows)."""
    policy, arguments = Qwen3VLPolicy(sparse_everywhere()), inputs(rows)
    alone = initialise(policy.table, jax.random.key(0))
    expected, slopes = loss_and_gradients(policy, alone, arguments)
    mesh = make_mesh(parse_mesh(mesh_text, 8))
    with jax.set_mesh(mesh):
        params = initialise(policy.table, jax.random.key(0), mesh)
        value, gradients = loss_and_gradients(policy, params, arguments)
    expected, value, slopes, gradients = jax.device_get((expected, value, slopes, gradients))
    # The vision tower has no part in this loss.
    gaps = {
        name: np.abs(gradients[name] - slope).max() / np.abs(slope).max()
        for name, slope in slopes.items()
        if not name.startswith("vision.")
    }
    print(f"{mesh_text}: loss {abs(value / expected - 1):.1e}, gradients {max(gaps.values()):.1e}")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert max(gaps.values()) < 1e-4, max(gaps, key=gaps.__getitem__)


def test_experts_are_split_over_their_axis():
    policy = Qwen3VLPolicy(sparse_everywhere())
    mesh = make_mesh(parse_mesh("fsdp:2,expert:2,tensor:2", 8))
    params = initialise(policy.table, jax.random.key(0), mesh)
    kernel = params["text.sparse_layers.mlp.gate_up"]
    assert kernel.shape == (4, 4, 16, 2, 12)
    assert kernel.sharding.shard_shape(kernel.shape) == (4, 2, 8, 2, 6)


def test_layers_of_both_kinds_keep_their_order():
    """A step of 2 without layer 3 leaves one sparse layer, number 1."""
    policy = Qwen3VLPolicy(CONFIG)
    table = policy.table
    assert table["text.layers.mlp.up.kernel"].layers == (0, 2, 3)
    assert table["text.sparse_layers.mlp.down"].layers == (1,)
    params = initialise(table, jax.random.key(0))
    router_logits = jax.eval_shape(policy.hidden_and_router, params, *inputs(2))[1]
    assert router_logits.shape == (1, 2, 9, 4)
    dense = Qwen3VLPolicy(
        dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, experts=None))
    )
    assert (
        dense.hidden_and_router(initialise(dense.table, jax.random.key(0)), *inputs(2))[1] is None
    )


def test_extending_a_lane_equals_the_full_pass():
    policy, arrays = Qwen3VLPolicy(CONFIG), inputs(2)
    params = initialise(policy.table, jax.random.key(0))
    whole = jax.jit(policy.hidden)(params, *arrays)
    head, keys, values = jax.jit(policy.prefill)(params, *(array[:, :6] for array in arrays))
    cache = policy.init_cache(2, 1, 6, 4).with_prompts(jnp.arange(2), keys, values)
    cache = dataclasses.replace(cache, prompt_lengths=jnp.full(2, 6))
    parts = [head]
    for start, end in [(6, 7), (7, 9)]:
        cache = dataclasses.replace(cache, lengths=jnp.full(2, start - 6))
        block = [array[:, start:end] for array in arrays]
        part, (cache,) = jax.jit(policy.append)(params, *block, None, (cache,))
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"), [("num_experts_per_tok", 5), ("decoder_sparse_step", 0)]
)
def test_impossible_routing_is_refused(field, value):
    with pytest.raises(ValueError, match=f"text_config.{field} = {value}"):
        ExpertsConfig(**{"num_experts": 4, "num_experts_per_tok": 2, field: value})
