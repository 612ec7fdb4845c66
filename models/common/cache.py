"""What decoding keeps: one cache per prompt, shared by its copies, and one per row.

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
from paravt_jax.records import LaneCache

READ_SIZES = 4
"""Attention reads the smallest of this many static parts of a cache that holds all it needs."""

Block = Float[Array, "n t k h"]


def append_and_attend(
    lanes: Sequence[LaneCache],
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m t n h"],
    key: Float[Array, "m t k h"],
    value: Float[Array, "m t k h"],
) -> tuple[Float[Array, "m t n h"], tuple[LaneCache, ...]]:
    """Write a block of new tokens to the caches of one layer and attend from it.

    Rows of the block are those of all lanes, one after the other, or the given `rows` of the
    only lane. Lengths stay as they are.
    """
    mixed, grown, start = [], [], 0
    for lane in lanes:
        count = lane.lengths.shape[0] if rows is None else rows.shape[0]
        part = slice(start, start + count)
        lane = append(lane, rows, layer, key[part], value[part])
        mixed.append(attend_lane(lane, rows, layer, query[part]))
        grown.append(lane)
        start += count
    return jnp.concatenate(mixed), tuple(grown)


def append(
    lane: LaneCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    key: Block,
    value: Block,
) -> LaneCache:
    """The cache with a block written after what each row has; what falls beyond it is dropped."""
    rows = jnp.arange(lane.lengths.shape[0]) if rows is None else rows
    slots = lane.lengths[rows][:, None] + jnp.arange(key.shape[1])
    where = (layer, rows[:, None], slice(None), slots)
    return dataclasses.replace(
        lane,
        keys=lane.keys.write(where, key),
        values=lane.values.write(where, value),
    )


def attend_lane(
    lane: LaneCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m t n h"],
) -> Float[Array, "m t n h"]:
    """Attention of a block that was just appended."""
    m, t, n, h = query.shape
    k = lane.keys.stored.shape[2]
    grouped = query.reshape(m, t, k, n // k, h).transpose(0, 2, 1, 3, 4).reshape(m, k, -1, h)
    mixed = merge(_to_prompt(lane, rows, layer, grouped), _to_own(lane, rows, layer, grouped, t))
    mixed = mixed.reshape(m, k, t, n // k, h).transpose(0, 2, 1, 3, 4)
    return mixed.reshape(m, t, n, h).astype(query.dtype)


def _to_prompt(
    lane: LaneCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m k q h"],
) -> Partial:
    """All copies of a prompt ask together; chosen rows ask alone."""
    m, k, q, h = query.shape
    together = lane.copies if rows is None else 1
    prompts = slice(None) if rows is None else rows // lane.copies
    lengths = lane.prompt_lengths[prompts]
    query = query.reshape(m // together, together, k, q, h).swapaxes(1, 2)
    query = query.reshape(m // together, k, together * q, h)

    def read(slots: int) -> Partial:
        where = (layer, prompts, slice(None), slice(0, slots))
        keys, values = (x.read(where, query.dtype) for x in (lane.prompt_keys, lane.prompt_values))
        visible = (jnp.arange(slots) < lengths[:, None])[:, None]
        return partial(query, keys, values, visible)

    def per_row(x: Array) -> Array:
        x = x.reshape(m // together, k, together, q, *x.shape[3:])
        return x.swapaxes(1, 2).reshape(m, k, q, *x.shape[4:])

    parts = _read_what_is_filled(read, lane.prompt_keys.count, jnp.max(lengths))
    return per_row(parts[0]), per_row(parts[1]), per_row(parts[2])


def _to_own(
    lane: LaneCache,
    rows: Int[Array, " m"] | None,
    layer: Int[Array, ""] | np.integer,
    query: Float[Array, "m k q h"],
    t: int,
) -> Partial:
    """Each row to its own tokens, causally."""
    chosen = slice(None) if rows is None else rows
    before = lane.lengths[chosen]
    last = before[:, None] + jnp.repeat(jnp.arange(t), query.shape[2] // t)

    def read(slots: int) -> Partial:
        where = (layer, chosen, slice(None), slice(0, slots))
        keys, values = (x.read(where, query.dtype) for x in (lane.keys, lane.values))
        visible = jnp.arange(slots) <= last[..., None]
        return partial(query, keys, values, visible)

    return _read_what_is_filled(read, lane.keys.count, jnp.max(before) + t)


def _read_what_is_filled(
    read: Callable[[int], Partial], slots: int, filled: Int[Array, ""]
) -> Partial:
    """`read` over the smallest of a few static numbers of slots that holds what is filled:
    decoding is bound by reading the cache."""
    sizes = sorted({-(-slots * part // READ_SIZES) for part in range(1, READ_SIZES + 1)})
    index = jnp.sum(filled > jnp.asarray(sizes[:-1], jnp.int32))
    return jax.lax.switch(index, [functools.partial(read, size) for size in sizes])
