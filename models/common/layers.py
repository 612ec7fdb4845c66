"""Building blocks of both towers. Modules are abstract (see `paravt_jax.params`).

README.md says what runs in which precision. Every product is taken over 2-D operands: XLA's CPU
backend computes the weight gradient of a 3-D product several times more slowly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.common.attention import MIXED
from models.common.products import (
    Weighted,
    add_bias,
    along_last,
    flat_rows,
    multiply,
    precision,
    without_ones,
)
from paravt_jax.lora import NO_LORA, LoraConfig
from paravt_jax.mesh import platform, splits_tokens
from paravt_jax.params import Constant, HfLayout, Initialiser, Uniform, declare

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

KEPT = {
    "nothing": None,
    # Products of queries, keys and values with one another have batch dimensions.
    "projections": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(MIXED),
    ),
    "products": jax.checkpoint_policies.dots_saveable,
}
"""What recomputed layers keep for the backward pass besides their inputs."""


@dataclasses.dataclass(frozen=True)
class Remat:
    """What the backward pass computes again."""

    keeps: str = "nothing"
    """What it does not, of a layer: see `KEPT`."""
    block: int = 1
    """Layers whose inputs wait for it together: only the first one's does, and the others are
    computed again, once more, when it reaches them (Chen et al., 2016, arXiv 1604.06174)."""


ON_CPU = Remat("projections")
"""What a CPU computes again unless told otherwise: all that lies between products, which takes less
time than writing it to fresh pages of memory and reading it back (docs/log.md)."""

SMALL_TABLE = 2048
"""Up to this many rows, the gradient of a lookup is a product with one-hot rows."""


class Adapter(Weighted):
    """`alpha / rank * (x @ a) @ b` beside a frozen kernel (Hu et al., 2021).

    Named and initialised as in peft: A as torch initialises a linear layer (He et al., 2015, with
    a slope of sqrt(5)), B at zero.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        hf: str,
        lora: LoraConfig,
    ):
        self.scale, self.axes, rank = lora.scale, axes, lora.rank
        hf = f"base_model.model.{hf}"
        self.a = declare(
            (inputs, rank),
            (axes[0], None),
            Uniform(inputs**-0.5),
            f"{hf}.lora_A.weight",
            HfLayout((rank, inputs)),
        )
        self.b = declare(
            (rank, outputs),
            (None, axes[1]),
            Constant(0.0),
            f"{hf}.lora_B.weight",
            HfLayout((outputs, rank)),
        )

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        low = multiply(x, self.a[...], (self.axes[0], None), self.wide_gradients)
        return self.scale * multiply(low, self.b[...], (None, self.axes[1]), self.wide_gradients)


class Linear(Weighted):
    """`x @ kernel + bias` over the last axis, in the compute dtype; with an adapter if `lora`
    targets it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        hf: str,
        *,
        init: Initialiser,
        bias: bool = False,
        dtype: Any = "float32",
        hf_shape: tuple[int, ...] | None = None,
        lora: LoraConfig = NO_LORA,
    ):
        self.dtype, self.axes = jnp.dtype(dtype), axes
        layout = HfLayout(hf_shape or (outputs, inputs))
        self.kernel = declare((inputs, outputs), axes, init, f"{hf}.weight", layout)
        bias_axis = "norm" if axes[1] == "embed" else axes[1]
        self.bias = declare((outputs,), (bias_axis,), Constant(0.0), f"{hf}.bias") if bias else None
        self.lora = Adapter(inputs, outputs, axes, hf, lora) if lora.adapts(hf) else None

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        flat = flat_rows(x).astype(self.dtype)
        y = multiply(flat, self.kernel[...], self.axes, self.wide_gradients)
        y = y if self.lora is None else y + self.lora(flat)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else add_bias(y, self.bias[...], self.wide_gradients)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, width: int, hf: str, eps: float):
        self.eps = eps
        self.scale = declare((width,), ("norm",), Constant(1.0), f"{hf}.weight")

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = without_ones(x).astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = along_last(self.scale[...].astype(jnp.float32), y) * y
        return y.astype(x.dtype).reshape(x.shape)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, computed in float32; eps as in Qwen's vision tower."""

    EPS = 1e-6

    def __init__(self, width: int, hf: str):
        self.scale = declare((width,), ("norm",), Constant(1.0), f"{hf}.weight")
        self.bias = declare((width,), ("norm",), Constant(0.0), f"{hf}.bias")

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.EPS)
        float32 = (weights[...].astype(jnp.float32) for weights in (self.scale, self.bias))
        scale, bias = (along_last(weights, y) for weights in float32)
        return (y * scale + bias).astype(x.dtype)


def scan_layers(
    stacked: nnx.Module,
    step: Callable,
    carry: Any,
    xs: Any = None,
    remat: Remat | None = None,
    unroll: bool = False,
    rows: slice = slice(None),
) -> Any:
    """`carry, y = step(layer, carry, x)` over the layers of a stacked module, by `jax.lax.scan`.

    `rows` says which of the stack. With `remat`, a layer's activations are computed again in the
    backward pass, but for those that it names; without, a CPU does as `ON_CPU` says. With
    `unroll`, the layers are compiled one by one. Layers that were unstacked (`unstack_layers`) are
    compiled one by one anyway.
    """
    graphdef, state = nnx.split(stacked)
    state = jax.tree.map(lambda weights: weights[rows], state, is_leaf=_is_unstacked)
    if any(map(_is_unstacked, jax.tree.leaves(state, is_leaf=_is_unstacked))):
        return _each_layer(graphdef, state, step, carry, xs)

    def body(carry: Any, state_and_x: Any) -> Any:
        state, x = state_and_x
        return step(nnx.merge(graphdef, state), carry, x)

    if remat is None and platform() == "cpu":
        remat = ON_CPU
    if remat is not None:
        body = jax.checkpoint(body, policy=KEPT[remat.keeps])
        if remat.block > 1:
            return _scan_blocks(body, carry, (state, xs), remat.block)
    return jax.lax.scan(body, carry, (state, xs), unroll=unroll)


def _scan_blocks(body: Callable, carry: Any, xs: Any, size: int) -> Any:
    """`jax.lax.scan` whose backward pass keeps the carry of every `size`-th step; fewer steps than
    that, at the end, are a block as well."""
    count, done, outputs = len(jax.tree.leaves(xs)[0]), 0, []
    block = jax.checkpoint(functools.partial(jax.lax.scan, body))
    while done < count:
        part = min(size, count - done)
        end = done + (count - done) // part * part
        cut = jax.tree.map(lambda x, d=done, e=end, n=part: x[d:e].reshape(-1, n, *x.shape[1:]), xs)
        carry, ys = jax.lax.scan(block, carry, cut)
        outputs.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys))
        done = end
    return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _each_layer(graphdef: Any, state: Any, step: Callable, carry: Any, xs: Any) -> Any:
    """What `jax.lax.scan` would return, over layers whose weights are arrays of their own."""
    outputs = []
    # Traced and lowered once for all layers; XLA inlines the calls, and their numbers with them.
    one = jax.jit(lambda weights, carry, x: step(nnx.merge(graphdef, weights), carry, x))
    for number in range(len(jax.tree.leaves(xs)[0])):
        weights = jax.tree.map(lambda stacked, i=number: stacked[i], state, is_leaf=_is_unstacked)
        x = jax.tree.map(lambda values, i=number: values[i], xs)
        carry, output = one(weights, carry, x)
        outputs.append(output)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)


def unstack_layers(weights: Float[Array, "l *shape"]) -> tuple[Array, ...]:
    """Stacked weights, one array per layer. A layer of a stack is copied before a product reads
    it; where few rows meet many weights, in decoding, that copy takes most of the time."""
    return tuple(weights[layer] for layer in range(weights.shape[0]))


def _is_unstacked(weights: Any) -> bool:
    return isinstance(weights, tuple)


@jax.custom_vjp
def lookup(table: Float[Array, "n d"], index: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """Rows of a table. The gradient of a small table is a matrix product, of a large one a
    scatter: on CPU a scatter costs about a microsecond per row."""
    return table[index]


def _lookup_forward(table: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return table[index], (table, index)


def _lookup_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, np.ndarray]:
    table, index = saved
    shared = splits_tokens()
    flat_index, flat_grad = (index, grad) if shared else (index.reshape(-1), flat_rows(grad))
    if table.shape[0] <= SMALL_TABLE and not shared:
        one_hot = jax.nn.one_hot(flat_index, table.shape[0], dtype=grad.dtype)
        table_grad = jnp.matmul(one_hot.T, flat_grad, precision=precision(grad.dtype))
    else:
        table_grad = jnp.zeros(table.shape, grad.dtype).at[flat_index].add(flat_grad)
    return table_grad.astype(table.dtype), np.zeros(index.shape, jax.dtypes.float0)


lookup.defvjp(_lookup_forward, _lookup_backward)


def rotate(
    x: Float[Array, "*b n h"], cos: Float[Array, "*b h2"], sin: Float[Array, "*b h2"]
) -> Float[Array, "*b n h"]:
    """Rotary embedding (Su et al., 2021) of all heads: pairs are (i, i + h/2)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
