"""Attention through a KV cache: one per prompt, shared by its copies, and one per row.

A row attends to its prompt and to its own tokens; both results are merged by their
log-sum-exps. The prompt's keys are read once for all of its copies.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.common.attention import Partial, merge, partial
from paravt_jax.kv_cache import KVCache

READ_SIZES = 4
"""Attention reads the smallest of this many static parts of a cache that holds all it needs."""

Block = Float[Array, "n t k h"]


def append_and_attend(
    caches: Sequence[KVCache],
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m t n h"],
    key: Float[Array, "m t k h"],
    value: Float[Array, "m t k h"],
) -> tuple[Float[Array, "m t n h"], tuple[KVCache, ...]]:
    """Write a block of new tokens to the caches of one layer and attend from it.

    Rows of the block are those of all caches, one after the other, or the given `rows` of the
    only cache. Lengths stay as they are.
    """
    mixed, grown, start = [], [], 0
    for cache in caches:
        count = cache.lengths.shape[0] if rows is None else rows.shape[0]
        part = slice(start, start + count)
        cache = append(cache, rows, layer, key[part], value[part])
        mixed.append(attend_cached(cache, rows, layer, query[part]))
        grown.append(cache)
        start += count
    return jnp.concatenate(mixed), tuple(grown)


def append(
    cache: KVCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    key: Block,
    value: Block,
) -> KVCache:
    """The cache with a block written after what each row has; what falls beyond it is dropped."""
    rows = jnp.arange(cache.lengths.shape[0]) if rows is None else rows
    slots = cache.lengths[rows][:, None] + jnp.arange(key.shape[1])[None]
    # Heads are indexed too: with a slice for them, XLA scatters windows of heads, for which a TPU
    # copies the whole cache to another layout and back at every token.
    heads = jnp.arange(key.shape[2])
    where = (layer, rows[:, None, None], heads, slots[..., None])
    return dataclasses.replace(
        cache,
        keys=cache.keys.write(where, key),
        values=cache.values.write(where, value),
    )


def attend_cached(
    cache: KVCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m t n h"],
) -> Float[Array, "m t n h"]:
    """Attention of a block that was just appended."""
    m, t, n, h = query.shape
    k = cache.keys.stored.shape[2]
    grouped = query.reshape(m, t, k, n // k, h).transpose(0, 2, 1, 3, 4).reshape(m, k, -1, h)
    mixed = merge(
        _to_prompt(cache, rows, layer, grouped), _to_suffix(cache, rows, layer, grouped, t)
    )
    mixed = mixed.reshape(m, k, t, n // k, h).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(m, t, n, h).astype(query.dtype)


def _to_prompt(
    cache: KVCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m k q h"],
) -> Partial:
    """All copies of a prompt ask together; chosen rows ask alone."""
    m, k, q, h = query.shape
    together = cache.copies if rows is None else 1
    prompts = slice(None) if rows is None else rows // cache.copies
    lengths = cache.prompt_lengths[prompts]
    query = query.reshape(m // together, together, k, q, h).swapaxes(1, 2)
    query = query.reshape(m // together, k, together * q, h)

    def read(slots: int) -> Partial:
        where = (layer, prompts, slice(None), slice(0, slots))
        keys, values = (
            x.read(where, query.dtype) for x in (cache.prompt_keys, cache.prompt_values)
        )
        visible = (jnp.arange(slots)[None] < lengths[:, None])[:, None]
        return partial(query, keys, values, visible)

    def per_row(x: Array) -> Array:
        x = x.reshape(m // together, k, together, q, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(m, k, q, *x.shape[4:])

    parts = _read_filled(read, cache.prompt_keys.count, jnp.max(lengths))
    return per_row(parts[0]), per_row(parts[1]), per_row(parts[2])


def _to_suffix(
    cache: KVCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m k q h"],
    t: int,
) -> Partial:
    """Each row to the tokens after its prompt, causally."""
    chosen = slice(None) if rows is None else rows
    before = cache.lengths[chosen]
    last = before[:, None] + jnp.repeat(jnp.arange(t), query.shape[2] // t)[None]

    def read(slots: int) -> Partial:
        where = (layer, chosen, slice(None), slice(0, slots))
        keys, values = (x.read(where, query.dtype) for x in (cache.keys, cache.values))
        visible = jnp.arange(slots)[None, None] <= last[..., None]
        return partial(query, keys, values, visible)

    return _read_filled(read, cache.keys.count, jnp.max(before) + t)


def _read_filled(read: Callable[[int], Partial], slots: int, filled: Int[Array, ""]) -> Partial:
    """`read` over the smallest of a few static numbers of slots that holds what is filled:
    decoding is bound by reading the cache."""
    sizes = sorted({-(-slots * part // READ_SIZES) for part in range(1, READ_SIZES + 1)})
    index = jnp.sum(filled > jnp.asarray(sizes[:-1], jnp.int32))
    return jax.lax.switch(index, [functools.partial(read, size) for size in sizes])
