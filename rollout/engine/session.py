"""The host side of rollouts: requests in, streams out, under weights that may change between steps.

    streams = session.open("main", prompt, seeds)           they share a prompt
    session.generate(stream, given, sampling, max_tokens)   append, then generate one turn
    for stream, turn in session.step(): ...                 turns that ended
    session.close(stream)                                   frees its slot

Continuous batching: waiting prompts are prefilled as slots become free, beside rows that go on
generating. The cache of a row holds exactly the tokens of its stream; none is computed twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from paravt_jax.blocks import text_block
from paravt_jax.interfaces import Params
from paravt_jax.patches import FrameRows, largest, restride
from paravt_jax.records import Choices, Prompt, VisionFeatures
from paravt_jax.rope_index import next_position
from rollout.engine.automaton import TokenGrammar
from rollout.engine.engine import DecodeOutput, Engine, GeneratingRows
from rollout.engine.padding import (
    MIN_APPEND,
    MIN_PROMPT,
    NO_LIMIT,
    batches,
    grouped,
    pad,
    prompt_batches,
    static_shape,
)
from rollout.engine.sampler import Alternatives, Draw, SamplingConfig
from rollout.engine.slots import (
    Generated,
    PromptGroup,
    RoutingPiece,
    SlotTable,
    StreamId,
    StreamState,
    Written,
)

IDLE = SamplingConfig()
"""Sampling settings of rows without a request: what these draw is thrown away."""

Wrote = Callable[[StreamId, np.ndarray], object]
"""Told of the tokens, int32 `[t]`, that a stream has just generated."""


@dataclasses.dataclass(frozen=True)
class VersionedWeights:
    """Weights, and which version of them these are."""

    version: int
    params: Params


Newest = Callable[[], VersionedWeights]
"""Asked before each step of a session: the weights to go on with."""


class Session:
    """Streams of an engine's slot pools."""

    def __init__(
        self,
        engine: Engine,
        params: Params,
        wrote: Wrote | None = None,
        newest: Newest | None = None,
    ) -> None:
        """An earlier session of the engine must not be used any more: this one takes its caches.

        `wrote` is called after each step for each stream that has grown. Without `newest` all is
        drawn under `params`.
        """
        self._engine, self._params, self._wrote = engine, engine.prepare(params), wrote
        self._given, self._newest = params, newest
        self._version: int | None = None
        engine.caches.open()
        self._tables = {
            name: SlotTable(name, pool, engine.caches) for name, pool in engine.pools.items()
        }
        self._rows: dict[StreamId, tuple[SlotTable, StreamState]] = {}
        self._opened = 0

    def open(self, pool: str, prompt: Prompt, seeds: Sequence[int]) -> list[StreamId]:
        """Streams that share a prompt, one per seed. They wait while the pool is full.

        `seeds` (uint32) decide a stream's draws together with its position, nothing else does.

        Raises:
          ValueError: it would not fit even an empty pool.
        """
        table = self._tables[pool]
        size = table.pool
        if len(prompt.tokens) > size.prompt_tokens or not 0 < len(seeds) <= size.copies:
            raise ValueError(
                f"a prompt of {len(prompt.tokens)} tokens and {len(seeds)} copies does not fit "
                f"pool {pool!r} of {size.prompt_tokens} tokens and 1 to {size.copies} copies; "
                "shorten it or widen the pool"
            )
        group = PromptGroup(prompt)
        for seed in seeds:
            self._opened += 1
            row = StreamState(
                StreamId(self._opened), seed, group, position=next_position(prompt.positions)
            )
            group.rows.append(row)
            self._rows[row.stream] = table, row
        table.queue.append(group)
        return [row.stream for row in group.rows]

    def tokens_left(self, stream: StreamId) -> int:
        """Tokens that the stream can still take."""
        table, row = self._find(stream)
        given = 0 if row.given is None else len(row.given.tokens)
        return table.pool.suffix - row.length - given - row.remaining

    def generate(
        self,
        stream: StreamId,
        given: Prompt | Sequence[int],
        sampling: SamplingConfig,
        max_tokens: int,
        listed: bool = False,
        grammar: TokenGrammar | None = None,
    ) -> None:
        """Append what is given, then generate one turn of at most `max_tokens` tokens.

        A `Prompt` brings frames of its own; its positions count from 0. `listed` asks for the
        likeliest tokens of each draw, as many as the engine lists. `grammar` is what the turn must
        obey from its first generated token on, of this stream alone.

        Raises:
          ValueError: the stream is closed, still generates, or has no room for that; or the
            engine cannot draw like that.
          NoRoom: grammars of other streams take all room for them.
        """
        _, row = self._find(stream)
        block = given if isinstance(given, Prompt) else text_block(given)
        if row.remaining:
            raise ValueError(f"{stream} still generates: wait for its turn to end")
        if max_tokens < 1 or len(block.tokens) + max_tokens > self.tokens_left(stream):
            raise ValueError(
                f"{stream} has room for {self.tokens_left(stream)} more tokens, not for "
                f"{len(block.tokens)} given and {max_tokens} generated; widen its pool's suffix"
            )
        if sampling.repetition_penalty != 1 and not self._engine.penalties:
            raise ValueError(
                f"repetition_penalty={sampling.repetition_penalty}: this engine does not keep what "
                "rows have seen; make it with penalties=True"
            )
        if listed and not self._engine.alternatives:
            raise ValueError("listed=True: this engine lists none; make it with alternatives=20")
        automata = self._engine.automata
        row.automata = automata.start(sampling, block.tokens.tolist())
        if grammar is not None:
            row.automata = row.automata[0], automata.borrow(grammar)
            self._return_grammar(row)
            row.grammar = grammar
        row.given = block if len(block.tokens) else None
        row.sampling, row.remaining, row.listed = sampling, max_tokens, listed

    def written(self, stream: StreamId) -> Written:
        """What the stream has generated so far of a turn that has not ended."""
        return self._find(stream)[1].written

    def close(self, stream: StreamId) -> None:
        """Forget a stream and free its slot."""
        table, row = self._find(stream)
        del self._rows[stream]
        self._return_grammar(row)
        table.release(row)

    def _return_grammar(self, row: StreamState) -> None:
        if row.grammar is not None:
            self._engine.automata.give_back(row.grammar)
            row.grammar = None

    @property
    def open_streams(self) -> int:
        """Streams that have not been closed, waiting ones included."""
        return len(self._rows)

    @property
    def generating(self) -> int:
        """Streams that are to generate and have not ended their turn, waiting ones included."""
        return sum(row.remaining > 0 for _, row in self._rows.values())

    def step(self) -> list[tuple[StreamId, Generated]]:
        """Prefill what waits, append what was given, decode some tokens; the turns that ended.

        Nothing moves while all that is to generate waits for slots that idle streams hold: close
        one of those, or let it generate.
        """
        self._update()
        # In this order a prompt that is admitted now decodes in this very step, its forced prefix
        # included.
        for table in self._tables.values():
            self._prefill(table)
            self._append(table)
        tables = [table for table in self._tables.values() if table.generates]
        return self._decode(tables) if tables else []

    def _update(self) -> None:
        """Go on with the newest weights. What is in the caches stays as older ones made it, and so
        does the hidden state that the next token of a row is drawn from."""
        if self._newest is None:
            return
        newest = self._newest()
        self._version = newest.version
        if newest.params is not self._given:
            del self._params  # there is memory for one set of prepared weights
            self._given, self._params = newest.params, self._engine.prepare(newest.params)

    def _find(self, stream: StreamId) -> tuple[SlotTable, StreamState]:
        if stream not in self._rows:
            raise ValueError(f"{stream} is closed or of another session")
        return self._rows[stream]

    def _prefill(self, table: SlotTable) -> None:
        """Prefill the prompts that got a slot, several together."""
        most = table.pool.prompt_tokens
        shapes = grouped(table.admit(), lambda group: static_shape(group.prompt, MIN_PROMPT, most))
        chosen = prompt_batches(shapes, table.pool.prompts, self._engine.shards())
        for (tokens, frames), batch, size in chosen:
            # Repetitions fill up the batch. Their slot is one beyond the last, and JAX drops
            # what is written out of bounds: they leave no trace.
            spare = size - len(batch)
            prompts = [group.prompt for group in [*batch, *[batch[0]] * spare]]
            features, index = self._encode(prompts, frames)
            padded = pad(prompts, index, tokens, self._engine.pad_id)
            filled_slots = [group.slot for group in batch]
            slots = np.array([*filled_slots, *[table.pool.prompts] * spare], np.int32)
            filled, routing = self._engine.prefill(
                self._params, table.state.prompts, padded, features, slots
            )
            table.state = table.state.with_prompts(filled)
            if routing is not None:
                for at, group in enumerate(batch):
                    group.prefilled = RoutingPiece(routing, at, len(group.prompt.tokens))

    def _append(self, table: SlotTable) -> None:
        """Append what rows were given, blocks of one shape together."""
        pairs = [(row, row.given) for row in table.rows if row is not None and row.given]
        table.reserve({row: row.length + len(given.tokens) for row, given in pairs})
        shapes = grouped(pairs, lambda pair: static_shape(pair[1], MIN_APPEND))
        for (tokens, frames), alike in shapes:
            rows = [row for row, _ in alike]
            if 2 * len(rows) >= table.pool.rows:
                # It is cheaper to take all rows than to gather those that it concerns.
                self._append_batch(table, set(rows), table.rows, tokens, frames)
                continue
            for batch, size in batches(rows, table.pool.rows, self._engine.shards()):
                placed = [*batch, *[None] * (size - len(batch))]
                self._append_batch(table, set(batch), placed, tokens, frames)

    def _append_batch(
        self,
        table: SlotTable,
        rows: set[StreamState],
        placed: Sequence[StreamState | None],
        tokens: int,
        frames: int,
    ) -> None:
        """One batch with a row for each of `placed`, empty for those that are not among `rows`."""
        blank = text_block([])
        given = [row.given if row in rows and row.given else blank for row in placed]
        starts = [0 if row is None else row.position for row in placed]
        features, index = self._encode(given, frames)
        padded = pad(given, index, tokens, self._engine.pad_id, starts)
        numbers = None
        if placed is not table.rows:
            # As with prompts: writes beyond the last row are dropped.
            beyond = table.pool.rows
            numbers = [beyond if row is None else row.number for row in placed]
            numbers = np.array(numbers, np.int32)
        table.state, routing = self._engine.append(
            self._params, table.current(), padded, features, numbers
        )
        for at, row in enumerate(placed):
            if row is None or row not in rows:
                continue
            assert row.given is not None
            if routing is not None:
                row.routing.append(RoutingPiece(routing, at, len(row.given.tokens)))
            row.length += len(row.given.tokens)
            row.position += next_position(row.given.positions)
            row.given = None

    def _encode(
        self, blocks: Sequence[Prompt], frames: int
    ) -> tuple[VisionFeatures | None, list[np.ndarray]]:
        """Vision features of a batch, and each block's `vision_index` into them."""
        if not frames:
            return None, [block.vision_index for block in blocks]
        shown = [block.patches for block in blocks]
        patches = max(largest(shown)[1], self._engine.frame_patches)
        rows = self._engine.place(FrameRows(shown, frames, patches))
        features = self._engine.encode(self._params, *rows)
        return features, [restride(block, patches) for block in blocks]

    def _decode(self, tables: Sequence[SlotTable]) -> list[tuple[StreamId, Generated]]:
        for table in tables:
            running = [row for row in table.rows if row is not None and row.remaining]
            steps = self._engine.steps_per_call
            table.reserve({row: row.length + min(row.remaining, steps) for row in running})
        rows = [row for table in tables for row in table.rows]
        waits = any(table.queue for table in self._tables.values())
        states, output = self._engine.decode(
            self._params,
            tuple(table.current() for table in tables),
            generating_rows(rows, bool(self._engine.alternatives)),
            self._engine.automata.table,
            # With somebody waiting, a free slot is worth a return to the host.
            np.int32(1 if waits else NO_LIMIT),
        )
        for table, state in zip(tables, states, strict=True):
            table.state = state
        host = jax.device_get(output)
        ran = [
            (number, row) for number, row in enumerate(rows) if row is not None and row.remaining
        ]
        if self._wrote is not None:
            for number, row in ran:
                self._wrote(row.stream, host.tokens[number, : host.counts[number]])
        ends = self._engine.automata.eos_ids
        version = self._version
        turns = [(row.stream, collect(row, number, host, ends, version)) for number, row in ran]
        return [(stream, turn) for stream, turn in turns if turn is not None]


def collect(
    row: StreamState,
    number: int,
    output: DecodeOutput,
    eos_ids: Sequence[int],
    version: int | None,
) -> Generated | None:
    """Keep what a call generated of a row; its turn if that ended it."""
    count = int(output.counts[number])
    if version is not None:
        row.versions.append(np.full(count, version, np.int32))
    row.tokens.append(output.tokens[number, :count].copy())
    row.log_probs.append(output.log_probs[number, :count].copy())
    noted = output.chosen, output.floors, output.grammar
    row.choices.append(Choices(*(column[number, :count].copy() for column in noted)))
    if output.routing is not None:
        # A copy: the whole array would stay as long as its longest turn.
        row.routing.append(RoutingPiece(output.routing[[number]], 0, count))
    if row.listed and (likeliest := output.alternatives) is not None:
        columns = likeliest.tokens, likeliest.log_probs
        row.alternatives.append(Alternatives(*(top[number, :count].copy() for top in columns)))
    row.length, row.position = row.length + count, row.position + count
    row.remaining -= count
    row.automata = output.automata[number].tolist()
    stopped = bool(output.ended[number])
    return row.take_turn(stopped, eos_ids) if stopped or not row.remaining else None


def generating_rows(rows: Sequence[StreamState | None], listing: bool = False) -> GeneratingRows:
    """Where rows stand; those of free slots are idle. `listing`: an engine that lists the
    likeliest tokens is told of which rows."""
    listed = np.array([row is not None and row.listed for row in rows], bool)
    return GeneratingRows(
        draw=Draw.of(
            [IDLE if row is None else row.sampling for row in rows],
            [0 if row is None else row.seed for row in rows],
            [0 if row is None else row.remaining for row in rows],
        ),
        positions=np.array([0 if row is None else row.position for row in rows], np.int32),
        automata=np.array([(0, 0) if row is None else row.automata for row in rows], np.int32),
        listed=listed if listing else None,
    )
