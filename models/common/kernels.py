"""Kernels of attention: which there are, and how they run on a mesh, where the compiler does not
partition what it cannot look into."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paravt_jax.mesh import partition

Kernels = Literal["auto", "reference", "splash", "cudnn"]
"""What computes attention: `reference`, products that XLA compiles; `splash` on TPUs and `cudnn` on
GPUs where they take the rows, and the reference elsewhere; `auto`, splash on TPUs."""


def on_mesh(
    attend: Callable[..., Array],
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    rows: Any = None,
) -> Float[Array, "b t n h"]:
    """`attend(query, key, value, rows)`, by each device of the active mesh on its rows and heads;
    `rows` are arrays `[b, ...]`, if any.

    Keys and values are repeated where the mesh splits the queries' heads further than theirs.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(query, key, value, rows)
    shape = dict(mesh.shape)
    copies = _copies(query.shape[2], key.shape[2], shape.get("tensor", 1))
    if copies > 1:
        key, value = jnp.repeat(key, copies, axis=2), jnp.repeat(value, copies, axis=2)
    specs = [partition(shape, ("batch", None, "heads", None), x.shape) for x in (query, key, value)]
    of_rows = jax.tree.map(
        lambda x: partition(shape, ("batch", *[None] * (x.ndim - 1)), x.shape), rows
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
