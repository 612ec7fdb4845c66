"""Decode a batch of prompts on the device, over a cache that is only ever appended to.

    session = engine.start(params, prompts, copies, suffix)   encode, prefill once, copy
    session.append(tokens)                                    forced prefixes, tool responses
    session.generate(active, sampling, seeds)                 one jitted loop until all stop

Invariant of a session: the cache of a row holds exactly the tokens of its stream so far,
and its last hidden state predicts the next one. Hence a sampled token is written to the
cache even if it ends the turn, and nothing is ever prefilled twice.

Static shapes, each compiled once: prompts (rows x prompt bucket x frame bucket x patches),
append blocks (rows x block bucket x slots), decoding (rows x slots). Buckets are powers of
two and the values half-way between (`bucket`). Sampling settings and stop tokens are traced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from paravt_jax.interfaces import Params, Policy
from paravt_jax.mesh import constrain
from paravt_jax.patches import largest, restride, stack_patches
from paravt_jax.records import (
    ArrayLike,
    KVCache,
    Prompt,
    StopReason,
    VisionFeatures,
    pytree,
)
from paravt_jax.rope_index import next_position
from paravt_jax.shapes import bucket
from rollout.sampler import SamplingConfig, row_keys, sample
from rollout.session import Generated


@dataclasses.dataclass(frozen=True)
class Lane:
    """A class of requests with one static shape."""

    prompts: int
    """Prompts that can be live at a time."""
    copies: int
    """Rows that share one prompt."""
    prompt_tokens: int
    """Longest prompt."""
    suffix: int
    """Most tokens after the prompt, per row."""


@pytree
@dataclasses.dataclass(frozen=True)
class _State:
    """The live part of a session, on the device."""

    cache: KVCache
    hidden: Float[Array, "b d"]
    """Hidden state of each row's last token."""
    positions: Int[Array, " b"]
    """M-RoPE position of each row's next token; text has the same one in all components."""


@pytree
@dataclasses.dataclass(frozen=True)
class _Block:
    """Right-padded prompts."""

    tokens: Int[ArrayLike, "b t"]
    positions: Int[ArrayLike, "b t 3"]
    vision_index: Int[ArrayLike, "b t"]
    lengths: Int[ArrayLike, " b"]
    next_positions: Int[ArrayLike, " b"]


@pytree
@dataclasses.dataclass(frozen=True)
class _Draw:
    """Sampling settings of each row, all traced."""

    seeds: UInt[ArrayLike, " b"]
    temperature: Float[ArrayLike, " b"]
    top_p: Float[ArrayLike, " b"]
    limits: Int[ArrayLike, " b"]
    eos_ids: Int[ArrayLike, " e"]


@pytree
@dataclasses.dataclass(frozen=True)
class _Loop:
    """Carry of the decode loop."""

    step: Int[Array, ""]
    state: _State
    running: Bool[Array, " b"]
    ended: Bool[Array, " b"]
    counts: Int[Array, " b"]
    tokens: Int[Array, "b columns"]
    log_probs: Float[Array, "b columns"]


def _last(hidden: Float[Array, "b t d"], lengths: Int[Array, " b"]) -> Float[Array, "b d"]:
    """Hidden state of the last real token of each right-padded row."""
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, at, axis=1)[:, 0]


class Engine:
    """Compiled prefill, append and decode of one policy. Weights are arguments, not state."""

    def __init__(
        self, policy: Policy, *, eos_ids: Sequence[int], pad_id: int, frame_patches: int = 0
    ) -> None:
        """`eos_ids` end a turn; `pad_id` fills rows that are shorter than their block.

        Frames are padded to `frame_patches` patches, or to the largest of their batch if that is
        more: the most that a frame can have keeps frames of all shapes in one compiled tower.
        """
        if not eos_ids:
            raise ValueError("eos_ids=(): name at least one token that ends a turn")
        self.policy = policy
        self.eos_ids = np.asarray(eos_ids, np.int32)
        self.pad_id, self.frame_patches = pad_id, frame_patches
        self.compilations = 0
        """How often a function was traced, hence compiled, so far."""
        self._encode = jax.jit(self._encode_frames)
        self._prefill = jax.jit(self._prefill_and_copy, static_argnames=("copies", "slots"))
        self._append = jax.jit(self._append_block, donate_argnames=("state",))
        self._decode = jax.jit(
            self._decode_loop, static_argnames=("columns",), donate_argnames=("state",)
        )

    def start(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        copies: int,
        suffix: int,
        batch: int | None = None,
    ) -> Session:
        """See and read each prompt once, then open `copies` rows for each, prompt-major.

        `suffix` is the room for tokens after the prompt. The batch is padded to `batch`
        prompts (default: no padding), which keeps shapes static and changes no result.
        """
        batch = len(prompts) if batch is None else batch
        if not 0 < len(prompts) <= batch or copies < 1:
            raise ValueError(
                f"prompts={len(prompts)}, batch={batch}, copies={copies}: "
                "pass between 1 and `batch` prompts and at least 1 copy"
            )
        # Padding rows repeat a real prompt, so that no row is empty (softmax over nothing is NaN).
        padded = [*prompts, *[prompts[0]] * (batch - len(prompts))]
        features, index_P_T = self._see(params, padded)
        block = _stack_prompts(padded, index_P_T, self.pad_id)
        slots = block.tokens.shape[1] + suffix
        state = self._prefill(params, block, features, copies=copies, slots=slots)
        return Session(self, params, state, len(prompts) * copies, batch * copies, suffix)

    def cache_bytes(self, prompt_tokens: int, suffix: int, rows: int) -> int:
        """Device memory of the cache of `rows` rows, before anything is allocated."""
        slots = bucket(prompt_tokens, 8) + suffix
        shapes = jax.eval_shape(lambda: self.policy.init_cache(rows, slots))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    def _see(
        self, params: Params, prompts: Sequence[Prompt]
    ) -> tuple[VisionFeatures | None, list[np.ndarray]]:
        """Vision features of a batch, and each prompt's `vision_index` into them."""
        if all(prompt.patches is None for prompt in prompts):
            return None, [prompt.vision_index for prompt in prompts]
        shown = [prompt.patches for prompt in prompts]
        frames, patches = largest(shown)
        patches = max(patches, self.frame_patches)
        values, grids = stack_patches(shown, bucket(frames), patches)
        features = self._encode(params, values, grids)
        return features, [restride(prompt, patches) for prompt in prompts]

    def _encode_frames(
        self, params: Params, values: Float[Array, "b f p c"], grids: Int[Array, "b f 2"]
    ) -> VisionFeatures:
        self.compilations += 1
        values, grids = _spread((values, grids))
        return self.policy.encode(params, values, grids)

    def _prefill_and_copy(
        self,
        params: Params,
        block: _Block,
        features: VisionFeatures | None,
        *,
        copies: int,
        slots: int,
    ) -> _State:
        """Read each prompt once; give every rollout its own copy of the result."""
        self.compilations += 1
        block = _spread(block)
        empty = self.policy.init_cache(*block.tokens.shape)
        hidden, cache = self.policy.hidden(
            params,
            block.tokens,
            block.positions,
            block.vision_index,
            features,
            empty,
            block.lengths,
        )
        assert cache is not None
        room = [(0, 0), (0, 0), (0, slots - block.tokens.shape[1]), (0, 0), (0, 0)]
        copied = KVCache(
            keys=jnp.pad(jnp.repeat(cache.keys, copies, axis=1), room),
            values=jnp.pad(jnp.repeat(cache.values, copies, axis=1), room),
            lengths=jnp.repeat(cache.lengths, copies),
        )
        last = _last(hidden, block.lengths)
        return _State(
            cache=_spread_cache(copied),
            hidden=jnp.repeat(last, copies, axis=0),
            positions=jnp.repeat(block.next_positions, copies),
        )

    def _append_block(
        self, params: Params, state: _State, tokens: Int[Array, "b t"], lengths: Int[Array, " b"]
    ) -> _State:
        """Append given tokens to the cache; rows of length 0 stay as they are."""
        self.compilations += 1
        return self._extend(params, state, tokens, lengths)

    def _extend(
        self, params: Params, state: _State, tokens: Int[Array, "b t"], lengths: Int[Array, " b"]
    ) -> _State:
        """The state after `lengths` more text tokens per row."""
        steps = state.positions[:, None] + jnp.arange(tokens.shape[1])
        positions = jnp.broadcast_to(steps[..., None], (*tokens.shape, 3))
        text = jnp.full_like(tokens, -1)
        hidden, cache = self.policy.hidden(
            params, tokens, positions, text, None, state.cache, lengths
        )
        assert cache is not None
        moved = (lengths > 0)[:, None]
        return _State(
            cache=cache,
            hidden=jnp.where(moved, _last(hidden, lengths), state.hidden),
            positions=state.positions + lengths,
        )

    def _decode_loop(
        self, params: Params, state: _State, active: Bool[Array, " b"], draw: _Draw, *, columns: int
    ) -> _Loop:
        """Sample until every active row has met a stop token or its limit."""
        self.compilations += 1
        rows = active.shape[0]
        first = _Loop(
            step=jnp.int32(0),
            state=state,
            running=active & (draw.limits > 0),
            ended=jnp.zeros(rows, bool),
            counts=jnp.zeros(rows, jnp.int32),
            tokens=jnp.full((rows, columns), self.pad_id, jnp.int32),
            log_probs=jnp.zeros((rows, columns), jnp.float32),
        )
        loop = jax.lax.while_loop(
            lambda loop: jnp.any(loop.running),
            lambda loop: self._decode_step(params, loop, draw),
            first,
        )
        return dataclasses.replace(
            loop,
            # Every host reads all of these, so every device holds all of them.
            tokens=constrain(loop.tokens, None, None),
            log_probs=constrain(loop.log_probs, None, None),
            counts=constrain(loop.counts, None),
            ended=constrain(loop.ended, None),
        )

    def _decode_step(self, params: Params, loop: _Loop, draw: _Draw) -> _Loop:
        """One token for every running row, written to its cache even if it ends the turn."""
        logits = self.policy.logits(params, loop.state.hidden)
        # The filled length of a row is its position in its own stream, whatever its batch.
        keys = row_keys(draw.seeds, loop.state.cache.lengths)
        tokens, log_probs = sample(logits, keys, draw.temperature, draw.top_p)
        tokens = jnp.where(loop.running, tokens, self.pad_id)
        more = loop.running.astype(jnp.int32)
        ended = loop.running & jnp.isin(tokens, draw.eos_ids)
        counts = loop.counts + more
        return _Loop(
            step=loop.step + 1,
            state=self._extend(params, loop.state, tokens[:, None], more),
            running=loop.running & ~ended & (counts < draw.limits),
            ended=loop.ended | ended,
            counts=counts,
            tokens=loop.tokens.at[:, loop.step].set(tokens),
            log_probs=loop.log_probs.at[:, loop.step].set(log_probs),
        )


class Session:
    """A batch of live rows: their cache, and what predicts the next token of each."""

    def __init__(
        self,
        engine: Engine,
        params: Params,
        state: _State,
        rows: int,
        padded_rows: int,
        suffix: int,
    ) -> None:
        """Opened by `Engine.start`."""
        self.rows = rows
        """Rows that the caller asked for; padding rows come after them."""
        self._engine, self._params, self._state = engine, params, state
        self._room = np.full(padded_rows, suffix)
        self._suffix = suffix

    @property
    def room(self) -> np.ndarray:
        """int `[rows]`: how many more tokens each row can take."""
        return self._room[: self.rows].copy()

    def append(self, tokens_B: Sequence[Sequence[int]]) -> None:
        """Append given tokens to each row; an empty list leaves its row as it is."""
        counts = self._per_row([len(tokens) for tokens in tokens_B], np.int32)
        self._take_room(counts)
        if not counts.any():
            return
        block = np.full((len(counts), bucket(int(counts.max()), 8)), self._engine.pad_id, np.int32)
        for row, tokens in enumerate(tokens_B):
            block[row, : len(tokens)] = tokens
        self._state = self._engine._append(self._params, self._state, block, counts)

    def generate(
        self,
        active: Sequence[bool],
        sampling: SamplingConfig,
        limit: int,
        seeds: Sequence[int],
    ) -> list[Generated | None]:
        """Let the active rows speak until each has ended its turn or generated `limit` tokens.

        `seeds` (uint32) decide a row's draws together with its position, nothing else
        does. Inactive rows give None and stay as they are.
        """
        engine = self._engine
        live = self._per_row(active, bool)
        limits = np.where(live, limit, 0).astype(np.int32)
        self._check_room(limits)
        draw = _Draw(
            seeds=self._per_row(seeds, np.uint32),
            temperature=np.full(len(live), sampling.temperature, np.float32),
            top_p=np.full(len(live), sampling.top_p, np.float32),
            limits=limits,
            eos_ids=engine.eos_ids,
        )
        loop = engine._decode(self._params, self._state, live, draw, columns=self._suffix)
        self._state = loop.state
        host = jax.device_get((loop.tokens, loop.log_probs, loop.counts, loop.ended))
        self._take_room(host[2])
        return [_generated(row, *host) if live[row] else None for row in range(self.rows)]

    def _per_row(self, values: Sequence, dtype: type) -> np.ndarray:
        """One value per row, zero for the padding rows."""
        if len(values) != self.rows:
            raise ValueError(f"{len(values)} values for {self.rows} rows: pass one per row")
        padded = np.zeros(len(self._room), dtype)
        padded[: self.rows] = values
        return padded

    def _check_room(self, counts: np.ndarray) -> None:
        """Refuse what the cache cannot hold; it would silently overwrite its own past."""
        if (counts > self._room).any():
            row = int(np.argmax(counts - self._room))
            raise ValueError(
                f"row {row} has room for {self._room[row]} more tokens, not {counts[row]}: "
                f"start the session with a suffix above {self._suffix}"
            )

    def _take_room(self, counts: np.ndarray) -> None:
        self._check_room(counts)
        self._room -= counts


def _generated(
    row: int, tokens: np.ndarray, log_probs: np.ndarray, counts: np.ndarray, ended: np.ndarray
) -> Generated:
    """The turn of one row, cut out of the buffers of the loop."""
    reason = StopReason.END if ended[row] else StopReason.LENGTH
    count = counts[row]
    return Generated(tokens[row, :count].copy(), log_probs[row, :count].copy(), reason)


def _stack_prompts(prompts: Sequence[Prompt], index_P_T: list[np.ndarray], pad_id: int) -> _Block:
    """Prompts as one right-padded block."""
    rows, width = len(prompts), bucket(max(len(prompt.tokens) for prompt in prompts), 8)
    tokens = np.full((rows, width), pad_id, np.int32)
    positions = np.zeros((rows, width, 3), np.int32)
    vision_index = np.full((rows, width), -1, np.int32)
    for row, (prompt, index) in enumerate(zip(prompts, index_P_T, strict=True)):
        tokens[row, : len(index)] = prompt.tokens
        positions[row, : len(index)] = prompt.positions
        vision_index[row, : len(index)] = index
    return _Block(
        tokens=tokens,
        positions=positions,
        vision_index=vision_index,
        lengths=jnp.array([len(prompt.tokens) for prompt in prompts], jnp.int32),
        # Text goes on one above the largest component (Qwen2-VL, arXiv:2409.12191, section 2.1).
        next_positions=np.array([next_position(prompt.positions) for prompt in prompts], np.int32),
    )


def _spread(tree: Any) -> Any:
    """Rows over the data axes of the mesh, as far as they divide."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", *[None] * (leaf.ndim - 1)), tree)


def _spread_cache(cache: KVCache) -> KVCache:
    """Rows over the data axes of the mesh, heads over the tensor axis."""
    axes = ("layers", "batch", None, "kv", None)
    return KVCache(
        keys=constrain(cache.keys, *axes),
        values=constrain(cache.values, *axes),
        lengths=constrain(cache.lengths, "batch"),
    )
