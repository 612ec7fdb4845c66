"""Where the structural tags stand in a stream of tokens, exactly, for any byte-level BPE.

A tag is a fact about bytes: a merge may glue its end to a line break or its head to a space, and
sampling may spell it in pieces that the tokenizer would never choose. So a small automaton reads
bytes, and a token acts on it as a function from state to state, tabulated once on the host.

On the device no state has to be carried along the row. A tag has at most 12 bytes and a token at
least one, so the state before a token depends on the few tokens before it alone, and a fixed
number of vectorised look-ups gives every state of every row at once. Which tags belong together is
then a question of neighbours, answered by running maxima.

Blocks do not nest. A closing tag belongs to the tag before it if that is its opening tag; a tag
whose neighbour does not fit is opened or closed in vain. Between `<think>` and `</think>` other
tags are only spoken of, as in `parse_tool_calls`: they belong to nothing and disturb nothing. What
nobody of the policy's side said (prompts, tool responses) holds no tags and ends every block.

What a token holds beside tags is content, unless it is white space: in Qwen's vocabulary
`<answer>B</answer>` is `<` `answer` `>B` `</` `answer` `>`; there `>B` is the answer, while `>`
with a line break is a tag. Credit for structure must not touch content (`tag_mask`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from paravt_jax.protocol import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    STRUCTURAL_TAGS,
    THINK_CLOSE,
    THINK_OPEN,
    call_syntax,
)
from paravt_jax.pytrees import ArrayLike, pytree


def anchor_tags(syntax: str = "tool_call") -> tuple[str, ...]:
    """Tags at which the format anchor acts: all but `<think>`, which begins a turn.

    Calls and answers are treated alike, opening tags included: a turn chooses between them by its
    opening tag, and where `</think>` is missing that is the tag that stands in its place.

    Args:
        syntax: how calls are written, see `paravt_jax.protocol.SYNTAXES`.
    """
    calls = call_syntax(syntax)
    return (THINK_CLOSE, calls.open, calls.close, ANSWER_OPEN, ANSWER_CLOSE)


ANCHOR_TAGS = anchor_tags()
"""Those of the syntax `tool_call`."""
_WHITE_SPACE = np.frombuffer(b" \t\n\r\v\f", np.uint8)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kinds", "blank", "exits", "completes", "continues", "within", "filled"),
    meta_fields=("tags",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class TagTable:
    """How each token moves the automaton. Axes: `state` (how much of a tag has been read), `kind`
    (tokens that move it alike share one), `m` (tags within one token)."""

    kinds: Int[ArrayLike, " vocab"]
    """Kind of each token id."""
    blank: Int[ArrayLike, ""]
    """Kind of a token without bytes, which breaks a tag."""
    exits: Int[ArrayLike, "kind state"]
    """State after a token, by the state before it; 0 where no tag is begun."""
    completes: Int[ArrayLike, "kind state"]
    """Tag, begun in an earlier token, that this token completes; -1 if none."""
    continues: Bool[ArrayLike, "kind state"]
    """Whether the tag begun in an earlier token is still incomplete after this one."""
    within: Int[ArrayLike, "kind m"]
    """Tags that lie within the token, in order; -1 fills up."""
    filled: Bool[ArrayLike, "kind state gap"]
    """Whether content stands before each of the tags within, and after the last (all further gaps
    are that one). The tag that the token begins counts as a tag."""
    tags: tuple[str, ...]
    """The tags, in the order of their ids."""


@pytree
@dataclasses.dataclass(frozen=True)
class StructuralTokens:
    """The structural tags of a batch of token streams.

    One token may have bytes of several tags: the end of one, whole ones, the head of the next.
    Axis `k` lists them in stream order, -1 filling up.
    """

    tags: Int[Array, "b t k"]
    """Indices in `TagTable.tags` of the tags that a token has bytes of."""
    partners: Int[Array, "b t k"]
    """For an opening tag the first token of its closing tag, for a closing tag the last token of
    its opening tag: what they enclose lies strictly between, and in gaps of these two. -1 where a
    tag belongs to no pair."""
    astray: Int[Array, "b t k"]
    """For a tag that cannot stand where it stands, the opening tag whose closing tag is missing
    there: that of the block still open, or its own if none is open. -1 for all others.

    Astray are a closing tag that closes nothing, an opening tag within an open block, and the first
    tag in a thought that never ends."""
    filled: Bool[Array, "b t gap"]
    """Whether a token has content, bytes of no tag that are no white space, between its k-th tag
    and the next."""
    counts: Int[Array, "b tag"]
    """How often each tag occurs in each row."""
    paired: Int[Array, "b tag"]
    """How many of them belong to a pair."""


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
    forms = [_form(content, [tag.encode() for tag in tags]) for content in [*contents, b""]]
    number = {form: n for n, form in enumerate(dict.fromkeys(forms))}
    rows = _read_tokens(list(number), tags)
    _, first, kinds = np.unique(
        np.concatenate([row.reshape(len(row), -1) for row in rows], axis=1),
        axis=0,
        return_index=True,
        return_inverse=True,
    )
    kinds = kinds.reshape(-1).astype(np.int32)[[number[form] for form in forms]]
    exits, completes, continues, within, filled = (row[first] for row in rows)
    return TagTable(
        kinds=kinds[:-1],
        blank=np.asarray(kinds[-1]),
        exits=exits.astype(np.int32),
        completes=completes.astype(np.int32),
        continues=continues.astype(bool),
        within=within.astype(np.int32),
        filled=filled,
        tags=tuple(tags),
    )


@jax.jit
def structural_tokens(
    tokens: Int[ArrayLike, "b t"],
    table: TagTable,
    spoken: Bool[ArrayLike, "b t"] | None = None,
) -> StructuralTokens:
    """Find every tag in every row, tags in pieces and several tags in one token included, and
    which of them belong together.

    Args:
        tokens: token ids.
        table: see `tag_table`.
        spoken: where the assistant speaks: what the policy generated, and prefixes that were forced
            upon its turns. Elsewhere (prompts, tool responses, padding) tags do not count, and no
            tag or block runs across. None: everywhere.
    """
    chex.assert_rank(tokens, 2)
    spoken = jnp.ones(tokens.shape, bool) if spoken is None else jnp.asarray(spoken)
    kinds = jnp.where(spoken, jnp.asarray(table.kinds)[tokens], table.blank)
    before = _states_before(kinds, table)
    completed, first = _completed(kinds, before, table)
    within = jnp.asarray(table.within)[kinds]
    tags = jnp.concatenate([completed[..., None], within], axis=2)
    slots = tags.shape[2]
    partners, astray = _blocks(tags, spoken, table.tags)
    place = jnp.arange(tokens.shape[1])
    begins = jnp.concatenate([first[..., None], jnp.broadcast_to(place[:, None], within.shape)], 2)
    opened = jnp.take_along_axis(begins.reshape(len(begins), -1), jnp.maximum(partners, 0), axis=1)
    # The partner of an opening tag comes later and matters by its first token, else by its last.
    own = jnp.arange(partners.shape[1])
    partners = jnp.where(partners > own[None], opened, partners // slots).reshape(tags.shape)
    present = tags[..., None] == jnp.arange(len(table.tags))[None, None, None]
    later = _later_tag(completed, first)
    in_vain = (jnp.asarray(table.exits)[kinds, before] > 0) & (later < 0)
    last_gap = jnp.arange(slots)[None, None] >= (within >= 0).sum(axis=2, keepdims=True)
    return StructuralTokens(
        tags=_with_next(tags, later),
        partners=_with_next(partners, later),
        astray=_with_next(astray.reshape(tags.shape), later),
        filled=jnp.asarray(table.filled)[kinds, before] | (in_vain[..., None] & last_gap),
        counts=present.sum(axis=(1, 2)),
        paired=(present & (partners >= 0)[..., None]).sum(axis=(1, 2)),
    )


def tag_mask(
    found: StructuralTokens,
    table: TagTable,
    tags: Sequence[str] = STRUCTURAL_TAGS,
    only_paired: bool = False,
) -> Bool[Array, "b t"]:
    """Where a token is part of one of these tags and holds no content; with `only_paired`, of one
    that belongs to a pair."""
    wanted = jnp.array([*(tag in tags for tag in table.tags), False])[found.tags]
    wanted = wanted & (found.partners >= 0) if only_paired else wanted
    return wanted.any(axis=2) & ~found.filled.any(axis=2)


def tag_credit(
    found: StructuralTokens,
    table: TagTable,
    tags: Sequence[str],
    thinking: Float[ArrayLike, "b t"],
    acting: Float[ArrayLike, "b t"],
    only_paired: bool = False,
) -> Float[Array, "b t"]:
    """What the parts of a turn's anchor are to its tags: praise to those in place, blame to those
    astray, and nothing to a tag for what another one lacks.

    A part above 0 goes to the tags that belong to a pair: `thinking` to `</think>`, `acting` to
    those of calls and answers. One below 0 goes to the tags that are astray, by the closing tag
    that is missing where they stand. A token of several tags gets the sum, one with content 0.

    Args:
        found: the tags of the streams.
        table: what found them.
        tags: the tags to credit.
        thinking, acting: normalised parts of the anchor of the turn that a token belongs to.
        only_paired: credit tags that belong to a pair only.
    """
    thinking, acting = jnp.asarray(thinking)[..., None], jnp.asarray(acting)[..., None]
    thought = jnp.array([*(tag in (THINK_OPEN, THINK_CLOSE) for tag in table.tags), False])
    praise = jnp.maximum(jnp.where(thought[found.tags], thinking, acting), 0.0)
    blame = jnp.minimum(jnp.where(thought[found.astray], thinking, acting), 0.0)
    credit = jnp.where(found.partners >= 0, praise, 0.0)
    if not only_paired:
        credit += jnp.where(found.astray >= 0, blame, 0.0)
    wanted = jnp.array([*(tag in tags for tag in table.tags), False])[found.tags]
    return jnp.where(
        tag_mask(found, table, tags), (wanted.astype(credit.dtype) * credit).sum(axis=2), 0.0
    )


def _states_before(kinds: Int[Array, "b t"], table: TagTable) -> Int[Array, "b t"]:
    """State of the automaton before each token."""
    exits = jnp.asarray(table.exits)

    def forward(_, state):
        return exits[kinds, _from_left(state, 0)]

    longest = max(len(tag) for tag in table.tags)
    return _from_left(jax.lax.fori_loop(0, longest, forward, jnp.zeros_like(kinds)), 0)


def _completed(
    kinds: Int[Array, "b t"], before: Int[Array, "b t"], table: TagTable
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """Tag that each token completes after others began it, or -1; and the first of those others."""
    exits, completes, continues = map(jnp.asarray, (table.exits, table.completes, table.continues))
    begins = (exits[kinds, before] > 0) & ~continues[kinds, before]
    return completes[kinds, before], _last_before(begins)


def _blocks(
    tags: Int[Array, "b t m"], spoken: Bool[Array, "b t"], names: Sequence[str]
) -> tuple[Int[Array, "b e"], Int[Array, "b e"]]:
    """Where among the `e = t * m` places the partner of each tag stands, and `astray` of each
    place."""
    opening = jnp.array(
        [names.index(n.replace("/", "")) if _closes(n, names) else -1 for n in names]
    )
    opens_block = jnp.array([*(f"</{name[1:]}" in names for name in names), False])
    thought = jnp.array([*(name in (THINK_OPEN, THINK_CLOSE) for name in names), False])
    think_open = names.index(THINK_OPEN) if THINK_OPEN in names else len(names)
    flat = tags.reshape(len(tags), -1)
    silent = jnp.repeat(~spoken, tags.shape[2], axis=1)
    bounds = thought[flat] | silent
    thinking = _at(flat, _last_before(bounds)) == think_open
    live = bounds | ((flat >= 0) & ~thinking)
    before = _last_before(live)
    left = _at(flat, before)
    closes = live & (flat >= 0) & (left >= 0) & (opening[flat] == left)
    after = _next_after(live)
    opens = live & (flat >= 0) & _at(closes, after, False)
    partners = jnp.where(closes, before, jnp.where(opens, after, -1))
    lost = live & (flat >= 0) & ~closes
    astray = jnp.where(opens_block[left], left, opening[flat])
    endless = thinking & ~_at(thought[flat], _next_after(bounds), False)
    first = _last_before((flat >= 0) | silent) == _last_before(bounds)
    in_its_place = (flat >= 0) & ~live & endless & first
    return partners, jnp.where(lost, astray, jnp.where(in_its_place, think_open, -1))


def _closes(name: str, names: Sequence[str]) -> bool:
    return name.startswith("</") and name.replace("/", "") in names


def _later_tag(completed: Int[Array, "b t"], first: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """The token that completes a tag that each token begins or continues; -1 if none does."""
    later = _next_after(completed >= 0)
    place = jnp.arange(completed.shape[1])
    return jnp.where((later >= 0) & (_at(first, later) <= place[None]), later, -1)


def _with_next(values: Int[Array, "b t m"], later: Int[Array, "b t"]) -> Int[Array, "b t k"]:
    """Values of the tags that end in a token, and of the one that a later token completes."""
    return jnp.concatenate([values, _at(values[..., 0], later)[..., None]], axis=2)


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


def _form(content: bytes, tags: Sequence[bytes]) -> bytes:
    """A token that moves the automaton alike: most of a vocabulary has nothing of a tag."""
    if b"<" in content or b">" in content or any(content in tag for tag in tags):
        return content
    return b"\0" if content.strip() else b" "


def _read_tokens(contents: Sequence[bytes], tags: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Let every token act on every state: exits, completes, continues, within, filled.

    All tokens that have an nth byte take their nth step at once.
    """
    moves, hits, depths = _automaton(tags)
    tag_lengths = np.array([len(tag) for tag in tags])
    lengths = np.array([len(content) for content in contents])
    states = np.tile(np.arange(len(moves), dtype=np.int16), (len(contents), 1))
    completes = np.full_like(states, -1)
    most = max(sum(content.count(tag.encode()) for tag in tags) for content in contents)
    within = np.full((len(contents), most), -1, np.int16)
    filled = np.zeros((*states.shape, most + 1), bool)
    held = np.zeros(len(contents), np.int64)
    for step in range(lengths.max(initial=0)):
        rows = np.flatnonzero(lengths > step)
        byte = np.array([contents[int(row)][step] for row in rows])[:, None]
        before, found = states[rows], hits[states[rows], byte]
        states[rows] = moves[before, byte]
        begun_before = tag_lengths[found] > step + 1
        completes[rows] = np.where((found >= 0) & begun_before, found, completes[rows])
        of_tag = (found >= 0) | (depths[states[rows]] == depths[before] + 1)
        given_up = np.minimum(depths[before], step) > 0
        plain = (states[rows] == 0) & ~np.isin(byte, _WHITE_SPACE)
        filled[rows, :, held[rows]] |= ~of_tag & (given_up | plain)
        whole = (found[:, 0] >= 0) & ~begun_before[:, 0]
        within[rows[whole], held[rows[whole]]] = found[whole, 0]
        held[rows[whole]] += 1
    states[lengths == 0] = 0
    last_gap = np.take_along_axis(filled, held[:, None, None], axis=2)
    filled |= last_gap & (np.arange(most + 1) >= held[:, None, None])
    return states, completes, depths[states] > lengths[:, None], within, filled


def _from_left(values: Shaped[Array, "b t"], edge: int | bool) -> Shaped[Array, "b t"]:
    """Each token's left neighbour."""
    return jnp.roll(values, 1, axis=1).at[:, 0].set(edge)


def _last_before(chosen: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Place of the last chosen one strictly before each place; -1 if none."""
    place = jnp.where(chosen, jnp.arange(chosen.shape[1]), -1)
    return _from_left(jax.lax.cummax(place, axis=1), -1)


def _next_after(chosen: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Place of the first chosen one strictly after each place; -1 if none."""
    last = chosen.shape[1] - 1
    mirrored = _last_before(chosen[:, ::-1])[:, ::-1]
    return jnp.where(mirrored >= 0, last - mirrored, -1)


def _at(
    values: Shaped[Array, "b t"], places: Int[Array, "b t"], missing: int | bool = -1
) -> Shaped[Array, "b t"]:
    """Values at places of their row; `missing` where the place is -1."""
    found = jnp.take_along_axis(values, jnp.maximum(places, 0), axis=1)
    return jnp.where(places >= 0, found, missing)


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
