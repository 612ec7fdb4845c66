"""Attention behind one dispatch function, with a plain reference that every path must equal.

On TPUs and GPUs it is a kernel (`models.common.splash`, `models.common.cudnn`), elsewhere products
that XLA compiles (ADR 25).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from models.common import cudnn, splash
from models.common.products import precision
from paravt_jax.records import HiddenKeys, SharedPrefix

QUERY_CHUNK = 96
"""Causal attention is computed in chunks of queries that see only the keys before their end:
at 368 tokens that skips three eighths of the products."""

UNROLLED = 4096
"""Chunks of rows of more tokens are computed in loops: unrolled, each takes seconds to compile (a
TPU's compiler: docs/log.md), and its weights wait in memory for the backward pass."""

LOOPS = 2
"""Loops over a long row: each sees the keys before its end, 3/4 of all instead of 1/2. More of them
would compute less and compile longer."""

HIDDEN = -1e30
"""Score of an invisible key: finite, so that a row with no visible key gives no NaN."""

TINY = 1e-30


def attend(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    *,
    causal: bool = False,
    key_lengths: Int[Array, " b"] | None = None,
    segments: Int[Array, "b s"] | None = None,
    hidden_keys: HiddenKeys | None = None,
    shared: SharedPrefix | None = None,
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped heads, scaled by `h**-0.5`.

    Query i of row b sees key j if `j < key_lengths[b]` (when given), when `causal`, `j <= i`, and
    when there are `segments`, both are of the same one, and `hidden_keys` does not hide j from i
    (queries and keys then being the same tokens). Query head `n` reads key head `n // (n/k)`.
    Where queries and keys are the same tokens, what is mixed for those beyond `key_lengths` means
    nothing.

    With `shared`, queries and keys are rows of prompts, of `key_lengths` tokens, and of the streams
    that continue them, causal as `SharedPrefix` says; the keys of a prompt are there once, whatever
    the number of streams. Other masks do not go with it.
    """
    if shared is not None and key_lengths is not None:
        if splash.serves(query, key):
            layout = {"lanes": shared.lanes, "prompt": shared.prompt, "causal": True}
            padding = jnp.where(_no_padding(query.shape[1], shared, key_lengths), 0, -1)
            return splash.attend(query, key, value, segments=padding, **layout)
        if cudnn.serves(query, key):
            lanes, prompt = shared.lanes, shared.prompt
            return cudnn.attend(query, key, value, lengths=key_lengths, lanes=lanes, prompt=prompt)
        return _shared(query, key, value, shared, key_lengths)
    if hidden_keys is None and splash.serves(query, key):
        segments = _within(key_lengths, key.shape[1], segments)
        return splash.attend(query, key, value, causal=causal, segments=segments)
    if hidden_keys is None and segments is None and cudnn.serves(query, key):
        every = jnp.full(key.shape[0], key.shape[1], jnp.int32)
        lengths = None if causal else every if key_lengths is None else key_lengths
        return cudnn.attend(query, key, value, lengths=lengths)
    if causal and key_lengths is None and query.shape[1] > QUERY_CHUNK:
        return _causal_chunks(query, key, value, segments, hidden_keys)
    limits = key_lengths, segments, hidden_keys
    visible = visibility(query.shape[1], key.shape[1], causal, 0, *limits)
    return reference(query, key, value, visible)


def _within(
    lengths: Int[Array, " b"] | None, slots: int, segments: Int[Array, "b s"] | None
) -> Int[Array, "b s"] | None:
    """Segments, in which what lies beyond the lengths is one of its own."""
    if lengths is None:
        return segments
    return jnp.where(
        jnp.arange(slots)[None] < lengths[:, None], 0 if segments is None else segments, -1
    )


def visibility(
    queries: int,
    keys: int,
    causal: bool,
    first: int | Int[Array, ""] = 0,
    key_lengths: Int[Array, " b"] | None = None,
    segments: Int[Array, "b tokens"] | None = None,
    hidden_keys: HiddenKeys | None = None,
) -> Bool[Array, "#b #t s"] | None:
    """Which keys each query sees (see `attend`), the first query being number `first`; None when
    all are visible. This is the only place that decides it: kernels that take segment ids
    (splash, cuDNN) get them as they are."""
    slots, masks = jnp.arange(keys, dtype=jnp.int32), []
    if key_lengths is not None:
        masks.append(slots[None, None, :] < key_lengths[:, None, None])
    if causal:
        last = first + jnp.arange(queries, dtype=jnp.int32)
        masks.append((slots[None] <= last[:, None])[None])
    if segments is not None:
        asking = jax.lax.dynamic_slice_in_dim(segments, first, queries, axis=1)
        masks.append(asking[:, :, None] == segments[:, None, :keys])
    if hidden_keys is not None:
        masks.append(hidden_keys.visible(queries, keys, first))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def reference(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    visible: Bool[Array, "#b #t s"] | None,
) -> Float[Array, "b t n h"]:
    """The plain computation; softmax in float32.

    Weights are normalised after they mixed the values: that touches `h` numbers per query
    instead of `s`, which halves the time of the backward pass on CPU.
    """
    b, t, n, h = query.shape
    k, exact = key.shape[2], precision(query.dtype)
    grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("bkqh,bksh->bkqs", grouped, key, precision=exact)
    weights = _unnormalised(scores.reshape(b, k, n // k, t, -1), h, visible).reshape(scores.shape)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(value.dtype), value, precision=exact)
    mixed = mixed.astype(jnp.float32) / jnp.sum(weights, axis=-1, keepdims=True)
    mixed = mixed.reshape(b, k, n // k, t, h).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(b, t, n, h).astype(query.dtype)


def _unnormalised(
    scores: Float[Array, "b k g t s"], h: int, visible: Bool[Array, "#b #t s"] | None
) -> Float[Array, "b k g t s"]:
    """Exponentials of the scaled scores, the largest of each query being 1."""
    scores = scores.astype(jnp.float32) * h**-0.5
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, HIDDEN)
    return jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))


def _causal_chunks(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    hidden_keys: HiddenKeys | None,
) -> Array:
    if query.shape[1] > UNROLLED:
        return _causal_loops(query, key, value, segments, hidden_keys)
    chunks = []
    for start in range(0, query.shape[1], QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, query.shape[1])
        visible = visibility(end - start, end, True, start, None, segments, hidden_keys)
        chunks.append(reference(query[:, start:end], key[:, :end], value[:, :end], visible))
    return jnp.concatenate(chunks, axis=1)


def _causal_loops(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    hidden_keys: HiddenKeys | None,
) -> Array:
    """As `_causal_chunks`, in a few loops; a chunk's weights are computed again in the backward
    pass."""
    (b, t), count = query.shape[:2], -(-query.shape[1] // QUERY_CHUNK)
    tokens = query, key, value, segments, hidden_keys
    query, key, value, segments, hidden_keys = jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (0, count * QUERY_CHUNK - t)] + [(0, 0)] * (x.ndim - 2)),
        tokens,
    )
    chunks = query.reshape(b, count, QUERY_CHUNK, *query.shape[2:]).swapaxes(0, 1)

    def loop(numbers: np.ndarray) -> Array:
        end = (int(numbers[-1]) + 1) * QUERY_CHUNK

        @jax.checkpoint
        def chunk(number_and_query: tuple[Array, Array]) -> Array:
            first, query = number_and_query[0] * QUERY_CHUNK, number_and_query[1]
            visible = visibility(
                QUERY_CHUNK, end, True, first, segments=segments, hidden_keys=hidden_keys
            )
            return reference(query, key[:, :end], value[:, :end], visible)

        return jax.lax.map(chunk, (jnp.asarray(numbers), chunks[numbers[0] : numbers[-1] + 1]))

    parts = np.array_split(np.arange(count, dtype=np.int32), LOOPS)
    mixed = jnp.concatenate([loop(numbers) for numbers in parts])
    return mixed.swapaxes(0, 1).reshape(b, -1, *query.shape[2:])[:, :t]


def _no_padding(slots: int, shared: SharedPrefix, lengths: Int[Array, " b"]) -> Bool[Array, "b t"]:
    """Which slots are no padding of a prompt. That of a lane stands behind all of its tokens, where
    none sees it."""
    at = jnp.arange(slots)[None]
    return (at >= shared.prompt) | (at < lengths[:, None])


def _shared(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    shared: SharedPrefix,
    lengths: Int[Array, " b"],
) -> Float[Array, "b t n h"]:
    """Prompts among themselves, then lanes to prompts and to themselves, in chunks of queries."""
    p, own = shared.prompt, (query.shape[1] - shared.prompt) // shared.lanes
    prompts = attend(query[:, :p], key[:, :p], value[:, :p], causal=True)
    queries = _by_lane(query[:, p:], shared.lanes, key.shape[2])
    keys, values = (_by_lane(x[:, p:], shared.lanes, x.shape[2]) for x in (key, value))
    before = tuple(x[:, :p].swapaxes(1, 2) for x in (key, value))
    in_prompt = _no_padding(p, shared, lengths)[:, None, None, None]
    chunks = []
    for start in range(0, own, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, own)
        after = tuple(x[:, :, :, 0, :end] for x in (keys, values))
        visible = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
        in_lane = jnp.tile(visible, (queries.shape[3], 1))[None, None, None]
        chunks.append(_two_parts(queries[..., start:end, :], before, after, in_prompt, in_lane))
    lanes = jnp.concatenate(chunks, axis=4).transpose(0, 2, 4, 1, 3, 5)
    return jnp.concatenate([prompts, lanes.reshape(query[:, p:].shape)], axis=1)


def _by_lane(
    x: Float[Array, "b t n h"], lanes: int, kv: int
) -> Float[Array, "b k lanes grouped own h"]:
    """What stands in lanes, heads first."""
    b, _, n, h = x.shape
    return x.reshape(b, lanes, -1, kv, n // kv, h).transpose(0, 3, 1, 4, 2, 5)


def _two_parts(
    query: Float[Array, "b k lanes grouped c h"],
    before: tuple[Float[Array, "b k p h"], ...],
    after: tuple[Float[Array, "b k lanes s h"], ...],
    in_prompt: Bool[Array, "b 1 1 1 p"],
    in_lane: Bool[Array, "1 1 1 q s"],
) -> Float[Array, "b k lanes grouped c h"]:
    """`reference` over the keys of a prompt and those of each lane, with one softmax: the queries
    of all lanes meet one copy of the prompt's keys in one product."""
    b, k, lanes, grouped, c, h = query.shape
    exact = precision(query.dtype)
    together, apart = query.reshape(b, k, -1, h), query.reshape(b, k, lanes, -1, h)
    first = jnp.einsum("bkqh,bksh->bkqs", together, before[0], precision=exact)
    second = jnp.einsum("bklqh,bklsh->bklqs", apart, after[0], precision=exact)
    parts = first.reshape(b, k, lanes, grouped * c, -1), second
    scores = [
        jnp.where(visible, part.astype(jnp.float32) * h**-0.5, HIDDEN)
        for part, visible in zip(parts, (in_prompt, in_lane), strict=True)
    ]
    largest = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in scores))
    weights = [jnp.exp(x - jax.lax.stop_gradient(largest)) for x in scores]
    first, second = (x.astype(query.dtype) for x in weights)
    first = first.reshape(b, k, lanes * grouped * c, -1)
    mixed = jnp.einsum("bkqs,bksh->bkqh", first, before[1], precision=exact).reshape(apart.shape)
    mixed += jnp.einsum("bklqs,bklsh->bklqh", second, after[1], precision=exact)
    total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
    return (mixed.astype(jnp.float32) / total).reshape(query.shape).astype(query.dtype)


Partial = tuple[Float[Array, "b k q h"], Float[Array, "b k q"], Float[Array, "b k q"]]
"""Attention to some of the keys, float32: values mixed with weights `exp(score - largest)`, the
largest score, and the sum of the weights."""


def partial(
    query: Float[Array, "b k q h"],
    key: Float[Array, "b k s h"],
    value: Float[Array, "b k s h"],
    visible: Bool[Array, "b #q s"],
) -> Partial:
    """Attention to these keys alone, to be merged with that to others (`merge`)."""
    exact = precision(query.dtype)
    scores = jnp.einsum("bkqh,bksh->bkqs", query, key, precision=exact).astype(jnp.float32)
    scores = jnp.where(visible[:, None], scores * query.shape[-1] ** -0.5, HIDDEN)
    largest = jnp.max(scores, axis=-1)
    # Where nothing is visible all weights would be 1: they must be 0.
    weights = jnp.where(visible[:, None], jnp.exp(scores - largest[..., None]), 0)
    mixed = jnp.einsum("bkqs,bksh->bkqh", weights.astype(value.dtype), value, precision=exact)
    return mixed.astype(jnp.float32), largest, jnp.sum(weights, axis=-1)


def merge(one: Partial, other: Partial) -> Float[Array, "b k q h"]:
    """Attention to the keys of both, by their log-sum-exps (FlashAttention, arXiv 2205.14135,
    section 3.1; shared prefixes: Hydragen, arXiv 2402.05099)."""
    largest = jnp.maximum(one[1], other[1])
    scales = [jnp.exp(part[1] - largest) for part in (one, other)]
    mixed = sum(
        part[0] * scale[..., None] for part, scale in zip((one, other), scales, strict=True)
    )
    total = sum(part[2] * scale for part, scale in zip((one, other), scales, strict=True))
    return mixed / jnp.maximum(total, TINY)[..., None]
