"""The device side of rollouts: prefill, append and decode, compiled over KV caches of known size.

    engine = Engine(policy, {"main": SlotPool(...), "crop": SlotPool(...)}, ...)
    session = Session(engine, params)       requests in, streams out: `rollout.engine.session`

A pool holds the KV-cache slots of requests of one static shape. A prompt is prefilled once and
shared by its copies; rows of all pools decode in one loop. Each static shape is compiled once for
each size of the caches, if it reads them: prefill (batch x tokens x frames), append (rows x
tokens), decode (which pools). Sizes are powers of two or four; sampling settings, lengths and stop
tokens are traced.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.interfaces import Params, Policy, routing_of
from paravt_jax.kv_cache import KVCache
from paravt_jax.mesh import (
    batch_shards,
    by_width,
    constrain,
    copied_apart,
    moved_by_layers,
    put_rows,
)
from paravt_jax.patches import FrameRows
from paravt_jax.pytrees import ArrayLike, pytree
from paravt_jax.records import VisionFeatures
from rollout.engine.automaton import TokenAutomata, advance, allowed_tokens, has_stopped
from rollout.engine.caches import GROWS_FROM, Caches, PoolState, PromptState, SlotPool, split_rows
from rollout.engine.sampler import (
    Alternatives,
    Draw,
    Drawn,
    draw_tokens,
    mark_seen,
    row_keys,
)

P = ParamSpec("P")
T = TypeVar("T")


@pytree
@dataclasses.dataclass(frozen=True)
class PaddedTokens:
    """Prompts, or what is appended to running rows, padded on the right to one length."""

    tokens: Int[ArrayLike, "b t"]
    positions: Int[ArrayLike, "b t 3"]
    vision_index: Int[ArrayLike, "b t"]
    lengths: Int[ArrayLike, " b"]


@pytree
@dataclasses.dataclass(frozen=True)
class GeneratingRows:
    """Where each row stands in its turn, and how its tokens are drawn; all of it traced."""

    draw: Draw
    """A limit of 0 keeps a row idle."""
    positions: Int[ArrayLike, " n"]
    """M-RoPE position of the next token; text has the same one in all components."""
    automata: Int[ArrayLike, "n 2"]
    """States of the search for an end and of the grammar."""
    listed: Bool[ArrayLike, " n"] | None = None
    """Rows whose likeliest tokens are wanted; None where the engine lists none."""


@pytree
@dataclasses.dataclass(frozen=True)
class DecodeOutput:
    """What one call of `decode` drew, rows of all pools one after the other."""

    tokens: Int[ArrayLike, "n columns"]
    log_probs: Float[ArrayLike, "n columns"]
    counts: Int[ArrayLike, " n"]
    chosen: Bool[ArrayLike, "n columns"]
    """Whether the policy chose: the grammar did not change the token, and left others."""
    floors: Float[ArrayLike, "n columns"]
    grammar: Int[ArrayLike, "n columns"]
    """State of the grammar before each token."""
    automata: Int[ArrayLike, "n 2"]
    ended: Bool[ArrayLike, " n"]
    alternatives: Alternatives | None = None
    """`[n, columns, k]`."""
    routing: Int[ArrayLike, "n columns choices"] | None = None
    """Experts that served each token; None where the engine does not note it."""


@dataclasses.dataclass(frozen=True)
class OnMesh(Generic[P, T]):
    """A jitted function under a mesh of its own."""

    function: Any
    mesh: Mesh

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it."""
        with jax.set_mesh(self.mesh):
            return self.function(*args, **kwargs)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Trace it for these shapes."""
        with jax.set_mesh(self.mesh):
            return self.function.lower(*args)


@pytree
@dataclasses.dataclass(frozen=True)
class _Loop:
    """Carry of the decode loop."""

    step: Int[Array, ""]
    states: tuple[PoolState, ...]
    running: Bool[Array, " n"]
    output: DecodeOutput


class PreparedWeights(dict[str, Any]):
    """Weights as `Engine.prepare` returns them."""


class Engine:
    """Compiled functions of one policy over its slot pools. Weights are arguments, not state."""

    def __init__(
        self,
        policy: Policy,
        pools: Mapping[str, SlotPool],
        *,
        automata: TokenAutomata,
        pad_id: int,
        frame_patches: int = 0,
        steps_per_call: int = 16,
        penalties: bool = False,
        alternatives: int = 0,
        routing: bool = False,
        mesh: Mesh | None = None,
        grows_from: int = GROWS_FROM,
    ) -> None:
        """`automata` know what ends a turn; `pad_id` pads rows on the right.

        Frames are padded to `frame_patches` patches, or to the largest of their batch if that is
        more: the most that a frame can have keeps frames of all shapes in one compiled tower.
        `decode` draws up to `steps_per_call` tokens of each row before the host looks. `penalties`
        keeps what each row has seen, one byte per row and token of the vocabulary, for repetition
        penalties. `alternatives` is how many of the likeliest tokens of each draw can be had.
        `routing` notes which experts serve each token, of a `RoutedPolicy` that has any.
        `mesh` is that of everything here; None takes the one that is active. It has the devices of
        the weights in the order of theirs, which may lie otherwise on them, or others. Caches of
        `grows_from` bytes and more grow with what rows say.
        """
        if not pools or steps_per_call < 1:
            raise ValueError(
                f"pools={dict(pools)}, steps_per_call={steps_per_call}: give a pool, and 1 or more"
            )
        self.policy, self.pools = policy, dict(pools)
        self.automata, self.pad_id, self.frame_patches = automata, pad_id, frame_patches
        self.steps_per_call, self.penalties, self.mesh = steps_per_call, penalties, mesh
        self.alternatives = alternatives
        self.routing = routing_of(policy) if routing else None
        if routing and self.routing is None:
            raise ValueError("routing=True: this policy tells of no experts; leave it out")
        self.compilations = 0
        """How often a function was traced, hence compiled, so far."""
        self.encode = self._on_mesh(jax.jit(self._encode))
        self.prefill = self._on_mesh(jax.jit(self._prefill, donate_argnames=("state",)))
        self.append = self._on_mesh(jax.jit(self._append, donate_argnames=("state",)))
        penalty_vocab = automata.vocab if penalties else 0
        self.caches = Caches(policy, pools, penalty_vocab, self._on_mesh, self.shards, grows_from)
        self.decode = self._on_mesh(jax.jit(self._decode, donate_argnames=("states",)))
        self._hand_over: jax.stages.Wrapped | None = None
        self.hand_over_seconds = 0.0
        """What the last hand-over of weights took."""

    def _on_mesh(self, function: Callable[P, T]) -> Callable[P, T]:
        """The function under the engine's own mesh, if it has one."""
        return function if self.mesh is None else OnMesh(function, self.mesh)

    def prepare(self, params: Params) -> Params:
        """Weights as the functions here read them fastest: cast first, then handed over to the
        engine's mesh, if it has its own: by one program on its devices, or copied to them."""
        if isinstance(params, PreparedWeights):
            return dict(params)
        prepared = self.policy.prepare(params)
        if self.mesh is None:
            return prepared
        began = time.perf_counter()
        handed = jax.block_until_ready(self._handed_over(prepared, self.mesh))
        self.hand_over_seconds = time.perf_counter() - began
        return handed

    def prepare_ahead(self, params: Params) -> PreparedWeights:
        """What `prepare` makes, for a session that another thread will open with it."""
        return PreparedWeights(self.prepare(params))

    def _handed_over(self, prepared: Mapping[str, Any], mesh: Mesh) -> Params:
        """The weights on the engine's mesh, whose devices may be others than theirs."""
        there = jax.tree.leaves(prepared)[0].sharding.device_set
        if there != set(mesh.devices.flat):
            return copied_apart(prepared, self.policy.shardings(prepared, mesh))
        if self._hand_over is None:
            self._hand_over = self.handing_over(prepared, mesh)
        return self._hand_over(prepared)

    def handing_over(self, prepared: Mapping[str, Any], mesh: Mesh) -> jax.stages.Wrapped:
        """The jitted function that takes weights such as these, or their shapes, to a mesh."""
        homes = self.policy.shardings(prepared, mesh)
        return jax.jit(
            lambda weights: jax.tree.map(moved_by_layers, weights, homes), out_shardings=homes
        )

    def metrics(self) -> dict[str, float]:
        """The largest caches since this was last asked, and what the last hand-over took, if
        weights are handed over."""
        caches = {"rollout/cache_mib": self.caches.take_peak() / 2**20}
        return caches if self.mesh is None else caches | {"time/hand_over": self.hand_over_seconds}

    def cache_bytes(self, rung: int = -1) -> int:
        """Memory of the caches of all pools, over all devices: the largest, or those of a step of
        `rollout.engine.caches.PARTS`."""
        return self.caches.bytes(rung)

    def shards(self) -> int:
        """Parts that a mesh splits rows into."""
        mesh = jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh
        return batch_shards(dict(mesh.shape))

    def place(self, rows: FrameRows) -> tuple[Any, Any]:
        """Frames and grids as `encode` takes them; with several hosts, on the devices already."""
        if jax.process_count() == 1:
            return rows[:], rows.grids
        mesh = self.mesh or jax.sharding.get_mesh()
        return put_rows(rows, mesh), put_rows(rows.grids, mesh)

    def _encode(
        self, params: Params, values: Float[Array, "b f p c"], grids: Int[Array, "b f 2"]
    ) -> VisionFeatures:
        self.compilations += 1
        values, grids = split_rows((values, grids))
        return self.policy.encode(params, values, grids)

    def _prefill(
        self,
        params: Params,
        state: PromptState,
        padded: PaddedTokens,
        features: VisionFeatures | None,
        slots: Int[Array, " b"],
    ) -> tuple[PromptState, Int[Array, "b t choices"] | None]:
        """Prefill prompts into these prompt slots; their rows start from them. And the experts that
        served them, if they are noted."""
        self.compilations += 1
        padded = split_rows(padded)
        arguments = params, padded.tokens, padded.positions, padded.vision_index, features
        (hidden, keys, values), routing = self._routed("prefill", *arguments)
        # Rows are prompt-major, as `KVCache` and the host's `SlotTable` have them.
        copies = state.hidden.shape[0] // state.keys.shape[1]
        rows = slots[:, None] * copies + jnp.arange(copies)[None]
        last = _last(hidden, padded.lengths)[:, None].astype(state.hidden.dtype)
        keys = state.keys.with_rows(slots, keys).sharded()
        values = state.values.with_rows(slots, values).sharded()
        seen = None if state.seen is None else state.seen.at[rows].set(False)
        hidden = split_rows(state.hidden.at[rows].set(last))
        return PromptState(keys, values, hidden, seen), _everywhere(routing)

    def _append(
        self,
        params: Params,
        state: PoolState,
        padded: PaddedTokens,
        features: VisionFeatures | None,
        rows: Int[Array, " m"] | None,
    ) -> tuple[PoolState, Int[Array, "m t choices"] | None]:
        """Append given tokens to all rows (those of length 0 stay as they are), or to `rows`. And
        the experts that served them, if they are noted."""
        self.compilations += 1
        (hidden, (cache,)), routing = self._routed(
            "append",
            params,
            padded.tokens,
            padded.positions,
            padded.vision_index,
            features,
            (state.cache,),
            rows,
        )
        last = _last(hidden, padded.lengths).astype(state.hidden.dtype)
        if rows is None:
            # A row that was given nothing must keep the hidden state that its next token is drawn
            # from; `_last` found padding for it.
            moved = jnp.where((padded.lengths > 0)[:, None], last, state.hidden)
        else:
            moved = state.hidden.at[rows].set(last)
        seen = None if state.seen is None else _mark_padded(state.seen, padded, rows)
        return PoolState(cache.sharded(), split_rows(moved), seen), _everywhere(routing)

    def _routed(self, name: str, *arguments: Any) -> tuple[Any, Array | None]:
        """What a method of the policy returns, and which experts served, if that is noted."""
        if self.routing is None:
            return getattr(self.policy, name)(*arguments), None
        return getattr(self.policy, f"{name}_and_routing")(*arguments)

    def _decode(
        self,
        params: Params,
        states: tuple[PoolState, ...],
        generating: GeneratingRows,
        table: Int[Array, "states vocab"],
        min_finished: Int[Array, ""],
    ) -> tuple[tuple[PoolState, ...], DecodeOutput]:
        """Draw up to `steps_per_call` tokens of every generating row, or fewer once `min_finished`
        rows have ended their turn."""
        self.compilations += 1
        limits = jnp.asarray(generating.draw.limits)
        first = _Loop(jnp.int32(0), states, limits > 0, self._no_output(generating))
        started = jnp.sum(first.running)

        def goes_on(loop: _Loop) -> Bool[Array, ""]:
            still = jnp.sum(loop.running)
            more = (loop.step < self.steps_per_call) & (still > 0)
            return more & (started - still < min_finished)

        loop = jax.lax.while_loop(
            goes_on, lambda loop: self._decode_step(params, loop, generating, table), first
        )
        return loop.states, _everywhere(loop.output)

    def _no_output(self, generating: GeneratingRows) -> DecodeOutput:
        """Before the first token."""
        rows = len(generating.positions)
        shape, listed = (rows, self.steps_per_call), self.alternatives
        return DecodeOutput(
            tokens=jnp.full(shape, self.pad_id, jnp.int32),
            log_probs=jnp.zeros(shape, jnp.float32),
            counts=jnp.zeros(rows, jnp.int32),
            chosen=jnp.zeros(shape, bool),
            floors=jnp.zeros(shape, jnp.float32),
            grammar=jnp.zeros(shape, jnp.int32),
            automata=jnp.asarray(generating.automata),
            ended=jnp.zeros(rows, bool),
            alternatives=Alternatives.none(*shape, listed) if listed else None,
            routing=None if self.routing is None else jnp.asarray(self.routing.unknown(*shape)),
        )

    def _decode_step(
        self,
        params: Params,
        loop: _Loop,
        generating: GeneratingRows,
        table: Int[Array, "states vocab"],
    ) -> _Loop:
        """One token for every running row, written to its cache even if it ends the turn."""
        output, running = loop.output, loop.running
        # Drawn first, then appended: the cache of a row that ends holds its last token too, so that
        # a tool response can follow without a step in between.
        drawn = self._draw(params, loop, generating, table)
        tokens = jnp.where(running, drawn.tokens, self.pad_id)
        (after, grown), routing = self._continue(
            params, loop, generating.positions + output.counts, tokens
        )
        automata = jnp.where(
            running[:, None], advance(table, output.automata, tokens), output.automata
        )
        ended = running & has_stopped(automata)
        counts = output.counts + running.astype(jnp.int32)
        at = slice(None), loop.step
        return _Loop(
            step=loop.step + 1,
            states=_moved_on(loop.states, grown, after, tokens, running),
            running=running & ~ended & (counts < generating.draw.limits),
            output=DecodeOutput(
                tokens=output.tokens.at[at].set(tokens),
                log_probs=output.log_probs.at[at].set(drawn.log_probs),
                counts=counts,
                chosen=output.chosen.at[at].set(~(drawn.constrained | drawn.forced)),
                floors=output.floors.at[at].set(drawn.floors),
                grammar=output.grammar.at[at].set(output.automata[:, 1]),
                automata=automata,
                ended=output.ended | ended,
                alternatives=_with_column(output.alternatives, drawn.alternatives, loop.step),
                routing=_with_column(output.routing, routing, loop.step),
            ),
        )

    def _draw(
        self,
        params: Params,
        loop: _Loop,
        generating: GeneratingRows,
        table: Int[Array, "states vocab"],
    ) -> Drawn:
        hidden = jnp.concatenate([state.hidden for state in loop.states])
        # A row's place in its own stream decides the draw, whatever else is in the batch.
        totals = jnp.concatenate([state.cache.totals for state in loop.states])
        seen = [state.seen for state in loop.states if state.seen is not None]
        return draw_tokens(
            self.policy.logits(params, hidden),
            row_keys(jnp.asarray(generating.draw.seeds), totals),
            generating.draw,
            jnp.concatenate(seen) if seen else None,
            allowed_tokens(table, loop.output.automata) if self.automata.constrains else None,
            None if generating.listed is None else jnp.asarray(generating.listed) & loop.running,
            self.alternatives,
        )

    def _continue(
        self, params: Params, loop: _Loop, positions: Int[Array, " n"], tokens: Int[Array, " n"]
    ) -> tuple[tuple[Float[Array, "n d"], tuple[KVCache, ...]], Int[Array, "n choices"] | None]:
        """Hidden states after one more text token per row, and the caches that hold it; and the
        experts that served it, if they are noted."""
        at = jnp.broadcast_to(positions[:, None, None], (len(tokens), 1, 3))
        text = jnp.full((len(tokens), 1), -1, jnp.int32)
        caches = tuple(state.cache for state in loop.states)
        arguments = params, tokens[:, None], at, text, None, caches
        (hidden, grown), routing = self._routed("append", *arguments)
        return (hidden[:, 0], grown), None if routing is None else routing[:, 0]


def _with_column(so_far: T, drawn: T, step: Int[Array, ""]) -> T:
    """Arrays `[n, columns, ...]` with what one more draw brought, if anything is kept of it."""
    if so_far is None or drawn is None:
        return so_far
    return jax.tree.map(lambda all_of, column: all_of.at[:, step].set(column), so_far, drawn)


def _everywhere(output: T) -> T:
    """Every host reads these, so every device holds them."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), output)


def _moved_on(
    states: tuple[PoolState, ...],
    grown: tuple[KVCache, ...],
    hidden: Float[Array, "n d"],
    tokens: Int[Array, " n"],
    running: Bool[Array, " n"],
) -> tuple[PoolState, ...]:
    """Running rows move on to their new hidden state; the others stay where they are."""
    after, start = [], 0
    for state, cache in zip(states, grown, strict=True):
        part = slice(start, start := start + cache.lengths.shape[0])
        on = running[part]
        moved = jnp.where(on[:, None], hidden[part].astype(state.hidden.dtype), state.hidden)
        longer = dataclasses.replace(cache, lengths=cache.lengths + on.astype(jnp.int32))
        seen = None if state.seen is None else mark_seen(state.seen, tokens[part], on)
        after.append(PoolState(longer, moved, seen))
    return tuple(after)


def _mark_padded(
    seen: Bool[Array, "n vocab"], padded: PaddedTokens, rows: Int[Array, " m"] | None
) -> Bool[Array, "n vocab"]:
    """Given tokens count as seen."""
    numbers = jnp.arange(len(seen)) if rows is None else rows
    real = jnp.arange(padded.tokens.shape[1])[None] < jnp.asarray(padded.lengths)[:, None]
    return seen.at[numbers[:, None], padded.tokens].max(real)


def _last(hidden: Float[Array, "b t d"], lengths: Int[Array, " b"]) -> Float[Array, "b d"]:
    """Hidden state of the last real token of each right-padded row."""
    at = jnp.maximum(lengths - 1, 0)[:, None, None]
    return jnp.take_along_axis(by_width(hidden), at, axis=1)[:, 0]
