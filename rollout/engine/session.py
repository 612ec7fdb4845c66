"""The host side of rollouts: requests in, streams out, under one set of weights.

    main = session.open("main", prompt, seeds)         streams that share a prompt
    session.speak(stream, given, sampling, limit)      append, then generate one turn
    for stream, turn in session.visit(): ...           turns that ended
    session.close(stream)                              its slot is free for who waits

Waiting prompts enter as slots become free, beside rows that go on speaking. The cache of a row
holds exactly the tokens of its stream, and nothing is ever read twice.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from paravt_jax.blocks import text_block
from paravt_jax.interfaces import Params
from paravt_jax.patches import largest, restride, stack_patches
from paravt_jax.records import Choices, Prompt, StopReason, VisionFeatures
from paravt_jax.rope_index import next_position
from rollout.engine.engine import Block, Engine, Lane, LaneState, Speakers, Spoken
from rollout.engine.sampler import Draw, SamplingConfig

T = TypeVar("T")

SILENT = SamplingConfig()
BATCH = 16
"""Prompts, or blocks for live rows, that are read together."""
PROMPT_LEAST, APPEND_LEAST = 64, 8
"""Smallest static sizes, in tokens, of prompts and of what is appended to live rows."""
NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Stream:
    """Handle of one row."""

    number: int


@dataclasses.dataclass(frozen=True)
class Generated:
    """What one row generated in one turn."""

    tokens: np.ndarray
    """int32 `[t]`, the end-of-turn token included if there was one."""
    log_probs: np.ndarray
    """float32 `[t]`, under the distribution that each token was drawn from."""
    stop_reason: StopReason
    choices: Choices | None = None
    """How each token was chosen; None if nothing but temperature shaped them."""


@dataclasses.dataclass(eq=False)
class _Row:
    """A stream as the host sees it."""

    stream: Stream
    seed: int
    prompt: _Shared
    number: int = -1
    """Row of its lane; -1 while it waits."""
    length: int = 0
    """Tokens after the prompt."""
    position: int = 0
    """M-RoPE position of its next token."""
    given: Prompt | None = None
    """What is to be appended before it goes on speaking."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    left: int = 0
    """Tokens that it may still draw in this turn; 0 while it is silent."""
    automata: Sequence[int] = (0, 0)
    """States of its search for an end and of its grammar."""
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    log_probs: list[np.ndarray] = dataclasses.field(default_factory=list)
    choices: list[Choices] = dataclasses.field(default_factory=list)

    def take_turn(self, stopped: bool, eos_ids: Sequence[int]) -> Generated:
        """The turn that just ended; the row is silent again."""
        tokens, reason = np.concatenate(self.tokens), StopReason.LENGTH
        if stopped:
            reason = StopReason.END if tokens[-1] in eos_ids else StopReason.STOP
        log_probs, choices = np.concatenate(self.log_probs), Choices.joined(self.choices)
        self.tokens, self.log_probs, self.choices, self.left = [], [], [], 0
        return Generated(tokens, log_probs, reason, choices)


@dataclasses.dataclass(eq=False)
class _Shared:
    """A prompt and the rows that continue it."""

    prompt: Prompt
    rows: list[_Row] = dataclasses.field(default_factory=list)
    slot: int = -1
    """Prompt slot of its lane; -1 while it waits."""


class _Desk:
    """The books of one lane."""

    def __init__(self, name: str, lane: Lane, states: dict[str, LaneState]) -> None:
        self.name, self.lane, self._states = name, lane, states
        self.queue: collections.deque[_Shared] = collections.deque()
        self.shared: list[_Shared | None] = [None] * lane.prompts
        self.rows: list[_Row | None] = [None] * lane.rows

    @property
    def speaking(self) -> list[_Row]:
        """Admitted rows in the midst of a turn."""
        return [row for row in self.rows if row is not None and row.left]

    @property
    def state(self) -> LaneState:
        """The caches. They outlive the session, hence belong to the engine."""
        return self._states[self.name]

    @state.setter
    def state(self, state: LaneState) -> None:
        self._states[self.name] = state

    def current(self) -> LaneState:
        """The state with the lengths of now."""
        prompts = [0 if s is None else len(s.prompt.tokens) for s in self.shared]
        rows = [0 if row is None else row.length for row in self.rows]
        return self.state.with_lengths(np.array(prompts, np.int32), np.array(rows, np.int32))

    def seat(self) -> list[_Shared]:
        """Give waiting prompts the free slots."""
        seated = []
        for slot, holder in enumerate(self.shared):
            if holder is None and self.queue:
                shared = self.shared[slot] = self.queue.popleft()
                shared.slot = slot
                for copy, row in enumerate(shared.rows):
                    row.number = slot * self.lane.copies + copy
                    self.rows[row.number] = row
                seated.append(shared)
        return seated

    def leave(self, row: _Row) -> None:
        """A closed row's place is free; its prompt's when it was the last one."""
        shared = row.prompt
        shared.rows.remove(row)
        if row.number >= 0:
            self.rows[row.number] = None
        if not shared.rows and shared.slot >= 0:
            self.shared[shared.slot] = None
        elif not shared.rows:
            self.queue.remove(shared)


class Session:
    """Live streams under one set of weights."""

    def __init__(self, engine: Engine, params: Params) -> None:
        """Empty. An earlier session of the engine must not be used any more: caches are shared."""
        self._engine, self._params = engine, engine.policy.prepare(params)
        states = engine.states
        self._desks = {name: _Desk(name, lane, states) for name, lane in engine.lanes.items()}
        self._rows: dict[Stream, tuple[_Desk, _Row]] = {}
        self._opened = 0
        self.decode_steps = self.row_steps = self.used_row_steps = 0
        """Decode steps; those times rows; and rows that spoke in them."""

    def open(self, lane: str, prompt: Prompt, seeds: Sequence[int]) -> list[Stream]:
        """Streams that share a prompt, one per seed. They wait while the lane is full.

        `seeds` (uint32) decide a stream's draws together with its position, nothing else does.

        Raises:
          ValueError: it would not fit even an empty lane.
        """
        desk = self._desks[lane]
        size = desk.lane
        if len(prompt.tokens) > size.prompt_tokens or not 0 < len(seeds) <= size.copies:
            raise ValueError(
                f"a prompt of {len(prompt.tokens)} tokens and {len(seeds)} copies does not fit "
                f"lane {lane!r} of {size.prompt_tokens} tokens and 1 to {size.copies} copies; "
                "shorten it or widen the lane"
            )
        shared = _Shared(prompt)
        for seed in seeds:
            self._opened += 1
            row = _Row(Stream(self._opened), seed, shared, position=next_position(prompt.positions))
            shared.rows.append(row)
            self._rows[row.stream] = desk, row
        desk.queue.append(shared)
        return [row.stream for row in shared.rows]

    def room(self, stream: Stream) -> int:
        """Tokens that the stream can still take."""
        desk, row = self._find(stream)
        waiting = 0 if row.given is None else len(row.given.tokens)
        return desk.lane.suffix - row.length - waiting - row.left

    def speak(
        self, stream: Stream, given: Prompt | Sequence[int], sampling: SamplingConfig, limit: int
    ) -> None:
        """Append what is given, then let the stream generate one turn of at most `limit` tokens.

        A `Prompt` brings frames of its own; its positions count from 0.

        Raises:
          ValueError: the stream is closed, speaks already, or has no room for that; or the
            engine cannot draw like that.
        """
        _, row = self._find(stream)
        block = given if isinstance(given, Prompt) else text_block(given)
        if row.left:
            raise ValueError(f"{stream} speaks already: wait for its turn to end")
        if limit < 1 or len(block.tokens) + limit > self.room(stream):
            raise ValueError(
                f"{stream} has room for {self.room(stream)} more tokens, not for "
                f"{len(block.tokens)} given and {limit} of its own; widen its lane's suffix"
            )
        if sampling.repetition_penalty != 1 and not self._engine.penalties:
            raise ValueError(
                f"repetition_penalty={sampling.repetition_penalty}: this engine does not keep what "
                "rows have seen; make it with penalties=True"
            )
        row.automata = self._engine.automata.start(sampling, block.tokens.tolist())
        row.given = block if len(block.tokens) else None
        row.sampling, row.left = sampling, limit

    def close(self, stream: Stream) -> None:
        """Forget a stream; who waits may take its place."""
        desk, row = self._find(stream)
        del self._rows[stream]
        desk.leave(row)

    @property
    def speaking(self) -> int:
        """Streams that have been told to speak and have not ended their turn."""
        return sum(row.left > 0 for _, row in self._rows.values())

    @property
    def slot_use(self) -> float:
        """Share of rows that spoke, over all decode steps so far."""
        return self.used_row_steps / max(self.row_steps, 1)

    def visit(self) -> list[tuple[Stream, Generated]]:
        """Admit who waits, append what was given, decode some tokens; the turns that ended.

        Nothing moves while all that shall speak waits for slots that silent streams hold: close
        one of them, or let it speak.
        """
        for desk in self._desks.values():
            self._admit(desk)
            self._append(desk)
        desks = [desk for desk in self._desks.values() if desk.speaking]
        return self._decode(desks) if desks else []

    def _find(self, stream: Stream) -> tuple[_Desk, _Row]:
        if stream not in self._rows:
            raise ValueError(f"{stream} is closed or of another session")
        return self._rows[stream]

    def _admit(self, desk: _Desk) -> None:
        """Read the prompts that got a slot, those of one shape together."""
        most = desk.lane.prompt_tokens
        shapes = _grouped(desk.seat(), lambda shared: _shape(shared.prompt, PROMPT_LEAST, most))
        for (tokens, frames), alike in shapes:
            for batch, size in _batches(alike, desk.lane.prompts):
                # Repetitions fill up the batch; their slot does not exist, so they leave no trace.
                spare = size - len(batch)
                prompts = [shared.prompt for shared in [*batch, *[batch[0]] * spare]]
                features, index = self._see(prompts, frames)
                block = _block(prompts, index, tokens, self._engine.pad_id)
                own = [shared.slot for shared in batch]
                slots = np.array([*own, *[desk.lane.prompts] * spare], np.int32)
                desk.state = self._engine.admit(
                    self._params, desk.current(), block, features, slots
                )

    def _append(self, desk: _Desk) -> None:
        """Append what rows were given, blocks of one shape together."""
        told = [row for row in desk.rows if row is not None and row.given is not None]
        for (tokens, frames), alike in _grouped(told, lambda row: _shape(row.given, APPEND_LEAST)):
            if 2 * len(alike) >= desk.lane.rows:
                # It is cheaper to take all rows than to gather those that it concerns.
                self._append_block(desk, set(alike), desk.rows, tokens, frames)
                continue
            for batch, size in _batches(alike, desk.lane.rows):
                placed = [*batch, *[None] * (size - len(batch))]
                self._append_block(desk, set(batch), placed, tokens, frames)

    def _append_block(
        self,
        desk: _Desk,
        told: set[_Row],
        placed: Sequence[_Row | None],
        tokens: int,
        frames: int,
    ) -> None:
        """One block with a row for each of `placed`, empty where it was told nothing."""
        blank = text_block([])
        given = [row.given if row in told and row.given else blank for row in placed]
        starts = [0 if row is None else row.position for row in placed]
        features, index = self._see(given, frames)
        block = _block(given, index, tokens, self._engine.pad_id, starts)
        numbers = None
        if placed is not desk.rows:
            nowhere = desk.lane.rows
            numbers = [nowhere if row is None else row.number for row in placed]
            numbers = np.array(numbers, np.int32)
        desk.state = self._engine.append(self._params, desk.current(), block, features, numbers)
        for row in told:
            assert row.given is not None
            row.length += len(row.given.tokens)
            row.position += next_position(row.given.positions)
            row.given = None

    def _see(
        self, prompts: Sequence[Prompt], frames: int
    ) -> tuple[VisionFeatures | None, list[np.ndarray]]:
        """Vision features of a batch, and each prompt's `vision_index` into them."""
        if not frames:
            return None, [prompt.vision_index for prompt in prompts]
        shown = [prompt.patches for prompt in prompts]
        patches = max(largest(shown)[1], self._engine.frame_patches)
        features = self._engine.encode(self._params, *stack_patches(shown, frames, patches))
        return features, [restride(prompt, patches) for prompt in prompts]

    def _decode(self, desks: Sequence[_Desk]) -> list[tuple[Stream, Generated]]:
        rows = [row for desk in desks for row in desk.rows]
        waits = any(desk.queue for desk in self._desks.values())
        states, spoken = self._engine.decode(
            self._params,
            tuple(desk.current() for desk in desks),
            _speakers(rows),
            self._engine.automata.table,
            # With somebody waiting, a free slot is worth a visit.
            np.int32(1 if waits else NEVER),
        )
        for desk, state in zip(desks, states, strict=True):
            desk.state = state
        host = jax.device_get(spoken)
        self.decode_steps += int(host.counts.max())
        self.row_steps += int(host.counts.max()) * len(rows)
        self.used_row_steps += int(host.counts.sum())
        spoke = [(number, row) for number, row in enumerate(rows) if row is not None and row.left]
        ends = self._engine.automata.eos_ids
        turns = [(row.stream, _hear(row, number, host, ends)) for number, row in spoke]
        return [(stream, turn) for stream, turn in turns if turn is not None]


def _hear(row: _Row, number: int, spoken: Spoken, eos_ids: Sequence[int]) -> Generated | None:
    """Note what a row said; its turn if that ended it."""
    count = int(spoken.counts[number])
    row.tokens.append(spoken.tokens[number, :count].copy())
    row.log_probs.append(spoken.log_probs[number, :count].copy())
    noted = spoken.own, spoken.floors, spoken.grammar
    row.choices.append(Choices(*(column[number, :count].copy() for column in noted)))
    row.length, row.position, row.left = row.length + count, row.position + count, row.left - count
    row.automata = spoken.automata[number].tolist()
    stopped = bool(spoken.ended[number])
    return row.take_turn(stopped, eos_ids) if stopped or not row.left else None


def _speakers(rows: Sequence[_Row | None]) -> Speakers:
    """Free places are silent."""
    return Speakers(
        draw=Draw.of(
            [SILENT if row is None else row.sampling for row in rows],
            [0 if row is None else row.seed for row in rows],
            [0 if row is None else row.left for row in rows],
        ),
        positions=np.array([0 if row is None else row.position for row in rows], np.int32),
        automata=np.array([(0, 0) if row is None else row.automata for row in rows], np.int32),
    )


def _block(
    prompts: Sequence[Prompt],
    index_P_T: Sequence[np.ndarray],
    width: int,
    pad_id: int,
    starts: Sequence[int] | None = None,
) -> Block:
    """Prompts as one right-padded block; `starts` are added to their positions."""
    rows = len(prompts)
    tokens = np.full((rows, width), pad_id, np.int32)
    positions = np.zeros((rows, width, 3), np.int32)
    vision_index = np.full((rows, width), -1, np.int32)
    for row, (prompt, index) in enumerate(zip(prompts, index_P_T, strict=True)):
        tokens[row, : len(index)] = prompt.tokens
        positions[row, : len(index)] = prompt.positions + (starts[row] if starts else 0)
        vision_index[row, : len(index)] = index
    lengths = np.array([len(prompt.tokens) for prompt in prompts], np.int32)
    return Block(tokens, positions, vision_index, lengths)


def _shape(prompt: Prompt | None, least: int, most: int = NEVER) -> tuple[int, int]:
    """Static numbers of tokens and frames that hold a prompt."""
    if prompt is None:
        raise ValueError("no prompt: a shape is that of something to read")
    frames = 0 if prompt.patches is None else len(prompt.patches.grids)
    return static_size(len(prompt.tokens), frames, least, most)


def static_size(tokens: int, frames: int, least: int, most: int = NEVER) -> tuple[int, int]:
    """Tokens and frames that a block of these many is padded to: powers of two, tokens at least
    `least` and at most `most`."""
    return min(_power(tokens, least), most), _power(frames, 1) if frames else 0


def _power(count: int, least: int) -> int:
    """Smallest `least * 2**i` that is at least `count`."""
    return least << max(0, (-(-count // least) - 1).bit_length())


def _grouped(
    items: Iterable[T], key: Callable[[T], tuple[int, int]]
) -> list[tuple[tuple[int, int], list[T]]]:
    """Items of each key, in the order in which the keys first occur."""
    groups: dict[tuple[int, int], list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def _batches(items: Sequence[T], most: int) -> Iterator[tuple[list[T], int]]:
    """Cut into batches, each with the size that it is to be padded to: `BATCH` or 1, so that few
    shapes occur."""
    size = min(BATCH, most)
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        if len(batch) > size // 4:
            yield batch, size
        else:
            yield from (([item], 1) for item in batch)
