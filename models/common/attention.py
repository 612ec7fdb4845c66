"""Attention behind one dispatch function, with a plain reference that every path must equal.

On TPUs and GPUs it is a kernel (`models.common.splash`, `models.common.cudnn`), elsewhere products
that XLA compiles (ADR 25).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from models.common import cudnn, splash
from models.common.kernels import WHOLE_ROWS, AttentionSplit, Kernels
from models.common.products import precision
from paravt_jax.mesh import platform
from paravt_jax.records import HiddenKeys
from paravt_jax.shared_rows import SharedRows

QUERY_CHUNK = 96
"""Causal attention is computed in chunks of queries that see only the keys before their end:
at 368 tokens that skips three eighths of the products."""

STREAM_CHUNK = 416
"""Queries of streams that meet their prompt in one product."""

UNROLLED = 4096
"""Chunks of rows of more tokens are computed in loops: unrolled, each takes seconds to compile (a
TPU's compiler: docs/log.md), and its weights wait in memory for the backward pass."""

LOOPS = 2
"""Loops over a long row: each sees the keys before its end, 3/4 of all instead of 1/2. More of them
would compute less and compile longer."""

IN_TURNS = 2**21
"""Scores of which a CPU computes those of one head at a time (`_in_turns`)."""

MIXED = "values that attention mixed"
"""What is kept of attention for the backward pass where its weights are computed again."""

HIDDEN = -1e30
"""Score of an invisible key: finite, so that a row with no visible key gives no NaN."""

TINY = 1e-30


class Attending(nnx.Module):
    """Base of modules that attend."""

    kernels: Kernels = "auto"


def choose_kernels(module: nnx.Module, kernels: Kernels) -> None:
    """Let all modules below one attend by these kernels."""
    for _, part in nnx.iter_graph(module):
        if isinstance(part, Attending):
            part.kernels = kernels


def _by_splash(kernels: Kernels, query: Array, key: Array) -> bool:
    return kernels in ("auto", "splash") and splash.serves(query, key)


def _by_cudnn(kernels: Kernels, query: Array, key: Array) -> bool:
    # Not by itself: nobody has run it on a card yet, and what is known to be right comes first.
    return kernels == "cudnn" and cudnn.serves(query, key)


def attend(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k h"],
    *,
    causal: bool = False,
    key_lengths: Int[Array, " b"] | None = None,
    segments: Int[Array, "b s"] | None = None,
    hidden_keys: HiddenKeys | None = None,
    shared: SharedRows | None = None,
    kernels: Kernels = "auto",
    split: AttentionSplit = WHOLE_ROWS,
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped heads, scaled by `h**-0.5`, of rows that are `split` so.

    Query i of row b sees key j if `j < key_lengths[b]` (when given), when `causal`, `j <= i`, and
    when there are `segments`, both are of the same one, and `hidden_keys` does not hide j from i
    (queries and keys then being the same tokens). Query head `n` reads key head `n // (n/k)`.
    Where queries and keys are the same tokens, what is mixed for those beyond `key_lengths` means
    nothing.

    With `shared`, queries and keys are rows of prompts and of the streams that continue them, each
    of which sees its prompt and itself up to each query (`SharedRows`); the keys of a prompt are
    there once, whatever the number of streams. Other masks do not go with it.
    """
    if shared is not None:
        return _shared(query, key, value, shared, kernels)
    if hidden_keys is None and _by_splash(kernels, query, key):
        segments = _within(key_lengths, key.shape[1], segments)
        return splash.attend(query, key, value, causal=causal, segments=segments, split=split)
    if hidden_keys is None and segments is None and _by_cudnn(kernels, query, key):
        every = jnp.full(key.shape[0], key.shape[1], jnp.int32)
        lengths = None if causal else every if key_lengths is None else key_lengths
        return cudnn.attend(query, key, value, lengths=lengths, split=split)
    if causal and key_lengths is None and query.shape[1] > QUERY_CHUNK:
        if query.shape[1] > UNROLLED:
            return _causal_loops(query, key, value, segments, hidden_keys)
        return _in_turns(_causal_chunks, query, key, value, (segments, hidden_keys))
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
    shared: bool = False,
) -> Bool[Array, "#b #t s"] | None:
    """Which keys each query sees (see `attend`), the first query being number `first`; None when
    all are visible. With `shared`, segment 0 is seen by all. What is computed here asks no other;
    kernels have masks of their own (`splash.StaticMask`), which must equal this one, and so has the
    KV cache (`models.common.cached_attention`)."""
    slots, masks = jnp.arange(keys, dtype=jnp.int32), []
    if key_lengths is not None:
        masks.append(slots[None, None, :] < key_lengths[:, None, None])
    if causal:
        last = first + jnp.arange(queries, dtype=jnp.int32)
        masks.append((slots[None] <= last[:, None])[None])
    if segments is not None:
        asking = jax.lax.dynamic_slice_in_dim(segments, first, queries, axis=1)
        told = segments[:, None, :keys]
        masks.append((asking[:, :, None] == told) | ((told == 0) & shared))
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
    return _normalised(query, _tokens_last(key), value, visible)


@jax.custom_vjp
def _scores(
    query: Float[Array, "b k q h"], key: Float[Array, "b k h s"], told: Bool[Array, "b s"] | None
) -> Float[Array, "b k q s"]:
    """Products of queries and keys; those of keys that are not told are `HIDDEN`.

    The product itself hides them, by one more dimension: a mask takes passes over all scores. And
    the gradient of keys is a product of rows as they are: JAX's own reads scores by columns, which
    takes a CPU four times as long."""
    if told is not None:
        bias = jnp.where(told, 0, HIDDEN).astype(key.dtype)[:, None, None]
        key = jnp.concatenate([key, jnp.broadcast_to(bias, (*key.shape[:2], 1, key.shape[3]))], 2)
        query = jnp.concatenate([query, jnp.ones((*query.shape[:3], 1), query.dtype)], 3)
    return jnp.einsum("bkqh,bkhs->bkqs", query, key, precision=precision(query.dtype))


def _scores_forward(query: Array, key: Array, told: Array | None) -> tuple[Array, Any]:
    return _scores(query, key, told), (query, key)


def _scores_backward(saved: tuple[Array, Array], slope: Array) -> tuple[Array, Array, None]:
    query, key = saved
    product = functools.partial(jnp.einsum, precision=precision(query.dtype))
    return product("bkqs,bkhs->bkqh", slope, key), product("bkqh,bkqs->bkhs", query, slope), None


_scores.defvjp(_scores_forward, _scores_backward)


def _tokens_last(key: Float[Array, "b s k h"]) -> Float[Array, "b k h s"]:
    """Keys as `_scores` multiplies them."""
    return key.transpose(0, 2, 3, 1)


def _normalised(query: Array, key: Array, value: Array, visible: Array | None) -> Array:
    mixed, _, total = _weighed(query, key, value, visible)
    return _tokens_first(mixed / total[..., None]).astype(query.dtype)


def _weighed(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b k h s"],
    value: Float[Array, "b s k h"],
    visible: Bool[Array, "#b #t s"] | None,
    told: Bool[Array, "b s"] | None = None,
) -> tuple[Float[Array, "b k g t h"], Float[Array, "b k g t"], Float[Array, "b k g t"]]:
    """Values mixed with weights `exp(score - largest)`, the largest score of each query, and the
    sum of its weights; float32. Keys that are not `told` are hidden from all queries."""
    (b, t, n, h), k = query.shape, key.shape[1]
    exact, groups = precision(query.dtype), (b, k, n // k, t)
    grouped = query.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, -1, h)
    # A pass over queries is shorter than one over scores, but would round them to bfloat16 again.
    early, late = (h**-0.5, 1.0) if query.dtype == jnp.float32 else (1.0, h**-0.5)
    scores = _scores(grouped * early, key, told).reshape(*groups, -1).astype(jnp.float32) * late
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, HIDDEN)
    # Any number would do: it has no gradient.
    largest = checkpoint_name(jax.lax.stop_gradient(jnp.max(scores, axis=-1)), MIXED)
    weights = jnp.exp(scores - largest[..., None])
    flat = weights.reshape(*grouped.shape[:3], -1).astype(value.dtype)
    mixed = jnp.einsum("bkqs,bksh->bkqh", flat, value.swapaxes(1, 2), precision=exact)
    mixed = mixed.astype(jnp.float32).reshape(*groups, h)
    found = mixed, largest, jnp.sum(weights, axis=-1)
    return checkpoint_name(found, MIXED)


def _tokens_first(x: Shaped[Array, "b k g t *h"]) -> Shaped[Array, "b t n *h"]:
    return jnp.moveaxis(x, 3, 1).reshape(x.shape[0], x.shape[3], -1, *x.shape[4:])


def _in_turns(
    attend: Callable[[Array, Array, Array, Any], Array],
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    rows: Any,
) -> Float[Array, "b t n h"]:
    """`attend(query, key, value, rows)`, on a CPU row by row and key head by key head, with weights
    that are computed again in the backward pass. `rows` holds arrays whose first axis is that of
    the rows, or has as many neighbours for each.

    There, a product of so few numbers as a head has is cheap beside its result: XLA asks the system
    for all that a program holds anew in each call, and each fresh page costs more than a product
    that fills it."""
    (b, t, n, h), k = query.shape, key.shape[2]
    mesh = jax.sharding.get_abstract_mesh()
    split = not mesh.empty and mesh.size > 1
    if split or platform() != "cpu" or b * n * t * t < IN_TURNS:
        return attend(query, key, value, rows)

    def turns(x: Array) -> Array:
        """`[b * k, 1, t, heads, h]`"""
        heads = x.reshape(b, t, k, -1, h).transpose(0, 2, 1, 3, 4)
        return heads.reshape(b * k, 1, t, -1, h)

    own = jax.tree.map(lambda x: jnp.repeat(x.reshape(b, -1, *x.shape[1:]), k, axis=0), rows)
    keep = jax.checkpoint_policies.save_only_these_names(MIXED)
    one = jax.checkpoint(attend, policy=keep)
    mixed = jax.lax.map(lambda turn: one(*turn), (turns(query), turns(key), turns(value), own))
    return mixed.reshape(b, k, t, n // k, h).transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _causal_chunks(
    query: Array,
    key: Array,
    value: Array,
    limits: tuple[Array | None, HiddenKeys | None],
) -> Array:
    chunks, key = [], _tokens_last(key)
    for start in range(0, query.shape[1], QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, query.shape[1])
        visible = visibility(end - start, end, True, start, None, *limits)
        chunks.append(_normalised(query[:, start:end], key[..., :end], value[:, :end], visible))
    return jnp.concatenate(chunks, axis=1)


def _causal_loops(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    hidden_keys: HiddenKeys | None,
    shared: bool = False,
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
    keys = _tokens_last(key)

    def loop(numbers: np.ndarray) -> Array:
        end = (int(numbers[-1]) + 1) * QUERY_CHUNK

        @jax.checkpoint
        def chunk(number_and_query: tuple[Array, Array]) -> Array:
            first, query = number_and_query[0] * QUERY_CHUNK, number_and_query[1]
            visible = visibility(QUERY_CHUNK, end, True, first, None, segments, hidden_keys, shared)
            return _normalised(query, keys[..., :end], value[:, :end], visible)

        return jax.lax.map(chunk, (jnp.asarray(numbers), chunks[numbers[0] : numbers[-1] + 1]))

    parts = np.array_split(np.arange(count, dtype=np.int32), LOOPS)
    mixed = jnp.concatenate([loop(numbers) for numbers in parts])
    return mixed.swapaxes(0, 1).reshape(b, -1, *query.shape[2:])[:, :t]


def _shared(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    shared: SharedRows,
    kernels: Kernels,
) -> Float[Array, "b t n h"]:
    """Rows of prompts and streams. Splash takes them as they are; cuDNN wants each stream in a lane
    of its own, as long as the longest."""
    slots, lanes = query.shape[1], shared.per_row
    if _by_splash(kernels, query, key) and splash.holds(shared.bounds, slots):
        return splash.attend(query, key, value, causal=True, shared=shared)
    if _by_cudnn(kernels, query, key):
        inputs = [shared.in_lanes(x) for x in (query, key, value)]
        layout = {"lanes": lanes, "prompt": inputs[0].shape[1] - lanes * shared.bounds.own}
        lengths = jnp.asarray(shared.prompt_lengths)
        return shared.out_of_lanes(cudnn.attend(*inputs, lengths=lengths, **layout), slots)
    if slots > UNROLLED:
        return _causal_loops(query, key, value, shared.segments(slots), None, True)
    return _in_turns(_to_both, query, key, value, shared)


def _to_both(query: Array, key: Array, value: Array, shared: SharedRows) -> Array:
    far, near = _to_prompts(query, key, value, shared), _to_streams(query, key, value, shared)
    return merge(far, near).astype(query.dtype)


def _to_prompts(query: Array, key: Array, value: Array, shared: SharedRows) -> Partial:
    """Attention of all tokens to their prompts: those of streams meet one copy of the keys, many of
    them in one product."""
    slots, start, parts = query.shape[1], 0, []
    prompt, key = min(shared.bounds.prompt, slots), _tokens_last(key)
    told = shared.segments(slots)[:, :prompt] == 0
    while start < slots:
        within = start < prompt
        end = min(start + QUERY_CHUNK, prompt) if within else min(start + STREAM_CHUNK, slots)
        keys = min(end, prompt)
        causal = visibility(end - start, keys, within, start)
        seen = query[:, start:end], key[..., :keys], value[:, :keys], causal, told[:, :keys]
        parts.append(_weighed(*seen))
        start = end
    return _joined(parts)


def _to_streams(query: Array, key: Array, value: Array, shared: SharedRows) -> Partial:
    """Attention of all tokens to their streams, each of which is read in a row of its own; nothing
    where a prompt stands."""
    slots, own, parts = query.shape[1], shared.bounds.own, []
    query, key, value = (shared.streams(x) for x in (query, key, value))
    key = _tokens_last(key)
    for start in range(0, own, QUERY_CHUNK):
        end = min(start + QUERY_CHUNK, own)
        visible = visibility(end - start, end, True, start)
        parts.append(_weighed(query[:, start:end], key[..., :end], value[:, :end], visible))
    mixed, largest, total = _joined(parts)
    back = shared.in_rows(mixed, slots), shared.in_rows(total, slots)
    return back[0], shared.in_rows(largest, slots, HIDDEN), back[1]


def _joined(parts: Sequence[tuple[Array, Array, Array]]) -> Partial:
    """What was found for several runs of queries, tokens first."""
    mixed, largest, total = (
        _tokens_first(jnp.concatenate(part, axis=3)) for part in zip(*parts, strict=True)
    )
    return mixed, largest, total


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


def join(one: Partial, other: Partial) -> Partial:
    """Attention to the keys of both, by their log-sum-exps (FlashAttention, arXiv 2205.14135,
    section 3.1; shared prefixes: Hydragen, arXiv 2402.05099)."""
    largest = jnp.maximum(one[1], other[1])
    scales = [jnp.exp(part[1] - largest) for part in (one, other)]
    mixed = one[0] * scales[0][..., None] + other[0] * scales[1][..., None]
    return mixed, largest, one[2] * scales[0] + other[2] * scales[1]


def merge(one: Partial, other: Partial) -> Float[Array, "b k q h"]:
    """Attention to the keys of both, finished."""
    mixed, _, total = join(one, other)
    return mixed / jnp.maximum(total, TINY)[..., None]
