"""The slots of a pool, kept on the host: which rows and prompts hold them."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from paravt_jax.pytrees import ArrayLike
from paravt_jax.records import Choices, Prompt, StopReason
from paravt_jax.routing import Routing
from rollout.engine.automaton import TokenGrammar
from rollout.engine.caches import Caches, PoolState, SlotPool
from rollout.engine.pages import PageBook
from rollout.engine.sampler import Alternatives, SamplingConfig


@dataclasses.dataclass(frozen=True)
class StreamId:
    """Handle of a stream, one row of the engine."""

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
    alternatives: Alternatives | None = None
    """`[t, k]`, where they were asked for."""
    versions: np.ndarray | None = None
    """int32 `[t]`: the version of the weights that drew each token, where a session takes newer
    ones."""
    routing: Routing | None = None
    """Which experts served the prompt, and what was given and generated since the last turn; None
    if the engine does not note it."""


@dataclasses.dataclass(frozen=True)
class RoutingPiece:
    """A part of a record of routing, in an array that a program of the engine is to return."""

    array: ArrayLike
    """`[b, t, choices]`, of several rows."""
    row: int
    count: int
    """Tokens of the row."""

    def fetch(self) -> np.ndarray:
        """`[count, choices]`; waits for it. The array keeps its copy on the host for others."""
        return np.asarray(self.array)[self.row, : self.count].copy()


@dataclasses.dataclass(frozen=True)
class Written:
    """What one row has generated so far, as in `Generated`, of a turn that goes on."""

    tokens: np.ndarray
    log_probs: np.ndarray
    alternatives: Alternatives | None


@dataclasses.dataclass(eq=False)
class StreamState:
    """A row: its stream, and where that stands."""

    stream: StreamId
    seed: int
    group: PromptGroup
    number: int = -1
    """Row of its pool; -1 while it waits."""
    length: int = 0
    """Tokens after the prompt."""
    position: int = 0
    """M-RoPE position of its next token."""
    given: Prompt | None = None
    """What is to be appended before it goes on generating."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    remaining: int = 0
    """Tokens that it may still draw in this turn; 0 while it is idle."""
    automata: Sequence[int] = (0, 0)
    """States of its search for an end and of its grammar."""
    grammar: TokenGrammar | None = None
    """One of its own, borrowed from the engine's automata."""
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    log_probs: list[np.ndarray] = dataclasses.field(default_factory=list)
    choices: list[Choices] = dataclasses.field(default_factory=list)
    versions: list[np.ndarray] = dataclasses.field(default_factory=list)
    listed: bool = False
    """Whether the likeliest tokens of its draws are wanted."""
    alternatives: list[Alternatives] = dataclasses.field(default_factory=list)
    routing: list[RoutingPiece] = dataclasses.field(default_factory=list)
    """Of what was given and generated since the last turn."""

    @property
    def written(self) -> Written:
        """What there is of this turn."""
        if not self.tokens:
            return Written(np.zeros(0, np.int32), np.zeros(0, np.float32), None)
        likeliest = _joined(self.alternatives) if self.listed else None
        return Written(np.concatenate(self.tokens), np.concatenate(self.log_probs), likeliest)

    def take_turn(self, stopped: bool, eos_ids: Sequence[int]) -> Generated:
        """The turn that just ended; the row is idle again."""
        # A turn may both end and use up its limit with one token: then it has ended.
        turn, reason, choices = self.written, StopReason.LENGTH, Choices.joined(self.choices)
        if stopped:
            reason = StopReason.END if turn.tokens[-1] in eos_ids else StopReason.STOP
        versions = np.concatenate(self.versions) if self.versions else None
        self.tokens, self.log_probs, self.choices, self.remaining = [], [], [], 0
        self.alternatives, self.versions = [], []
        told = turn.alternatives, versions, self.take_routing()
        return Generated(turn.tokens, turn.log_probs, reason, choices, *told)

    def take_routing(self) -> Routing | None:
        """Which experts served this turn, what was given before it, and the prompt."""
        if self.group.routing is None:
            return None
        pieces, self.routing = self.routing, []
        return Routing(self.group.routing, np.concatenate([piece.fetch() for piece in pieces]))


def _joined(parts: Sequence[Alternatives]) -> Alternatives:
    """Those of one piece after the other."""
    return Alternatives(
        np.concatenate([np.asarray(part.tokens) for part in parts]),
        np.concatenate([np.asarray(part.log_probs) for part in parts]),
    )


@dataclasses.dataclass(eq=False)
class PromptGroup:
    """A prompt and the rows that continue it."""

    prompt: Prompt
    rows: list[StreamState] = dataclasses.field(default_factory=list)
    slot: int = -1
    """Prompt slot of its pool; -1 while it waits."""
    prefilled: RoutingPiece | None = None
    """Which experts served the prompt, if the engine notes it."""

    @functools.cached_property
    def routing(self) -> np.ndarray | None:
        """`[t, choices]` of the prompt: one array for all its rows."""
        prefilled, self.prefilled = self.prefilled, None  # frees memory of the device
        return None if prefilled is None else prefilled.fetch()


class SlotTable:
    """The rows and prompts of one pool, and the queue of those that wait for slots."""

    def __init__(self, name: str, pool: SlotPool, caches: Caches) -> None:
        self.name, self.pool, self._caches = name, pool, caches
        groups, count = self.state.cache.table.owners.shape
        self._pages = PageBook(pool.rows, groups, pool.row_pages, pool.page_slots, count)
        self.queue: collections.deque[PromptGroup] = collections.deque()
        self.groups: list[PromptGroup | None] = [None] * pool.prompts
        self.rows: list[StreamState | None] = [None] * pool.rows

    @property
    def generates(self) -> bool:
        """Whether any admitted row is in the midst of a turn."""
        return any(row is not None and row.remaining for row in self.rows)

    @property
    def state(self) -> PoolState:
        """The caches. They outlive the session, hence belong to the engine."""
        return self._caches.states[self.name]

    @state.setter
    def state(self, state: PoolState) -> None:
        self._caches.states[self.name] = state

    def current(self) -> PoolState:
        """The state with the lengths and pages of now."""
        prompts = [0 if group is None else len(group.prompt.tokens) for group in self.groups]
        rows = [0 if row is None else row.length for row in self.rows]
        lengths = np.array(prompts, np.int32), np.array(rows, np.int32)
        return self.state.with_lengths(*lengths, self._pages.table())

    def reserve(self, tokens: Mapping[StreamState, int]) -> None:
        """Pages for so many tokens after the prompts of these rows; the cache grows if need be."""
        needed = {row.number: count for row, count in tokens.items()}
        while not self._pages.reserve(needed) and not self._caches.fixed:
            self._pages.grow(self._caches.grow(self.name))

    def admit(self) -> list[PromptGroup]:
        """Give waiting prompts the free slots, first come, first served."""
        admitted = []
        for slot, holder in enumerate(self.groups):
            if holder is None and self.queue:
                group = self.groups[slot] = self.queue.popleft()
                group.slot = slot
                # Prompt-major, as the rows of the `KVCache` are.
                for copy, row in enumerate(group.rows):
                    row.number = slot * self.pool.copies + copy
                    self.rows[row.number] = row
                admitted.append(group)
        return admitted

    def release(self, row: StreamState) -> None:
        """Free the slot of a row, and that of its prompt after the last row."""
        group = row.group
        group.rows.remove(row)
        if row.number >= 0:
            self.rows[row.number] = None
            self._pages.release(row.number)
        if not group.rows and group.slot >= 0:
            self.groups[group.slot] = None
        elif not group.rows:
            self.queue.remove(group)
