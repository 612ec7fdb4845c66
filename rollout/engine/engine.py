"""The device side of rollouts: compiled functions over caches of known size.

    engine = Engine(policy, {"main": Lane(...), "crop": Lane(...)}, ...)
    session = Session(engine, params)       requests in, streams out: `rollout.engine.session`

A lane is a class of requests with one static shape. Its prompts are read once and shared by
their copies; rows of all lanes decode in one loop. Static shapes, each compiled once: reading
(batch x tokens x frames), appending (rows x tokens), decoding (which lanes). Sizes are powers of
two or four; sampling settings, lengths and stop tokens are traced.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.interfaces import Params, Policy
from paravt_jax.kv_cache import KVCache
from paravt_jax.mesh import constrain
from paravt_jax.records import ArrayLike, VisionFeatures, pytree
from rollout.engine.automaton import TokenAutomata, advance, allowed_tokens, has_stopped
from rollout.engine.sampler import Draw, Drawn, draw_tokens, mark_seen, row_keys


@dataclasses.dataclass(frozen=True)
class Lane:
    """A class of requests with one static shape."""

    prompts: int
    """Prompts that can be live at a time."""
    copies: int
    """Rows that share one prompt: the group size for main agents, 1 for crops."""
    prompt_tokens: int
    """Longest prompt."""
    suffix: int
    """Most tokens of a row after its prompt."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes, naming field, value and remedy."""
        for name in ("prompts", "copies", "prompt_tokens", "suffix"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def rows(self) -> int:
        """Rows of all prompts."""
        return self.prompts * self.copies


@pytree
@dataclasses.dataclass(frozen=True)
class LaneState:
    """What a lane keeps on the device."""

    cache: KVCache
    hidden: Float[Array, "n d"]
    """Hidden state of each row's last token."""
    seen: Bool[Array, "n vocab"] | None = None
    """Tokens of each row after its prompt; kept only for repetition penalties."""

    def with_lengths(self, prompts: Int[ArrayLike, " p"], rows: Int[ArrayLike, " n"]) -> LaneState:
        """The host keeps the books: lengths come with every call."""
        cache = dataclasses.replace(self.cache, prompt_lengths=prompts, lengths=rows)
        return dataclasses.replace(self, cache=cache)


@pytree
@dataclasses.dataclass(frozen=True)
class Block:
    """Right-padded tokens: prompts, or what is appended to live rows."""

    tokens: Int[ArrayLike, "b t"]
    positions: Int[ArrayLike, "b t 3"]
    vision_index: Int[ArrayLike, "b t"]
    lengths: Int[ArrayLike, " b"]


@pytree
@dataclasses.dataclass(frozen=True)
class Speakers:
    """Where each row stands in its turn, and how it draws; all of it traced."""

    draw: Draw
    """A limit of 0 keeps a row silent."""
    positions: Int[ArrayLike, " n"]
    """M-RoPE position of the next token; text has the same one in all components."""
    automata: Int[ArrayLike, "n 2"]
    """States of the search for an end and of the grammar."""


@pytree
@dataclasses.dataclass(frozen=True)
class Spoken:
    """What one visit to the device drew, rows of all lanes one after the other."""

    tokens: Int[ArrayLike, "n columns"]
    log_probs: Float[ArrayLike, "n columns"]
    counts: Int[ArrayLike, " n"]
    own: Bool[ArrayLike, "n columns"]
    """Whether the policy chose: the grammar did not change the token, and left others."""
    floors: Float[ArrayLike, "n columns"]
    grammar: Int[ArrayLike, "n columns"]
    """State of the grammar before each token."""
    automata: Int[ArrayLike, "n 2"]
    ended: Bool[ArrayLike, " n"]


@pytree
@dataclasses.dataclass(frozen=True)
class _Loop:
    """Carry of the decode loop."""

    step: Int[Array, ""]
    states: tuple[LaneState, ...]
    running: Bool[Array, " n"]
    spoken: Spoken


class Engine:
    """Compiled functions of one policy over its lanes. Weights are arguments, not state."""

    def __init__(
        self,
        policy: Policy,
        lanes: Mapping[str, Lane],
        *,
        automata: TokenAutomata,
        pad_id: int,
        frame_patches: int = 0,
        visit: int = 16,
        penalties: bool = False,
    ) -> None:
        """`automata` know what ends a turn; `pad_id` fills rows shorter than their block.

        Frames are padded to `frame_patches` patches, or to the largest of their batch if that is
        more: the most that a frame can have keeps frames of all shapes in one compiled tower.
        Up to `visit` tokens are decoded before the host looks. `penalties` keeps what each row
        has seen, one byte per row and token of the vocabulary, for repetition penalties.
        """
        if not lanes or visit < 1:
            raise ValueError(f"lanes={dict(lanes)}, visit={visit}: give a lane, and at least 1")
        self.policy, self.lanes = policy, dict(lanes)
        self.automata, self.pad_id, self.frame_patches = automata, pad_id, frame_patches
        self.visit, self.penalties = visit, penalties
        self.compilations = 0
        """How often a function was traced, hence compiled, so far."""
        self.encode = jax.jit(self._encode)
        self.admit = jax.jit(self._admit, donate_argnames=("state",))
        self.append = jax.jit(self._append, donate_argnames=("state",))
        self.decode = jax.jit(self._decode, donate_argnames=("states",))

    def cache_bytes(self) -> int:
        """Memory of the caches of all lanes, over all devices."""
        shapes = [
            jax.eval_shape(lambda lane=lane: self._empty(lane).cache)
            for lane in self.lanes.values()
        ]
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    @functools.cached_property
    def states(self) -> dict[str, LaneState]:
        """The caches of all lanes, handed on from session to session."""
        empty = jax.jit(self._empty, static_argnums=0)
        return {name: jax.tree.map(_commit, empty(lane)) for name, lane in self.lanes.items()}

    def _empty(self, lane: Lane) -> LaneState:
        cache = self.policy.init_cache(lane.prompts, lane.copies, lane.prompt_tokens, lane.suffix)
        seen = jnp.zeros((lane.rows, self.automata.vocab), bool) if self.penalties else None
        return LaneState(cache, *_spread((jnp.zeros((lane.rows, self.policy.width)), seen)))

    def _encode(
        self, params: Params, values: Float[Array, "b f p c"], grids: Int[Array, "b f 2"]
    ) -> VisionFeatures:
        self.compilations += 1
        values, grids = _spread((values, grids))
        return self.policy.encode(params, values, grids)

    def _admit(
        self,
        params: Params,
        state: LaneState,
        block: Block,
        features: VisionFeatures | None,
        slots: Int[Array, " b"],
    ) -> LaneState:
        """Read prompts into these prompt slots, and let their rows start from them."""
        self.compilations += 1
        block = _spread(block)
        hidden, keys, values = self.policy.prefill(
            params, block.tokens, block.positions, block.vision_index, features
        )
        copies = state.cache.copies
        rows = slots[:, None] * copies + jnp.arange(copies)
        last = _last(hidden, block.lengths)[:, None].astype(state.hidden.dtype)
        cache = state.cache.with_prompts(slots, keys, values).sharded()
        seen = None if state.seen is None else state.seen.at[rows].set(False)
        return LaneState(cache, _spread(state.hidden.at[rows].set(last)), seen)

    def _append(
        self,
        params: Params,
        state: LaneState,
        block: Block,
        features: VisionFeatures | None,
        rows: Int[Array, " m"] | None,
    ) -> LaneState:
        """Append given tokens to all rows (those of length 0 stay as they are), or to `rows`."""
        self.compilations += 1
        hidden, (cache,) = self.policy.append(
            params,
            block.tokens,
            block.positions,
            block.vision_index,
            features,
            (state.cache,),
            rows,
        )
        last = _last(hidden, block.lengths).astype(state.hidden.dtype)
        if rows is None:
            moved = jnp.where((block.lengths > 0)[:, None], last, state.hidden)
        else:
            moved = state.hidden.at[rows].set(last)
        seen = None if state.seen is None else _mark_block(state.seen, block, rows)
        return LaneState(cache.sharded(), _spread(moved), seen)

    def _decode(
        self,
        params: Params,
        states: tuple[LaneState, ...],
        speakers: Speakers,
        table: Int[Array, "states vocab"],
        patience: Int[Array, ""],
    ) -> tuple[tuple[LaneState, ...], Spoken]:
        """Sample up to `visit` tokens for every speaking row, or until `patience` rows have
        finished their turn."""
        self.compilations += 1
        limits = jnp.asarray(speakers.draw.limits)
        first = _Loop(jnp.int32(0), states, limits > 0, self._silence(speakers))
        speaking = jnp.sum(first.running)

        def goes_on(loop: _Loop) -> Bool[Array, ""]:
            still = jnp.sum(loop.running)
            return (loop.step < self.visit) & (still > 0) & (speaking - still < patience)

        loop = jax.lax.while_loop(
            goes_on, lambda loop: self._decode_step(params, loop, speakers, table), first
        )
        # Every host reads these, so every device holds them.
        spoken = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), loop.spoken)
        return loop.states, spoken

    def _silence(self, speakers: Speakers) -> Spoken:
        """Nothing said yet."""
        rows = len(speakers.positions)
        shape = rows, self.visit
        return Spoken(
            tokens=jnp.full(shape, self.pad_id, jnp.int32),
            log_probs=jnp.zeros(shape, jnp.float32),
            counts=jnp.zeros(rows, jnp.int32),
            own=jnp.zeros(shape, bool),
            floors=jnp.zeros(shape, jnp.float32),
            grammar=jnp.zeros(shape, jnp.int32),
            automata=jnp.asarray(speakers.automata),
            ended=jnp.zeros(rows, bool),
        )

    def _decode_step(
        self, params: Params, loop: _Loop, speakers: Speakers, table: Int[Array, "states vocab"]
    ) -> _Loop:
        """One token for every running row, written to its cache even if it ends the turn."""
        spoken, running = loop.spoken, loop.running
        drawn = self._draw(params, loop, speakers, table)
        tokens = jnp.where(running, drawn.tokens, self.pad_id)
        after, grown = self._continue(params, loop, speakers.positions + spoken.counts, tokens)
        automata = jnp.where(
            running[:, None], advance(table, spoken.automata, tokens), spoken.automata
        )
        ended = running & has_stopped(automata)
        counts = spoken.counts + running
        at = slice(None), loop.step
        return _Loop(
            step=loop.step + 1,
            states=_advance(loop.states, grown, after, tokens, running),
            running=running & ~ended & (counts < speakers.draw.limits),
            spoken=Spoken(
                tokens=spoken.tokens.at[at].set(tokens),
                log_probs=spoken.log_probs.at[at].set(drawn.log_probs),
                counts=counts,
                own=spoken.own.at[at].set(~(drawn.constrained | drawn.forced)),
                floors=spoken.floors.at[at].set(drawn.floors),
                grammar=spoken.grammar.at[at].set(spoken.automata[:, 1]),
                automata=automata,
                ended=spoken.ended | ended,
            ),
        )

    def _draw(
        self, params: Params, loop: _Loop, speakers: Speakers, table: Int[Array, "states vocab"]
    ) -> Drawn:
        hidden = jnp.concatenate([state.hidden for state in loop.states])
        # A row's place in its own stream decides the draw, whatever else is in the batch.
        totals = jnp.concatenate([state.cache.totals for state in loop.states])
        seen = [state.seen for state in loop.states if state.seen is not None]
        return draw_tokens(
            self.policy.logits(params, hidden),
            row_keys(jnp.asarray(speakers.draw.seeds), totals),
            speakers.draw,
            jnp.concatenate(seen) if seen else None,
            allowed_tokens(table, loop.spoken.automata) if self.automata.constrains else None,
        )

    def _continue(
        self, params: Params, loop: _Loop, positions: Int[Array, " n"], tokens: Int[Array, " n"]
    ) -> tuple[Float[Array, "n d"], tuple[KVCache, ...]]:
        """Hidden states after one more text token per row, and the caches that hold it."""
        everywhere = jnp.broadcast_to(positions[:, None, None], (len(tokens), 1, 3))
        text = jnp.full((len(tokens), 1), -1, jnp.int32)
        caches = tuple(state.cache for state in loop.states)
        hidden, grown = self.policy.append(params, tokens[:, None], everywhere, text, None, caches)
        return hidden[:, 0], grown


def _commit(x: Array) -> Array:
    """Bound to its devices, as what functions of committed weights return: they would be compiled
    once more for arrays that are not."""
    return x if x.committed else jax.device_put(x, x.sharding)


def _advance(
    states: tuple[LaneState, ...],
    grown: tuple[KVCache, ...],
    hidden: Float[Array, "n d"],
    tokens: Int[Array, " n"],
    running: Bool[Array, " n"],
) -> tuple[LaneState, ...]:
    """Running rows move on to their new hidden state; the others stay where they are."""
    after, start = [], 0
    for state, cache in zip(states, grown, strict=True):
        part = slice(start, start := start + cache.lengths.shape[0])
        on = running[part]
        moved = jnp.where(on[:, None], hidden[part].astype(state.hidden.dtype), state.hidden)
        longer = dataclasses.replace(cache, lengths=cache.lengths + on)
        seen = None if state.seen is None else mark_seen(state.seen, tokens[part], on)
        after.append(LaneState(longer, moved, seen))
    return tuple(after)


def _mark_block(
    seen: Bool[Array, "n vocab"], block: Block, rows: Int[Array, " m"] | None
) -> Bool[Array, "n vocab"]:
    """Given tokens count as seen."""
    places = jnp.arange(len(seen)) if rows is None else rows
    real = jnp.arange(block.tokens.shape[1]) < jnp.asarray(block.lengths)[:, None]
    return seen.at[places[:, None], block.tokens].max(real)


def _last(hidden: Float[Array, "b t d"], lengths: Int[Array, " b"]) -> Float[Array, "b d"]:
    """Hidden state of the last real token of each right-padded row."""
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(hidden, at, axis=1)[:, 0]


def _spread(tree: Any) -> Any:
    """Rows over the data axes of the mesh, as far as they divide."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", *[None] * (leaf.ndim - 1)), tree)
