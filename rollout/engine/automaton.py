"""Stop strings and grammars on token ids, for every byte-level BPE and every way to cut a text.

An automaton over bytes is lifted to tokens once, on the host: a token acts on a state as its
bytes do, one after the other. All automata of an engine share one table, so that requests that
stop or are constrained in different ways decode in one compiled step; what a request asks for
is the pair of states in which its rows start. On the device, per token:

    drawn = draw_tokens(logits, keys, draw, seen, allowed_tokens(table, states))
    states = advance(table, states, drawn.tokens)
    ended = has_stopped(states)
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from paravt_jax.protocol import TURN_START
from paravt_jax.pytrees import ArrayLike
from rollout.engine.grammar import DEAD, ByteAutomaton, finder
from rollout.engine.sampler import SamplingConfig

FREE, STOPPED = 0, 1
"""States of the table: nothing to look for or to obey but the end of the turn; the turn is over."""

RESPONSE_HEAD = f"{TURN_START}assistant\n".encode()
"""Given tokens belong to the response from behind the last of these."""


class NoRoom(Exception):
    """Grammars that are in use fill the room for those of single requests."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenGrammar:
    """A grammar on the tokens of one vocabulary; its states count from 0."""

    moves: Int[np.ndarray, "state vocab"]
    """State after a token; `DEAD` if none."""
    ends: Bool[ArrayLike, " state"]
    """Where the turn may end."""


class TokenAutomata:
    """The table of what requests may stop at and must obey, as it grows with new requests."""

    def __init__(
        self,
        contents: Sequence[bytes],
        eos_ids: Sequence[int],
        grammars: Mapping[str, ByteAutomaton] | None = None,
        reserve: int = 16,
        room: int = 0,
        place: Callable[[np.ndarray], Any] = jnp.asarray,
    ) -> None:
        """
        Args:
            contents: bytes of each token id, see `paravt_jax.structure.token_bytes`; one for
                each logit. Without stop strings and grammars all of them may be empty.
            eos_ids: tokens that end a turn, unless a grammar forbids it to end yet.
            grammars: what `SamplingConfig.constrain` may name.
            reserve: states of the table to begin with. It is doubled when it is full, and only
                then a decode step is compiled anew. Two suffice without stop strings and
                grammars; `</tool_call>` takes 12 more.
            room: states besides, for grammars of single requests, see `borrow`.
            place: puts the table on the devices, for instance replicated over a mesh.

        Raises:
            ValueError: an end-of-turn token is not in the vocabulary, or a grammar has a state in
                which no token is possible.
        """
        self._contents, self.eos_ids = contents, tuple(eos_ids)
        self._buffer = np.frombuffer(b"".join(contents), np.uint8)
        self._lengths = np.array([len(content) for content in contents])
        self._size, self._place, self._placed = reserve + room, place, None
        self._table = np.zeros((2, len(contents)), np.int16)
        self._table[STOPPED] = STOPPED
        self._table[FREE, self._stops("eos_ids", self.eos_ids)] = STOPPED
        self._searches: dict[tuple[tuple[str, ...], tuple[int, ...]], int] = {((), ()): FREE}
        self._grammars = {
            name: (grammar, self._add_grammar(name, grammar))
            for name, grammar in (grammars or {}).items()
        }
        self.room, self._room_begins, self._room_used = room, len(self._table), 0
        self._append(np.full((room, self.vocab), DEAD))
        self._lent: dict[TokenGrammar, int] = {}
        self._users: collections.Counter[TokenGrammar] = collections.Counter()

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        return len(self._contents)

    @property
    def constrains(self) -> bool:
        """Whether there is any grammar to obey, or room for one."""
        return bool(self._grammars) or self.room > 0

    @property
    def states(self) -> int:
        """Rows of the table: room for those that there are, doubled as needed."""
        size = self._size
        while size < len(self._table):
            size *= 2
        return size

    @property
    def table(self) -> Any:
        """int16 `[state, vocab]` on the devices: state after a token, `DEAD` if not allowed.

        It takes 2 bytes per state and token: 4.9 MB for the 151,936 logits of Qwen3-VL and 16
        states, 78 MB for 256, into which the 213 of the grammar of `crop_video` fit. That one
        is tabulated in one to two seconds, a stop string in a fraction of one.
        """
        if self._placed is None:
            self._size = self.states
            unused = self._size - len(self._table)
            self._placed = self._place(np.pad(self._table, [(0, unused), (0, 0)]))
        return self._placed

    def start(self, sampling: SamplingConfig, given: Sequence[int] = ()) -> tuple[int, int]:
        """States in which a request starts: of its search for an end, and of its grammar.

        Args:
            sampling: what the request asks for.
            given: tokens that the stream is given before it generates. What follows the last
                assistant header in them, all of them without one, is the head of the response:
                the grammar reads it (a forced `<think>` is there already); stop strings do not.

        Raises:
            ValueError: unknown grammar, a head that breaks it, or a stop id that is no token.
        """
        stops = sampling.stop, sampling.stop_ids
        if stops not in self._searches:
            self._searches[stops] = self._add_search(*stops)
        return self._searches[stops], self._grammar_state(sampling.constrain, given)

    def _grammar_state(self, name: str, given: Sequence[int]) -> int:
        if not name:
            return FREE
        if name not in self._grammars:
            raise ValueError(f"constrain={name!r}: known are {sorted(self._grammars)}, '' is none")
        grammar, first = self._grammars[name]
        text = b"".join(self._contents[token] for token in given)
        state = grammar.read(text.rpartition(RESPONSE_HEAD)[2])
        if state == DEAD:
            raise ValueError(f"constrain={name!r}: the response cannot begin with {text[-80:]!r}")
        return first + state

    def _add_search(self, strings: tuple[str, ...], ids: tuple[int, ...]) -> int:
        """State that begins the search for the strings and ids."""
        if strings and not self._buffer.size:
            raise ValueError(f"stop={strings}: finding texts needs the bytes of the tokens")
        search = (
            finder(strings)
            if strings
            else ByteAutomaton(np.zeros((1, 256), int), np.array([False]))
        )
        lifted = self._lift(search.moves)
        first = len(self._table)
        moved = np.where(search.ends[lifted], STOPPED, lifted + first)
        moved[:, self._stops("stop_ids", (*self.eos_ids, *ids))] = STOPPED
        self._append(moved)
        return first

    def lift_grammar(self, name: str, grammar: ByteAutomaton) -> TokenGrammar:
        """The grammar on tokens. Any thread may do this, which takes a second for a large one.

        Raises:
            ValueError: it has a state in which no token is possible.
        """
        lifted = self._lift(grammar.moves)
        # What stands for no bytes would be a way to write nothing for ever.
        lifted[:, self._lengths == 0] = DEAD
        lifted[:, list(self.eos_ids)] = DEAD
        if not ((lifted != DEAD).any(axis=1) | grammar.ends).all():
            raise ValueError(f"grammar {name!r} asks for bytes that no token of the vocabulary has")
        return TokenGrammar(lifted, grammar.ends)

    def borrow(self, grammar: TokenGrammar) -> int:
        """The state that begins a grammar of a single request, until `give_back`. The table keeps
        its size, so that nothing is compiled.

        Raises:
            NoRoom: others are in use; ask again when they are not.
            ValueError: it has more states than there is room.
        """
        if len(grammar.moves) > self.room:
            raise ValueError(f"a grammar of {len(grammar.moves)} states: room={self.room}")
        if grammar not in self._lent:
            self._lent[grammar] = self._take_room(len(grammar.moves))
            first = self._lent[grammar]
            self._table[first : first + len(grammar.moves)] = self._placed_at(first, grammar)
            self._placed = None
        self._users[grammar] += 1
        return self._lent[grammar]

    def give_back(self, grammar: TokenGrammar) -> None:
        """A request that borrowed the grammar has ended. It stays for the next one as long as
        there is room."""
        self._users -= collections.Counter([grammar])

    def _take_room(self, states: int) -> int:
        if self._room_used + states > self.room:
            if self._users:
                raise NoRoom
            self._lent.clear()
            self._room_used = 0
        self._room_used += states
        return self._room_begins + self._room_used - states

    def _add_grammar(self, name: str, grammar: ByteAutomaton) -> int:
        """State that begins the grammar."""
        first = len(self._table)
        self._append(self._placed_at(first, self.lift_grammar(name, grammar)))
        return first

    def _placed_at(self, first: int, grammar: TokenGrammar) -> np.ndarray:
        """Rows of the table for a grammar whose first state has this number."""
        moved = np.where(grammar.moves == DEAD, DEAD, grammar.moves + first)
        moved[:, list(self.eos_ids)] = np.where(grammar.ends, STOPPED, DEAD)[:, None]
        return moved

    def _append(self, moves: np.ndarray) -> None:
        if len(self._table) + len(moves) > np.iinfo(np.int16).max:
            raise ValueError(
                f"{len(self._table) + len(moves)} states of stop strings and grammars: "
                "use fewer or shorter ones"
            )
        self._table = np.concatenate([self._table, moves.astype(np.int16)])
        self._placed = None

    def _stops(self, field: str, ids: Sequence[int]) -> list[int]:
        if any(not 0 <= index < len(self._contents) for index in ids):
            raise ValueError(f"{field}={tuple(ids)}: the vocabulary has {len(self._contents)} ids")
        return list(ids)

    def _lift(self, moves: np.ndarray) -> np.ndarray:
        """int `[state, vocab]`: let every token act on every state.

        One state at a time, all tokens take their nth step at once, and those that died none.
        """
        moves = np.concatenate([moves, np.full((1, 256), DEAD)]).astype(np.int16)
        starts = np.cumsum(self._lengths) - self._lengths
        lifted = np.empty((len(moves) - 1, len(self._lengths)), np.int16)
        for state, reached in enumerate(lifted):
            reached[:] = state
            tokens, step = np.flatnonzero(self._lengths), 0
            while len(tokens):
                reached[tokens] = moves[reached[tokens], self._buffer[starts[tokens] + step]]
                step += 1
                going = (self._lengths[tokens] > step) & (reached[tokens] != DEAD)
                tokens = tokens[going]
        return lifted


def advance(
    table: Int[ArrayLike, "state vocab"], states: Int[Array, "b 2"], tokens: Int[Array, " b"]
) -> Int[Array, "b 2"]:
    """States of each row after one more token, which its grammar allows."""
    return table[states, tokens[:, None]].astype(jnp.int32)


def allowed_tokens(
    table: Int[ArrayLike, "state vocab"], states: Int[Array, "b 2"]
) -> Bool[Array, "b vocab"]:
    """Tokens that each row's grammar allows next; all of them for free text."""
    return table[states[:, 1]] != DEAD


def has_stopped(states: Int[Array, "b 2"]) -> Bool[Array, " b"]:
    """Whether each row has met an end-of-turn token, a stop id or a stop string."""
    return states[:, 0] == STOPPED
