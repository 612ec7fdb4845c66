"""Gradients of weights that are wider than products are: `model.gradient_dtype`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.experts import grouped_matmul
from models.common.products import multiply
from models.qwen3_vl import Qwen3VLPolicy
from paravt_jax.lora import LoraConfig
from paravt_jax.mesh import make_mesh, parse_mesh, sharding
from paravt_jax.params import initialise
from tests.support.tiny_models import EXPERTS, QWEN
from tests.support.train_steps import random_batch

ROWS = 4096


def normal(seed: int, *shape: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(wide, axes, x, kernel, slope):
    def loss(x, kernel):
        return jnp.sum(multiply(x, kernel, axes, wide).astype(jnp.float32) * slope)

    return jax.grad(loss, argnums=(0, 1))(x, kernel)


def test_the_gradient_of_a_weight_is_not_rounded():
    x, kernel, slope = normal(0, ROWS, 8), normal(1, 8, 4, dtype="float32"), normal(2, ROWS, 4)
    exact = np.asarray(x, np.float64).T @ np.asarray(slope, np.float64)
    narrow, wide = (gradients(w, None, x, kernel, slope.astype("float32")) for w in (False, True))
    scale = np.abs(exact).max()
    assert np.abs(np.asarray(narrow[1]) - exact).max() > 1e-3 * scale
    assert np.abs(np.asarray(wide[1]) - exact).max() < 1e-5 * scale
    np.testing.assert_array_equal(*(g[0].astype("float32") for g in (narrow, wide)))


def test_it_is_laid_out_where_the_weight_lives():
    mesh, axes = make_mesh(parse_mesh("fsdp:8", 8)), ("embed", "mlp")
    home = sharding(mesh, axes, (8, 4))
    with jax.set_mesh(mesh):
        kernel = jax.device_put(normal(1, 8, 4, dtype="float32"), home)
        x = jax.device_put(normal(0, 64, 8), sharding(mesh, ("batch", None), (64, 8)))
        found = gradients(True, axes, x, kernel, normal(2, 64, 4, dtype="float32"))[1]
    assert found.sharding.is_equivalent_to(home, 2)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_experts_too(platform, monkeypatch):
    """The products of either platform, on rows of which the last have no group."""
    monkeypatch.setattr("models.common.experts.platform", lambda: platform)
    sizes, weights = jnp.array([70, 0, 50], jnp.int32), normal(1, 3, 5, 7, dtype="float32")
    rows, slope = normal(0, 128, 5), normal(2, 128, 7)
    used = (jnp.arange(128) < 120)[:, None]

    def loss(rows, weights):
        mixed = grouped_matmul(rows, weights, sizes).astype(jnp.float32)
        return jnp.sum(jnp.where(used, mixed * slope.astype(jnp.float32), 0))

    own, found = jax.jit(jax.grad(loss, argnums=(0, 1)))(rows, weights)
    pairs = np.asarray(rows, np.float64), np.asarray(slope, np.float64)
    first, last = (a[:70] for a in pairs), (a[70:120] for a in pairs)
    exact = [x.T @ y for x, y in (first, [np.zeros((1, 5)), np.zeros((1, 7))], last)]
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    assert own.dtype == jnp.bfloat16 and own.shape == rows.shape


MODELS = {
    "adapters": dataclasses.replace(QWEN, lora=LoraConfig(rank=4)),
    "experts": Qwen3VLPolicy(EXPERTS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts", pytest.param("adapters", marks=pytest.mark.study)])
def test_no_weight_of_a_model_is_left_out(name):
    """No gradient is made of numbers of bfloat16, as those of products in it are."""
    policy = dataclasses.replace(MODELS[name], compute_dtype="bfloat16", gradient_dtype="float32")
    params = initialise(policy.table, jax.random.key(0))
    # An adapter's B begins at zero, and so would the gradient of A.
    params = {name: x + normal(3, *x.shape, dtype="float32") * 0.1 for name, x in params.items()}
    batch = jax.tree.map(lambda x: jnp.asarray(x), random_batch())

    def loss(params):
        patches = batch.patches[..., : params["vision.patch_embedding.kernel"].shape[0]]
        features = policy.encode(params, patches, batch.grids)
        tokens, *places = (x[::4] for x in (batch.tokens, batch.positions, batch.vision_index))
        tokens = tokens % policy.vocab_size
        hidden, _ = policy.hidden_and_router(params, tokens, places[0], places[1], features)
        return jnp.sum(jnp.tanh(policy.head(params)(hidden)) ** 2)

    found = jax.jit(jax.grad(loss))(params)
    assert all(x.dtype == jnp.float32 and np.any(x) for x in found.values())
    assert not [name for name, x in found.items() if np.array_equal(x, x.astype("bfloat16"))]
