"""Sparse mixture of experts (Shazeer et al., 2017), as in Qwen3-VL's 30B-A3B and 235B-A22B.

Each token goes to its `k` best experts. Rows are sorted by expert, so that every expert is one
product over its own rows and no row is dropped or padded to a capacity.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.common.layers import ACTIVATIONS, Linear
from models.common.products import Weighted, precision
from paravt_jax.mesh import partition, platform
from paravt_jax.params import HfLayout, Normal, declare

BLOCK = 32
"""Rows that are multiplied with one expert at a time on CPU."""


class Routed(NamedTuple):
    """What a router did, or those of all sparse layers, whose axis then comes first."""

    logits: Float[Array, "*l b t e"]
    choices: Int[Array, "*l b t k"] | None
    """Which experts served each token."""


class Experts(Weighted):
    """Router and SwiGLU experts: the MLP of a sparse decoder layer."""

    def __init__(
        self,
        d: int,
        width: int,
        count: int,
        per_token: int,
        act: str,
        init: Normal,
        hf: str,
        dtype: Any,
    ):
        """`count` experts from `d` to `width` and back, of which a token uses `per_token`."""
        e = count
        self.act, self.dtype, self.per_token = act, jnp.dtype(dtype), per_token
        # Close choices between experts flip with rounding, so the router works in float32.
        self.router = Linear(d, e, ("embed", None), hf + "gate", init=init, dtype="float32")
        # Gate and up have a dimension of their own: splitting the width keeps them together.
        self.gate_up = declare(
            (e, d, 2, width),
            ("expert", "embed", None, "mlp"),
            init,
            hf + "experts.gate_up_proj",
            *_layouts(e, d, 2 * width),
        )
        self.down = declare(
            (e, width, d),
            ("expert", "mlp", "embed"),
            init,
            hf + "experts.down_proj",
            *_layouts(e, width, d),
        )

    def __call__(
        self, x: Float[Array, "b t d"], replayed: Int[Array, "b t k"] | None = None
    ) -> tuple[Float[Array, "b t d"], Routed]:
        """Mixed outputs, and what the router did.

        Where `replayed` is not negative it says which experts serve a token, in place of the
        router's choice. Their shares are the router's in either case, and so are their gradients.
        """
        logits = self.router(x)
        probabilities = jax.nn.softmax(logits, axis=-1)
        chosen, choices = jax.lax.top_k(probabilities, self.per_token)
        if replayed is not None:
            choices = jnp.where(replayed >= 0, replayed.astype(choices.dtype), choices)
            chosen = jnp.take_along_axis(probabilities, choices, axis=-1)
        shares = chosen / jnp.sum(chosen, axis=-1, keepdims=True)
        with jax.named_scope("experts"):
            return self._mix(x, choices, shares), Routed(logits, choices)

    def _mix(
        self, x: Float[Array, "b t d"], choices: Int[Array, "b t k"], shares: Float[Array, "b t k"]
    ) -> Float[Array, "b t d"]:
        """On a mesh, each device serves its own experts for the rows of all devices that hold
        the others, and the parts are added up."""
        gate_up, down = self.gate_up[...], self.down[...]
        if not self.wide_gradients:
            gate_up, down = gate_up.astype(self.dtype), down.astype(self.dtype)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return mix(x, choices, shares, gate_up, down, self.act, self.dtype)
        # Gathered, not exchanged: the sizes of an exchange would depend on the data.
        split = functools.partial(partition, dict(mesh.shape))
        rows = split(("expert_batch", "tokens", None), x.shape)
        wide = split(("expert", None, None, "mlp"), gate_up.shape)
        narrow = split(("expert", "mlp", None), down.shape)
        return jax.shard_map(
            functools.partial(_mix_local, act=self.act, dtype=self.dtype, split=wide),
            in_specs=(rows, rows, rows, wide, narrow),
            out_specs=rows,
            # The types of varying values do not follow through custom gradients.
            check_vma=False,
        )(x, choices, shares, gate_up, down)


def _layouts(experts: int, inputs: int, outputs: int) -> tuple[HfLayout, ...]:
    """The released checkpoints (transformers 4.57) keep `[e, in, out]`; transformers 5 writes
    `[e, out, in]` for models it made itself, and reads a square tensor as that."""
    released = HfLayout((experts, inputs, outputs), swapped=False)
    transposed = HfLayout((experts, outputs, inputs), batch=1)
    return (transposed,) if inputs == outputs else (released, transposed)


def _mix_local(
    x: Array,
    choices: Array,
    shares: Array,
    gate_up: Array,
    down: Array,
    act: str,
    dtype: Any,
    split: Any,
) -> Array:
    """What the experts and the slice of their width on this device add."""
    first = jax.lax.axis_index("expert") * gate_up.shape[0] if split[0] else 0
    partial = mix(x, choices - first, shares, gate_up, down, act, dtype)
    owners = tuple(axis for axis in jax.tree.leaves(tuple(split)) if axis is not None)
    return jax.lax.psum(partial, owners) if owners else partial


def mix(
    x: Float[Array, "b t d"],
    choices: Int[Array, "b t k"],
    shares: Float[Array, "b t k"],
    gate_up: Float[Array, "e d 2 i"],
    down: Float[Array, "e i d"],
    act: str,
    dtype: Any,
) -> Float[Array, "b t d"]:
    """Sum over each row's choices of share times expert, with products in `dtype`; a choice outside
    [0, e) adds nothing."""
    e, d, _, width = gate_up.shape
    k = choices.shape[-1]
    flat = choices.reshape(-1)
    served = (flat >= 0) & (flat < e)
    # Rows of other devices' experts go to the end, behind all groups.
    order = jnp.argsort(jnp.where(served, flat, e), stable=True)
    back = jnp.argsort(order)
    sizes = jnp.sum(flat[:, None] == jnp.arange(e)[None], axis=0, dtype=jnp.int32)
    rows = jnp.repeat(x.reshape(-1, d).astype(dtype), k, axis=0)
    # Rows of other devices' experts come out undefined, and so do their gradients.
    rows = permute(jnp.where(served[:, None], rows, 0), order, back)
    wide = grouped_matmul(rows, gate_up.reshape(e, d, 2 * width), sizes)
    gate, up = jnp.split(wide, 2, axis=-1)
    mixed = grouped_matmul(ACTIVATIONS[act](gate) * up, down, sizes)
    mixed = jnp.where(served[:, None], permute(mixed, back, order).astype(jnp.float32), 0)
    mixed = mixed.reshape(-1, k, d) * shares.reshape(-1, k, 1)
    return jnp.sum(mixed, axis=1).reshape(x.shape).astype(x.dtype)


@jax.custom_vjp
def permute(
    rows: Float[Array, "m d"], order: Int[Array, " m"], back: Int[Array, " m"]
) -> Float[Array, "m d"]:
    """`rows[order]`, where `back` is the inverse permutation: the gradient is a gather too."""
    return rows[order]


permute.defvjp(
    lambda rows, order, back: (rows[order], (order, back)),
    lambda saved, grad: (grad[saved[1]], *(np.zeros(i.shape, jax.dtypes.float0) for i in saved)),
)


def grouped_matmul(
    rows: Float[Array, "m d"], weights: Float[Array, "e d f"], sizes: Int[Array, " e"]
) -> Float[Array, "m f"]:
    """Each group of consecutive rows times its own matrix, in the type of the rows; the gradient
    of the matrices is in their own. Rows beyond the groups are undefined.

    On CPU `jax.lax.ragged_dot` multiplies all rows with all matrices; blocks cost only theirs.
    """
    if platform() == "cpu":
        # 4,096 rows and 32 experts of 256 x 256: 7 ms instead of 210 (`docs/log.md`).
        return _blocked_matmul(rows, weights, sizes)
    if weights.dtype != rows.dtype:
        return _wide_ragged(rows, weights, sizes)
    return jax.lax.ragged_dot(rows, weights, sizes, precision=precision(rows.dtype))


@jax.custom_vjp
def _wide_ragged(rows: Array, weights: Array, sizes: Array) -> Array:
    kernel = weights.astype(rows.dtype)
    return jax.lax.ragged_dot(rows, kernel, sizes, precision=precision(rows.dtype))


def _ragged_backward(saved: Any, grad: Array) -> tuple[Array, Array, np.ndarray]:
    rows, weights, sizes = saved
    weights_grad = jax.lax.ragged_dot_general(
        rows,
        grad,
        sizes,
        _OUTER,
        precision=precision(rows.dtype),
        preferred_element_type=weights.dtype,
    )
    rows_grad = _wide_ragged(grad, weights.swapaxes(1, 2), sizes)
    return rows_grad, weights_grad, np.zeros(sizes.shape, jax.dtypes.float0)


_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)
"""A matrix for each group of rows, summed over them."""
_wide_ragged.defvjp(
    lambda rows, weights, sizes: (_wide_ragged(rows, weights, sizes), (rows, weights, sizes)),
    _ragged_backward,
)


@jax.custom_vjp
def _blocked_matmul(rows: Array, weights: Array, sizes: Array) -> Array:
    source, place, owner = _blocks(rows.shape[0], sizes)

    def product(_: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        tile, expert = block
        kernel = weights[expert].astype(tile.dtype)
        return None, jnp.matmul(tile, kernel, precision=precision(tile.dtype))

    _, products = jax.lax.scan(product, None, (_gather(rows, source), owner))
    return products.reshape(-1, weights.shape[-1])[place]


def _blocked_forward(rows: Array, weights: Array, sizes: Array) -> tuple[Array, Any]:
    return _blocked_matmul(rows, weights, sizes), (rows, weights, sizes)


def _blocked_backward(saved: Any, grad: Array) -> tuple[Array, Array, np.ndarray]:
    rows, weights, sizes = saved
    source, _, owner = _blocks(rows.shape[0], sizes)

    def add(weights_grad: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        tile, tile_grad, expert = block
        outer = jnp.matmul(
            tile.T, tile_grad, precision=precision(tile.dtype), preferred_element_type=weights.dtype
        )
        return weights_grad.at[expert].add(outer), None

    blocks = (_gather(rows, source), _gather(grad, source), owner)
    weights_grad, _ = jax.lax.scan(add, jnp.zeros_like(weights), blocks)
    # Rows beyond the groups went nowhere, whatever their gradient says.
    used = (jnp.arange(rows.shape[0]) < jnp.sum(sizes))[:, None]
    rows_grad = jnp.where(used, _blocked_matmul(grad, weights.swapaxes(1, 2), sizes), 0)
    return rows_grad, weights_grad, np.zeros(sizes.shape, jax.dtypes.float0)


_blocked_matmul.defvjp(_blocked_forward, _blocked_backward)


def _blocks(m: int, sizes: Int[Array, " e"]) -> tuple[Array, Array, Array]:
    """Groups laid out in blocks of `BLOCK` rows that belong to one group each.

    Returns the row in each place of each block (-1 for none), the place of each row, and the
    group of each block.
    """
    e = sizes.shape[0]
    # Each group may leave one block half empty, and there are at most as many groups as rows.
    count = m // BLOCK + min(e, m)
    needed = -(-sizes // BLOCK)
    ends, block_ends = jnp.cumsum(sizes), jnp.cumsum(needed)
    # A binary search would be a loop on the device; comparing with all e ends is one operation.
    owner = jnp.minimum(
        jnp.searchsorted(block_ends, jnp.arange(count), side="right", method="compare_all"), e - 1
    )
    within = (jnp.arange(count) - (block_ends - needed)[owner])[:, None] * BLOCK
    within = within + jnp.arange(BLOCK)[None]
    source = jnp.where(within < sizes[owner][:, None], (ends - sizes)[owner][:, None] + within, -1)
    group = jnp.minimum(
        jnp.searchsorted(ends, jnp.arange(m), side="right", method="compare_all"), e - 1
    )
    place = (block_ends - needed)[group] * BLOCK + jnp.arange(m) - (ends - sizes)[group]
    return source, jnp.minimum(place, count * BLOCK - 1), owner


def _gather(rows: Float[Array, "m d"], source: Int[Array, "n p"]) -> Float[Array, "n p d"]:
    return jnp.where((source >= 0)[..., None], rows[jnp.maximum(source, 0)], 0)
