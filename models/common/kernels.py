"""Kernels of attention: which there are, and how they run on a mesh, where the compiler does not
partition what it cannot look into."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paravt_jax.mesh import RULES, constrain, constrain_context, partition, splits_tokens

Kernels = Literal["auto", "reference", "splash", "cudnn"]
"""What computes attention: `reference`, products that XLA compiles; `splash` on TPUs and `cudnn` on
GPUs where they take the rows, and the reference elsewhere; `auto`, splash on TPUs."""


class AttentionSplit(NamedTuple):
    """Logical axes over which what attends is split."""

    rows: str = "batch"
    heads: str = "row_heads"


WHOLE_ROWS = AttentionSplit()
"""Each device has rows of its batch, whole, and some of their heads."""


def by_heads(
    query: Float[Array, "b t n h"], key: Float[Array, "b t k h"], value: Float[Array, "b t k h"]
) -> tuple[Float[Array, "b t n h"], Float[Array, "b t r h"], Float[Array, "b t r h"]]:
    """Where a mesh shares the tokens of rows: whole rows on each device, for some of the heads
    (DeepSpeed-Ulysses, arXiv 2309.14509), so that any mask stays what it is. Where there are fewer
    heads of keys than parts, each device gets a copy of those that its queries read."""
    if not splits_tokens():
        return query, key, value
    shape = jax.sharding.get_abstract_mesh().shape
    shards = math.prod(shape.get(axis, 1) for axis in RULES[WHOLE_ROWS.heads])
    copies = _copies(query.shape[2], key.shape[2], shards)
    if copies > 1:
        # Where the tokens are: the compiler would make whole rows of all heads first.
        key, value = (to_tokens(jnp.repeat(to_tokens(x), copies, axis=2)) for x in (key, value))
    query, key, value = (constrain(to_tokens(x), *_WHOLE) for x in (query, key, value))
    return query, key, value


def to_tokens(x: Float[Array, "b t n h"]) -> Float[Array, "b t n h"]:
    """Inverse of `by_heads` for what attention gives."""
    return constrain_context(x, "batch", "tokens", "heads", None)


_WHOLE = WHOLE_ROWS.rows, None, WHOLE_ROWS.heads, None


def on_mesh(
    attend: Callable[..., Array],
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    rows: Any = None,
    split: AttentionSplit = WHOLE_ROWS,
) -> Float[Array, "b t n h"]:
    """`attend(query, key, value, rows)`, by each device of the active mesh on its rows and heads;
    `rows` are arrays `[b, ...]`, if any.

    Keys and values are repeated where the mesh splits the queries' heads further than theirs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(query, key, value, rows)
    shape = dict(mesh.shape)
    shards = math.prod(shape.get(axis, 1) for axis in RULES[split.heads])
    copies = _copies(query.shape[2], key.shape[2], shards)
    if copies > 1:
        key, value = jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2)
    axes = split.rows, None, split.heads, None
    specs = [partition(shape, axes, x.shape) for x in (query, key, value)]
    of_rows = jax.tree.map(
        lambda x: partition(shape, (split.rows, *[None] * (x.ndim - 1)), x.shape), rows
    )
    mapped = jax.shard_map(
        attend, mesh=mesh, in_specs=(*specs, of_rows), out_specs=specs[0], check_vma=False
    )
    return mapped(query, key, value, rows)


def _copies(queries: int, keys: int, shards: int) -> int:
    """Copies of each key head, so that every device holds those that its queries read."""
    if queries % shards:
        return 1
    copies = math.lcm(keys, shards) // keys
    return copies if queries // keys % copies == 0 else queries // keys
