"""What recomputed layers keep for the backward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.common.layers import Remat, scan_layers
from paravt_jax.params import abstract_params
from tests.support.tiny_models import QWEN

LAYERS, ROWS, WIDTH = 25, 512, 8


class Layer(nnx.Module):
    def __init__(self, kernels):
        self.kernel = nnx.Param(kernels)


def slope_and_bytes(remat: Remat):
    """Gradients by kernels, outputs of each layer, and bytes of temporaries."""
    x = jax.random.normal(jax.random.key(0), (ROWS, WIDTH))

    def loss(kernels):
        def step(layer, carry, number):
            carry = jnp.tanh(carry @ layer.kernel[...]) + carry
            return carry, carry.mean() * number

        last, means = scan_layers(Layer(kernels), step, x, jnp.arange(1.0, LAYERS + 1), remat)
        return jnp.sum(last**2) + jnp.sum(means), means

    kernels = jax.random.normal(jax.random.key(1), (LAYERS, WIDTH, WIDTH)) / 4
    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(kernels).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return compiled(kernels), memory.temp_size_in_bytes


def test_a_block_of_layers_keeps_one_input():
    """The same gradients, from about 4 + 7 inputs in place of 25; the last layer is a block."""
    expected, every = slope_and_bytes(Remat())
    found, blocks = slope_and_bytes(Remat(block=6))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected
    )
    saved = (LAYERS - 11) * 4 * ROWS * WIDTH
    assert every - blocks > 0.8 * saved, (every, blocks, saved)


def test_rollouts_know_nothing_of_it():
    """They have no gradients, and blocks would copy the weights of their layers."""
    again = dataclasses.replace(QWEN, remat=True, remat_block=2)
    params = abstract_params(QWEN.table, jax.make_mesh((1,), ("data",)))
    tokens = (
        jnp.zeros((1, 8), jnp.int32),
        jnp.zeros((1, 8, 3), jnp.int32),
        -jnp.ones((1, 8), jnp.int32),
    )
    plain, found = (str(jax.make_jaxpr(own.prefill)(params, *tokens)) for own in (QWEN, again))
    assert plain == found
