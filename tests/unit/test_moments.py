"""Moments in fewer bits: what a number becomes, trajectories, layout, and resuming."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.moments import Blocks, dequantise, keep_moments, quantise
from paravt_jax.params import abstract_params, initialise
from tests.support.tiny_models import QWEN
from tests.support.train_steps import POLICY
from train.compile.footprint import footprint
from train.model import ModelSettings
from train.optimizer import OptimizerSettings, make_optimizer
from train.state import TrainState, abstract_moments, make_state
from train.step import apply_gradients
from train.workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

KEPT = ("bfloat16", "int8")
ALL = ModelSettings(train_vision=True)


def chances(seed: int, *shape: int) -> jax.Array:
    return jax.random.bits(jax.random.key(seed), shape)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bits_hold_what_they_can_name(signed):
    """Every code comes back as it was, the largest value of each block to the bit."""
    codes = np.arange(-127 if signed else 0, 128 if signed else 256)
    dtype = jnp.int8 if signed else jnp.uint8
    named = jnp.asarray(np.resize(codes, (1, 256)), dtype)
    values = dequantise(Blocks(named, jnp.full((1, 1), 3.7)))
    assert float(values.max()) == np.float32(3.7)
    assert np.all(np.diff(np.asarray(values)[0, : len(codes)]) > 0)
    for seed in range(3):
        again = quantise(values, chances(seed, 1, 256), signed)
        assert np.abs(again.codes.astype(int) - named.astype(int)).max() <= 1
        np.testing.assert_allclose(dequantise(again), values, rtol=0.15, atol=4e-6)
        assert float(dequantise(again).max()) == np.float32(3.7)


def test_rounding_has_the_right_mean():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, 256)) * 10.0 ** rng.uniform(-4, 0, (1, 256)), jnp.float32)
    rounded = jax.vmap(lambda seed: dequantise(quantise(x, chances(seed, 1, 256), True)))
    found = np.asarray(rounded(jnp.arange(2000)))
    spread = found.std(axis=0) / np.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - x) <= 6 * spread + 0.01 * np.abs(x))


def test_what_is_positive_stays_so():
    x = jnp.full((1, 256), 1e-12).at[0, 0].set(1.0)
    assert float(dequantise(quantise(x, chances(0, 1, 256), signed=False)).min()) > 0
    assert float(dequantise(quantise(0 * x, chances(0, 1, 256), signed=False)).max()) == 0


@functools.partial(jax.jit, static_argnums=(0, 1))
def constant_gradient(kept, steps):
    """The second moments of a gradient that never changes, over its square."""
    rng = np.random.default_rng(0)
    gradient = {"w": jnp.asarray(rng.uniform(0.5, 1, (16, 256)), jnp.float32)}
    adam = keep_moments(optax.scale_by_adam(b2=0.999), kept)

    def step(_, state):
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(gradient, state, gradient)[1]

    found = jax.lax.fori_loop(0, steps, step, adam.init(gradient)).inner.nu["w"]
    nu = dequantise(found) if isinstance(found, Blocks) else found.astype(jnp.float32)
    return nu / gradient["w"] ** 2


@pytest.mark.parametrize("kept", KEPT)
def test_second_moments_do_not_stand_still(kept):
    """A step moves them by a thousandth of what they lack: rounded to the nearest bfloat16 they
    would stop at 0.27."""
    found = constant_gradient(kept, 3000)
    assert abs(float(found.mean()) - (1 - 0.999**3000)) < 0.01


@functools.partial(jax.jit, static_argnums=0)
def fitted(settings):
    """Losses of a small network that learns another one."""
    rng = np.random.default_rng(0)
    goal, start = (
        {
            name: jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)
            for name, shape in (("a", (64, 256)), ("b", (256, 64)))
        }
        for _ in range(2)
    )
    update = optax.adam(1e-3)
    update = update if settings == "float32" else keep_moments(update, settings)

    def output(weights, x):
        return jnp.tanh(x @ weights["a"]) @ weights["b"]

    def step(carry, key):
        weights, state = carry
        x = jax.random.normal(key, (64, 64))
        loss, slope = jax.value_and_grad(
            lambda own: jnp.mean((output(own, x) - output(goal, x)) ** 2)
        )(weights)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update.update(slope, state, weights)
        return (optax.apply_updates(weights, updates), state), loss

    return jax.lax.scan(
        step, (start, update.init(start)), jax.random.split(jax.random.key(1), 400)
    )[1]


@pytest.mark.parametrize("kept", KEPT)
def test_a_trajectory_stays_near_that_of_float32(kept):
    exact, found = (np.asarray(fitted(own)) for own in ("float32", kept))
    assert exact[-20:].mean() < 0.1 * exact[0]
    np.testing.assert_allclose(found[:20], exact[:20], rtol=0.01)
    np.testing.assert_allclose(found[-20:].mean(), exact[-20:].mean(), rtol=0.01)


def optimizer(kept: str, name: str = "adamw") -> optax.GradientTransformation:
    settings = OptimizerSettings(**{"name": name, "learning_rate": 1e-3, "moments": kept})
    return make_optimizer(settings, 8, QWEN.table)


def learned(state: TrainState, update, steps: range) -> TrainState:
    step = jax.jit(functools.partial(apply_gradients, update))
    for number in steps:
        state = step(state, gradients(number, state))
    return state


def gradients(seed: int, state: TrainState):
    names = enumerate(sorted(state.trainable))
    keys = {name: jax.random.fold_in(jax.random.key(seed), i) for i, name in names}
    made = {name: jax.random.normal(keys[name], x.shape) for name, x in state.trainable.items()}
    return jax.device_put(made, {name: x.sharding for name, x in state.trainable.items()})


@pytest.mark.study
@pytest.mark.parametrize(("kept", "name"), [("bfloat16", "muon"), ("int8", "adamw")])
def test_a_resumed_run_goes_on_to_the_bit(kept, name, tmp_path):
    """And another mesh restores the same: blocks are those of arrays, wherever their parts lie."""
    update, table = optimizer(kept, name), QWEN.table
    meshes = [make_mesh(parse_mesh(text, 8)) for text in ("fsdp:8", "data:2,fsdp:2,tensor:2")]
    saved = Checkpoints(tmp_path, 2, table)
    with jax.set_mesh(meshes[0]):
        params = initialise(table, jax.random.key(0), meshes[0])
        state = learned(make_state(params, set(table), meshes[0], update), update, range(3))
        saved.save(3, state)
        saved.wait()
        whole = learned(state, update, range(3, 5))
    for mesh in meshes:
        with jax.set_mesh(mesh):
            like = make_state(initialise(table, jax.random.key(1), mesh), set(table), mesh, update)
            resumed, *_ = saved.restore(like)
            jax.tree.map(np.testing.assert_array_equal, resumed, state)
            if mesh is meshes[0]:
                found = learned(resumed, update, range(3, 5))
                jax.tree.map(np.testing.assert_array_equal, found, whole)
    saved.close()


def test_moments_are_laid_out_like_their_weights_and_counted():
    mesh = make_mesh(parse_mesh("fsdp:8", 8))
    trainable = abstract_params(POLICY.table, mesh)
    sizes = {}
    for kept in ("float32", *KEPT):
        update = make_optimizer(OptimizerSettings(moments=kept), 1, POLICY.table)
        found = abstract_moments(update, trainable, mesh)
        sizes[kept] = footprint(POLICY, update, ALL, mesh)["moments"]
        made = jax.jit(update.init, out_shardings=jax.tree.map(lambda x: x.sharding, found))(
            {name: jnp.zeros(x.shape, device=x.sharding) for name, x in trainable.items()}
        )
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(made))
        assert held == sizes[kept]
    # Small weights keep theirs in float32, and scales of short blocks are many.
    assert 0.5 < sizes["bfloat16"] / sizes["float32"] < 0.52
    assert 0.25 < sizes["int8"] / sizes["float32"] < 0.31
