"""What recomputed layers keep for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.common.layers import Remat, scan_layers

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
