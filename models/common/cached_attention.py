"""Attention through a KV cache: one per prompt, shared by its copies, and one per row.

A row attends to its prompt and to its own tokens; both results are merged by their
log-sum-exps. The prompt's keys are read once for all of its copies.

A row's own tokens lie in pages. To decode, queries go to the pages, which are read where they
lie: gathering them would move the cache twice, and a query is much smaller than a page, so that
plain XLA does without a kernel. A longer block walks through the pages of its rows: it computes
more than it reads.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.common.attention import HIDDEN, Partial, join, merge, partial
from paravt_jax.kv_cache import CacheArray, KVCache
from paravt_jax.mesh import platform

READ_SIZES = 4
"""Attention reads the smallest of this many static parts of a cache that holds all it needs."""
LEAST_PART = 2**18
"""Bytes of such a part: one that reads fewer saves less time than compiling it takes."""

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
    only cache. Lengths stay as they are. Layers take turns: the next one comes first in what is
    returned, and after the last one the first.
    """
    mixed, grown, start = [], [], 0
    for cache in caches:
        count = cache.lengths.shape[0] if rows is None else rows.shape[0]
        part = slice(start, start + count)
        cache = append(cache, rows, layer, key[part], value[part])
        mixed.append(attend_cached(cache, rows, layer, query[part]))
        grown.append(cache.turned())
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
    at = jnp.asarray(cache.lengths)[rows][:, None] + jnp.arange(key.shape[1])[None]
    pages, slots = cache.places(rows, at)
    # Heads are indexed too: with a slice for them, XLA scatters windows of heads, for which a TPU
    # copies the whole cache to another layout and back at every token.
    heads = jnp.arange(key.shape[2])
    where = (pages[..., None], heads, slots[..., None])
    return dataclasses.replace(
        cache,
        keys=cache.keys.write(layer, where, key),
        values=cache.values.write(layer, where, value),
    )


def attend_cached(
    cache: KVCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m t n h"],
) -> Float[Array, "m t n h"]:
    """Attention of a block that was just appended."""
    m, t, n, h = query.shape
    k = cache.keys.shape[2]
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
        where = (prompts, slice(None), slice(0, slots))
        keys, values = (
            x.read(layer, where, query.dtype) for x in (cache.prompt_keys, cache.prompt_values)
        )
        visible = (jnp.arange(slots)[None] < lengths[:, None])[:, None]
        return partial(query, keys, values, visible)

    def per_row(x: Array) -> Array:
        x = x.reshape(m // together, k, together, q, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(m, k, q, *x.shape[4:])

    parts = _read_filled(read, _parts(cache.prompt_keys, cache.prompt_keys.count), jnp.max(lengths))
    return per_row(parts[0]), per_row(parts[1]), per_row(parts[2])


def _to_suffix(
    cache: KVCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m k q h"],
    t: int,
) -> Partial:
    """Each row to the tokens after its prompt, causally."""
    before = jnp.asarray(cache.lengths) if rows is None else jnp.asarray(cache.lengths)[rows]
    if rows is None and t == 1:
        return _from_pages(cache, layer, query, before)
    return _through_pages(cache, rows, layer, query, before, t)


def _from_pages(
    cache: KVCache,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "n k q h"],
    last: Int[Array, " n"],
) -> Partial:
    """A token of each row to its row: each page answers the query of the row that has it."""
    groups, per_group, _ = cache.table.pages.shape
    query, last = (x.reshape(groups, per_group, *x.shape[1:]) for x in (query, last))

    def read(count: int) -> Partial:
        owners, order = (jnp.asarray(x)[:, :count] for x in (cache.table.owners, cache.table.order))
        keys, values = (
            x.first_pages(layer, groups, count, query.dtype) for x in (cache.keys, cache.values)
        )
        slots = order[..., None] * cache.keys.count + jnp.arange(cache.keys.count)[None, None]
        visible = slots <= _of_owners(last, owners)[..., None]
        visible = visible & (owners < per_group)[..., None]
        asked = _of_owners(query, owners)
        asked, visible = (x.reshape(-1, *x.shape[2:]) for x in (asked, visible[:, :, None]))
        return _join_pages(partial(asked, keys, values, visible), owners, per_group)

    taken = jnp.asarray(cache.table.owners) < per_group
    count = taken.shape[1]
    filled = jnp.max(jnp.where(taken, jnp.arange(1, count + 1)[None], 0))
    return _read_filled(read, _parts(cache.keys, count), filled)


def _of_owners(x: Array, owners: Int[Array, "g u"]) -> Array:
    """What rows `[g, r, ...]` have, for each of their pages; anything for free pages."""
    return jax.vmap(lambda x, owners: x.at[owners].get(mode="clip"))(x, owners)


def _join_pages(
    part: Partial, owners: Int[Array, "g u"], per_group: int
) -> tuple[Array, Array, Array]:
    """What the pages of each row found, together: a `Partial` of rows. By products with 0 and 1,
    which devices do faster than scattered sums."""
    groups, count = owners.shape
    mixed, largest, total = (x.reshape(groups, count, *x.shape[1:]) for x in part)
    belongs = owners[:, None] == jnp.arange(per_group, dtype=owners.dtype)[None, :, None]
    most = jnp.max(jnp.where(belongs[..., None, None], largest[:, None], HIDDEN), axis=2)
    scale = jnp.exp(largest - _of_owners(most, owners))

    def summed(x: Array) -> Array:
        exact = jax.lax.Precision.HIGHEST
        sums = jnp.einsum("gru,gu...->gr...", belongs.astype(x.dtype), x, precision=exact)
        return sums.reshape(-1, *sums.shape[2:])

    most = most.reshape(-1, *most.shape[2:])
    return summed(mixed * scale[..., None]), most, summed(total * scale)


def _through_pages(
    cache: KVCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m k q h"],
    before: Int[Array, " m"],
    t: int,
) -> Partial:
    """A block to its rows, page after page."""
    size, m = cache.keys.count, len(query)
    last = before[:, None] + jnp.repeat(jnp.arange(t), query.shape[2] // t)[None]
    ids = jnp.asarray(cache.table.pages)
    if rows is not None:
        starts = jnp.arange(ids.shape[2])[None] * size
        ids = cache.places(rows, jnp.broadcast_to(starts, (m, ids.shape[2])))[0][None]

    def read(number: Int[Array, ""], so_far: Partial) -> Partial:
        own = jax.lax.dynamic_index_in_dim(ids, number, 2, keepdims=False)
        keys, values = (x.pages(layer, own, query.dtype) for x in (cache.keys, cache.values))
        slots = number * size + jnp.arange(size)
        visible = slots[None, None] <= last[..., None]
        return join(so_far, partial(query, keys, values, visible))

    nothing = jnp.zeros(query.shape, jnp.float32), *_no_scores(query.shape[:-1])
    most = jnp.minimum(jnp.max(last) // size + 1, ids.shape[2])
    return jax.lax.fori_loop(0, most, read, nothing)


def _no_scores(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The largest score and the sum of weights where nothing was looked at."""
    return jnp.full(shape, HIDDEN, jnp.float32), jnp.zeros(shape, jnp.float32)


def _parts(keys: CacheArray, count: int) -> list[int]:
    """The static numbers of slots, or of pages, of `count` that attention can read."""
    if platform() == "cpu":
        # A product reads a whole array where it lies. A part of one is copied first, so that half
        # of an array takes as long as all of it.
        return [count]
    both = 2 * math.prod(keys.shape[1:]) * keys.dtype.itemsize
    parts = min(max(both // LEAST_PART, 1), READ_SIZES)
    return sorted({-(-count * part // parts) for part in range(1, parts + 1)})


def _read_filled(
    read: Callable[[int], Partial], sizes: Sequence[int], filled: Int[Array, ""]
) -> Partial:
    """`read` over the smallest of these numbers of slots that holds what is filled: decoding is
    bound by reading the cache."""
    index = jnp.sum(filled > jnp.asarray(sizes[:-1], jnp.int32))
    return jax.lax.switch(index, [functools.partial(read, size) for size in sizes])
