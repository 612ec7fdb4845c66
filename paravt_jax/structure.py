"""Where the structural tags stand in a stream of tokens, exactly, for any byte-level BPE.

A tag is a fact about bytes: a merge may glue its end to a line break or its head to a space, and
sampling may spell it in pieces that the tokenizer would never choose. So a small automaton reads
bytes, and a token acts on it as a function from state to state, tabulated once on the host.

On the device no state has to be carried along the row. A tag has at most 12 bytes and a token at
least one, so the state before a token depends on the few tokens before it alone, and a fixed
number of vectorised look-ups gives every state of every row at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from paravt_jax.protocol import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    STRUCTURAL_TAGS,
    THINK_CLOSE,
    call_syntax,
)
from paravt_jax.records import ArrayLike, pytree


def anchor_tags(syntax: str = "tool_call") -> tuple[str, ...]:
    """Tags at which the format anchor acts: the ones that collapse under temperature sampling.

    Args:
        syntax: how calls are written, see `paravt_jax.protocol.SYNTAXES`.
    """
    return (THINK_CLOSE, call_syntax(syntax).close, ANSWER_OPEN, ANSWER_CLOSE)


ANCHOR_TAGS = anchor_tags()
"""Those of the syntax `tool_call`."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kinds", "exits", "completes", "continues", "holds", "counts"),
    meta_fields=("tags",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class TagTable:
    """How each token moves the automaton. Axes: `state` (how much of a tag has been read), `kind`
    (tokens that move it alike share one), `tag`."""

    kinds: Int[ArrayLike, " vocab"]
    """Kind of each token id."""
    exits: Int[ArrayLike, "kind state"]
    """State after a token, by the state before it; 0 where no tag is begun."""
    completes: Int[ArrayLike, "kind state"]
    """Tag, begun in an earlier token, that this token completes; -1 if none."""
    continues: Bool[ArrayLike, "kind state"]
    """Whether the tag begun in an earlier token is still incomplete after this one."""
    holds: Int[ArrayLike, " kind"]
    """First tag that lies within the token; -1 if none."""
    counts: Int[ArrayLike, "kind tag"]
    """How often each tag lies within the token."""
    tags: tuple[str, ...]
    """The tags, in the order of their ids."""


@pytree
@dataclasses.dataclass(frozen=True)
class StructuralTokens:
    """The structural tags of a batch of token streams."""

    ids: Int[Array, "b t"]
    """Index in `TagTable.tags` of the first tag that a token has bytes of; -1 if none."""
    counts: Int[Array, "b tag"]
    """How often each tag occurs in each row."""

    @property
    def mask(self) -> Bool[Array, "b t"]:
        """Where a token has bytes of a tag."""
        return self.ids >= 0


def token_bytes(
    vocab: Mapping[str, int], added: Mapping[int, str], size: int | None = None
) -> list[bytes]:
    """Bytes of every token id of a byte-level BPE.

    Args:
        vocab: token in the byte-level alphabet (of GPT-2) -> id, as `get_vocab()` returns it.
        added: id -> content of special and added tokens, which stand for themselves.
        size: rows of the model's embedding; ids without a token stand for no bytes.

    Raises:
        ValueError: a token is not written in the byte-level alphabet, or `size` is too small.
    """
    needed = max((*vocab.values(), *added), default=-1) + 1
    size = needed if size is None else size
    if size < needed:
        raise ValueError(f"size={size} is less than the {needed} ids of the tokenizer")
    contents = [b""] * size
    for token, index in vocab.items():
        if index not in added:
            contents[index] = _from_alphabet(token)
    for index, content in added.items():
        contents[index] = content.encode()
    return contents


def tag_table(contents: Sequence[bytes], tags: Sequence[str] = STRUCTURAL_TAGS) -> TagTable:
    """Tabulate how each token moves the automaton that looks for `tags`.

    Args:
        contents: bytes of each token id, see `token_bytes`. An id without bytes breaks a tag.
        tags: what to look for: all structural tags, or `ANCHOR_TAGS`.

    Raises:
        ValueError: a tag is not of the form `<...>` with one `<` and one `>`. (That form keeps
            occurrences from overlapping, on which the table relies.)
    """
    for tag in tags:
        if not (
            tag.isascii() and tag[:1] + tag[-1:] == "<>" and tag.count("<") == 1 == tag.count(">")
        ):
            raise ValueError(f"tag {tag!r} must be of the form <...> without further brackets")
    rows = _read_tokens(contents, *_automaton(tags), [len(tag) for tag in tags])
    _, first, kinds = np.unique(
        np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1),
        axis=0,
        return_index=True,
        return_inverse=True,
    )
    exits, completes, continues, holds, counts = (row[first] for row in rows)
    return TagTable(
        kinds=kinds.reshape(-1).astype(np.int32),
        exits=exits.astype(np.int32),
        completes=completes.astype(np.int32),
        continues=continues.astype(bool),
        holds=holds.astype(np.int32),
        counts=counts.astype(np.int32),
        tags=tuple(tags),
    )


@jax.jit
def structural_tokens(tokens: Int[ArrayLike, "b t"], table: TagTable) -> StructuralTokens:
    """Find every tag in every row, tags in pieces and several tags in one token included.

    Args:
        tokens: token ids. Padding is read like any other token; mask it afterwards.
        table: see `tag_table`.
    """
    chex.assert_rank(tokens, 2)
    kinds = jnp.asarray(table.kinds)[tokens]
    exits, completes, continues = map(jnp.asarray, (table.exits, table.completes, table.continues))
    longest = max(len(tag) for tag in table.tags)

    def forward(_, state):
        return exits[kinds, _from_left(state, 0)]

    before = _from_left(jax.lax.fori_loop(0, longest, forward, jnp.zeros_like(kinds)), 0)
    completed, unfinished = completes[kinds, before], continues[kinds, before]
    begun = exits[kinds, before] > 0

    def backward(_, pending):
        carried = jnp.where(_from_right(unfinished, False), _from_right(pending, -1), -1)
        next_completed = _from_right(completed, -1)
        return jnp.where(begun, jnp.where(next_completed >= 0, next_completed, carried), -1)

    pending = jax.lax.fori_loop(0, longest, backward, jnp.full_like(kinds, -1))
    held = jnp.asarray(table.holds)[kinds]
    inside = jnp.asarray(table.counts)[kinds].sum(axis=1)
    across = (completed[..., None] == jnp.arange(len(table.tags))).sum(axis=1)
    return StructuralTokens(
        ids=jnp.where(completed >= 0, completed, jnp.where(held >= 0, held, pending)),
        counts=inside + across,
    )


def structural_mask(tokens: Int[ArrayLike, "b t"], table: TagTable) -> Bool[Array, "b t"]:
    """Where a token has bytes of one of the table's tags."""
    return structural_tokens(tokens, table).mask


def _automaton(tags: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`(moves [state, 256], hits [state, 256], depths [state])` of the tags' common trie.

    State 0 has read nothing of a tag. A byte that fits no tag leads back to it, or, being `<`,
    to the head of a tag. `hits` is the tag that a byte completes, or -1.
    """
    prefixes = sorted({tag[:end] for tag in tags for end in range(len(tag))}, key=len)
    state_of = {prefix: state for state, prefix in enumerate(prefixes)}
    moves = np.zeros((len(prefixes), 256), np.int16)
    moves[:, ord("<")] = state_of.get("<", 0)
    hits = np.full((len(prefixes), 256), -1, np.int16)
    for prefix, state in list(state_of.items())[1:]:
        moves[state_of[prefix[:-1]], ord(prefix[-1])] = state
    for index, tag in enumerate(tags):
        hits[state_of[tag[:-1]], ord(tag[-1])] = index
    return moves, hits, np.array([len(prefix) for prefix in prefixes])


def _read_tokens(
    contents: Sequence[bytes],
    moves: np.ndarray,
    hits: np.ndarray,
    depths: np.ndarray,
    tag_lengths: Sequence[int],
) -> tuple[np.ndarray, ...]:
    """Let every token act on every state: exits, completes, continues, holds, counts.

    All tokens that have an nth byte take their nth step at once.
    """
    lengths = np.array([len(content) for content in contents])
    states = np.tile(np.arange(len(moves), dtype=np.int16), (len(contents), 1))
    completes = np.full_like(states, -1)
    holds = np.full(len(contents), -1, np.int16)
    counts = np.zeros((len(contents), len(tag_lengths)), np.int16)
    for step in range(lengths.max(initial=0)):
        rows = np.flatnonzero(lengths > step)
        byte = np.array([contents[int(row)][step] for row in rows])[:, None]
        found = hits[states[rows], byte]
        states[rows] = moves[states[rows], byte]
        begun_before = np.array(tag_lengths)[found] > step + 1
        completes[rows] = np.where((found >= 0) & begun_before, found, completes[rows])
        within = np.where(begun_before[:, 0], -1, found[:, 0])
        holds[rows] = np.where(holds[rows] < 0, within, holds[rows])
        counts[rows] += within[:, None] == np.arange(len(tag_lengths))
    states[lengths == 0] = 0
    return states, completes, depths[states] > lengths[:, None], holds, counts


def _from_left(values: Shaped[Array, "b t"], edge: int | bool) -> Shaped[Array, "b t"]:
    """Each token's left neighbour."""
    return jnp.roll(values, 1, axis=1).at[:, 0].set(edge)


def _from_right(values: Shaped[Array, "b t"], edge: int | bool) -> Shaped[Array, "b t"]:
    """Each token's right neighbour."""
    return jnp.roll(values, -1, axis=1).at[:, -1].set(edge)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the rest for 256 + n."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


def _from_alphabet(token: str) -> bytes:
    try:
        return bytes(_byte_of_letter()[letter] for letter in token)
    except KeyError as letter:
        raise ValueError(
            f"token {token!r} holds {letter}, which is not in the byte-level alphabet; "
            "only byte-level BPE vocabularies are supported"
        ) from None
