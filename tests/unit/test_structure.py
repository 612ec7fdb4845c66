"""Structural positions against a plain search in the bytes, on an adversarial byte-level BPE."""

import dataclasses
import random
import re

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from paravt_jax.protocol import STRUCTURAL_TAGS
from paravt_jax.structure import (
    ANCHOR_TAGS,
    structural_tokens,
    tag_credit,
    tag_mask,
    tag_table,
    token_bytes,
)
from pipelines.needle.tokenizer import write_processor_folder
from pipelines.needle.world import COLOURS, SHAPES, NeedleWorld
from tests.support.vocabulary import contents_of

pytestmark = pytest.mark.slow

COUNT = 10_000
"""Sequences that are read by hand."""
ADDED = ["<|im_end|>", "<tool_call>", "</tool_call>"]
SNIPPETS = [
    *STRUCTURAL_TAGS,
    *("<", ">", "/", " <", ">\n", "</", "<<", "think", "answer>", "tool_", "_call", "<answer"),
    *(
        "</think",
        "<thinK>",
        "< think>",
        "</think>\n\n<answer>",
        "<think></think>",
        "é",
        "打开",
        "\n",
    ),
    *(" a", "B", "36 to 40", '{"name"', "<tool_code>", "<|im_end|>", "<<think>>", "</</think>"),
    *("<tool_call>{}</tool_call>", "<tool_call>[1]</tool_call>", "<answer>36</answer>"),
]


@pytest.fixture(scope="module")
def tokenizer():
    """A BPE trained without any pre-splitting, so that its merges run across the tags' edges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=ADDED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = ["<think>\na</think>\n<answer>B</answer>", "<think> b</think>\n\n<answer>", " <think>"]
    tokenizer.train_from_iterator(corpus * 20, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def contents(tokenizer):
    return contents_of(tokenizer)


@pytest.fixture(scope="module")
def table(contents):
    return tag_table(contents)


@dataclasses.dataclass
class Found:
    """A tag in a row: its first and last token and byte, and the tags that it has to do with."""

    tag: str
    first: int
    last: int
    start: int
    stop: int
    partner: "Found | None" = None
    astray: str = ""


def read_by_hand(ids, spoken, contents, tags):
    """What stands in one row, by joining bytes and reading tags one after the other.

    An id without bytes, or one that nobody spoke, is written as a zero byte, which no tag holds.

    Returns the tags, and `(token, byte)` of all that is spoken.
    """
    pieces = [(contents[i] if own else b"") or b"\0" for i, own in zip(ids, spoken, strict=True)]
    text, token_of = b"".join(pieces), [n for n, piece in enumerate(pieces) for _ in piece]
    pattern = b"|".join(re.escape(tag.encode()) for tag in tags)
    found = []
    for match in re.finditer(pattern, text):
        tokens = token_of[match.start()], token_of[match.end() - 1]
        found.append(Found(match.group().decode(), *tokens, *match.span()))
    relate(found, spoken)
    heard = [spoken[token] and bool(contents[ids[token]]) for token in token_of]
    return found, [(token_of[at], at, text[at : at + 1]) for at, own in enumerate(heard) if own]


def relate(found, spoken):
    """Fill in which tags belong together and which are astray."""
    opened, after_opened, seen = None, 0, 0
    for number, own in enumerate(found):
        if not all(spoken[seen : own.first + 1]):
            opened = None
        seen = own.last
        block, closes = opened.tag if opened else "", own.tag.startswith("</")
        if block == "<think>" and own.tag.strip("</>") != "think":
            rest = [f for f in found[number:] if all(spoken[own.first : f.first + 1])]
            endless = not any(f.tag.strip("</>") == "think" for f in rest)
            own.astray = "<think>" if endless and after_opened == number else ""
            continue
        if closes and block == own.tag.replace("/", ""):
            own.partner, opened.partner = opened, own
        elif block or closes:
            own.astray = block or own.tag.replace("/", "")
        opened, after_opened = (None if closes else own), number + 1


def as_columns(found, heard, shape, tags):
    """`tags`, `partners`, `astray`, `filled`, `counts` and `paired` of one row, as
    `structural_tokens` gives them."""
    length, width = shape
    names, partners, astray = np.full((3, length, width), -1)
    counts, paired = np.zeros((2, len(tags)), int)
    at = [[] for _ in range(length)]
    for own in found:
        where = -1
        if own.partner is not None:
            where = own.partner.first if own.partner.start > own.start else own.partner.last
        lacks = tags.index(own.astray) if own.astray else -1
        for token in range(own.first, own.last + 1):
            at[token].append((tags.index(own.tag), where, lacks))
        counts[tags.index(own.tag)] += 1
        paired[tags.index(own.tag)] += own.partner is not None
    for token, touched in enumerate(at):
        for place, values in enumerate(touched):
            names[token, place], partners[token, place], astray[token, place] = values
    return names, partners, astray, gaps(found, heard, length, width - 1), counts, paired


def gaps(found, heard, length, count):
    """Which gaps between the tags of a token have content; those after the last are one."""
    filled = np.zeros((length, count), bool)
    whole = [[f for f in found if f.first == f.last == token] for token in range(length)]
    inside = {at for own in found for at in range(own.start, own.stop)}
    for token, at, byte in heard:
        if at not in inside and byte.strip():
            gap = sum(own.stop <= at for own in whole[token])
            filled[token, gap : None if gap == len(whole[token]) else gap + 1] = True
    return filled


def in_order(result):
    """Tags, partners and astray of each token without the gaps between them, and `filled`."""
    order = np.argsort(np.asarray(result.tags) < 0, axis=2, kind="stable")
    columns = (result.tags, result.partners, result.astray)
    return *(np.take_along_axis(np.asarray(x), order, axis=2) for x in columns), result.filled


def agrees(batch, spoken, contents, table):
    """Compare every position of every row with the reading by hand."""
    result = structural_tokens(batch, table, spoken)
    shape = result.tags.shape[1:]
    rows = [
        as_columns(*read_by_hand(ids, own, contents, table.tags), shape, table.tags)
        for ids, own in zip(batch.tolist(), spoken.tolist(), strict=True)
    ]
    *places, counts, paired = (np.array(column) for column in zip(*rows, strict=True))
    for got, expected in zip(in_order(result), places, strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(result.counts, counts)
    np.testing.assert_array_equal(result.paired, paired)
    credited_as_by_hand(result, table)
    return result


def credited_as_by_hand(result, table):
    """Compare the credit of every token with that of its tags, one by one."""
    thinking, acting = np.random.default_rng(1).normal(size=(2, *result.tags.shape[:2]))
    got = tag_credit(result, table, ANCHOR_TAGS, thinking, acting)
    tags, partners, astray = map(np.asarray, (result.tags, result.partners, result.astray))
    want = np.zeros(got.shape)
    for row, token, slot in zip(*np.nonzero(tags >= 0), strict=True):
        place = row, token, slot
        part = {True: thinking[row, token], False: acting[row, token]}
        name, missing = (table.tags[own[place]] for own in (tags, astray))
        praise = max(part["think" in name], 0) if partners[place] >= 0 else 0
        blame = min(part["think" in missing], 0) if astray[place] >= 0 else 0
        want[row, token] += (praise + blame) * (name in ANCHOR_TAGS)
    want[np.asarray(result.filled).any(axis=2)] = 0
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def sequences(tokenizer, contents, count, length):
    """Streams of all kinds: encoded texts, cut and glued pieces, single bytes, random ids."""
    rng = random.Random(0)
    byte_ids = {content: i for i, content in enumerate(contents) if len(content) == 1}
    for n in range(count):
        text = "".join(rng.choices(SNIPPETS, k=length // 2))
        ids = tokenizer.encode(text).ids
        if n % 4 == 1:
            ids = [byte_ids[bytes([byte])] for byte in text.encode()]
        if n % 4 == 2:
            parts = [text[i : i + rng.randint(1, 4)] for i in range(0, len(text), 2)]
            ids = [i for part in parts for i in tokenizer.encode(part).ids]
        if n % 4 == 3:
            ids = [rng.choice([i, rng.randrange(len(contents))]) for i in ids]
        start = rng.randrange(max(len(ids) - length, 1))
        yield (ids[start : start + length] + [0] * length)[:length]


def partly_spoken(count, length):
    """Masks of all kinds: everything, prompts, tool responses in between, single tokens."""
    rng = np.random.default_rng(0)
    spoken = np.ones((count, length), bool)
    for row in spoken[1::2]:
        start, stop = np.sort(rng.integers(0, length, 2))
        row[start:stop] = False
    spoken[3::4] &= rng.random(spoken[3::4].shape) < 0.9
    return spoken


def test_every_position_agrees_with_a_search_in_the_bytes(tokenizer, contents, table):
    batch = np.array(list(sequences(tokenizer, contents, COUNT, length=40)), np.int32)
    result = agrees(batch, partly_spoken(*batch.shape), contents, table)
    counts, paired = np.asarray(result.counts).sum(axis=0), np.asarray(result.paired).sum(axis=0)
    assert paired.min() > COUNT / 40 and (counts - paired).min() > COUNT / 40
    tags, astray, filled = map(np.asarray, (result.tags, result.astray, result.filled))
    assert (tags >= 0).any(axis=2).mean() > 0.1
    assert (astray >= 0).any(axis=2).mean() > 0.01
    glued = filled.any(axis=2) & (tags >= 0).any(axis=2)
    assert glued.sum() > COUNT / 40 and (filled[..., :-1] & ~filled[..., 1:]).any()


@pytest.fixture(scope="module")
def needle_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needle")
    write_processor_folder(str(folder), NeedleWorld())
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_every_position_of_the_needle_tokenizer_agrees(needle_tokenizer):
    contents = contents_of(needle_tokenizer)
    batch = np.array(list(sequences(needle_tokenizer, contents, COUNT // 4, length=40)), np.int32)
    agrees(batch, partly_spoken(*batch.shape), contents, tag_table(contents))


def test_no_answer_of_the_needle_world_is_structure(needle_tokenizer):
    """Some of its one-word answers are one token with the end of the tag."""
    table, glued = tag_table(contents_of(needle_tokenizer)), []
    for answer in (*COLOURS, *SHAPES, *"ABCD", *"0123456789", "3 to 7"):
        text = f"<think>a</think>\n<answer>{answer}</answer>"
        tokens = np.array([needle_tokenizer.encode(text).ids])
        chosen = np.asarray(tag_mask(structural_tokens(tokens, table), table, ANCHOR_TAGS))[0]
        pieces = [needle_tokenizer.decode([i]).strip() for i in tokens[0][chosen].tolist()]
        assert all(any(piece in tag for tag in ANCHOR_TAGS) for piece in pieces), (answer, pieces)
        glued += [answer for piece in needle_tokenizer.encode(text).tokens if f">{answer}" == piece]
    assert len(glued) >= 5, "the tokenizer must glue answers to tags for this to test anything"


def read(tokenizer, table, text, silent=()):
    """The result of one row, and the text of each of its tokens; some texts nobody spoke."""
    parts = re.split("(" + "|".join(map(re.escape, silent)) + ")", text) if silent else [text]
    ids = [tokenizer.encode(part).ids for part in parts]
    spoken = np.concatenate([[p not in silent] * len(i) for p, i in zip(parts, ids, strict=True)])
    tokens = np.array([[i for part in ids for i in part]], np.int32)
    return structural_tokens(tokens, table, spoken.astype(bool)[None]), tokens[0]


@pytest.mark.parametrize(
    ("text", "paired", "unpaired"),
    [
        ("<think>a</think><answer>B</answer>", 4, 0),
        ("<think>a</think><tool_call>{}</tool_call>\n<tool_call>{}</tool_call>", 6, 0),
        ("<think>never closed<answer>B</answer>", 0, 3),
        ("a</think><answer>B</answer>", 2, 1),
        ("<answer>B", 0, 1),
        ("</answer>B<answer>", 0, 2),
        ("<think><think>twice</think>", 2, 1),
        ("<think>maybe <tool_call>?</think><answer>B</answer>", 4, 1),
        ("<answer><think>a</think>B</answer>", 2, 2),
        ("<tool_call>{<answer>}</tool_call></answer>", 0, 4),
        ("<tool_call>{<tool_call>{}</tool_call>", 2, 1),
    ],
)
def test_which_tags_belong_together(tokenizer, table, text, paired, unpaired):
    result, _ = read(tokenizer, table, text)
    assert int(result.paired.sum()) == paired
    assert int((result.counts - result.paired).sum()) == unpaired


RESPONSE = "<tool_response>so </think><answer>red</answer></tool_response>"


def test_tags_of_tool_responses_do_not_count_and_end_a_block(tokenizer, table):
    text = f"<think>never closed{RESPONSE}closed here?</think><answer>B</answer>"
    alone, _ = read(tokenizer, table, text, silent=[RESPONSE])
    assert np.asarray(alone.counts)[0].tolist() == [1, 1, 0, 0, 1, 1]
    assert np.asarray(alone.paired)[0].tolist() == [0, 0, 0, 0, 1, 1]
    naive, _ = read(tokenizer, table, text)
    assert np.asarray(naive.paired)[0].tolist() == [1, 1, 0, 0, 2, 2]


def test_partners_enclose_what_the_tags_enclose(tokenizer, table):
    result, tokens = read(tokenizer, table, "x<think>a b</think>\n<answer>36 to 40</answer>y")
    tags, partners = np.asarray(result.tags[0]), np.asarray(result.partners[0])
    last_of_opening = np.flatnonzero((tags == table.tags.index("<answer>")).any(axis=1))[-1]
    first_of_closing = partners[last_of_opening][tags[last_of_opening] >= 0][-1]
    inner = tokens[last_of_opening + 1 : first_of_closing].tolist()
    assert "6 to 4" in tokenizer.decode(inner) and "<" not in tokenizer.decode(inner)


def test_anchor_tags_alone_leave_out_the_others(tokenizer, contents, table):
    text = "<think>a</think>\n<tool_call>{}</tool_call><answer>B</answer>"
    result, tokens = read(tokenizer, table, text)
    anchors = tag_table(contents, ANCHOR_TAGS)
    alone = tag_mask(structural_tokens(tokens[None], anchors), anchors)
    np.testing.assert_array_equal(tag_mask(result, table, ANCHOR_TAGS), alone)
    assert alone.sum() < tag_mask(result, table).sum()


def test_only_paired_tags_on_request(tokenizer, table):
    result, tokens = read(tokenizer, table, "</think>a<answer>B</answer>")
    every = np.asarray(tag_mask(result, table, ANCHOR_TAGS))[0]
    paired = np.asarray(tag_mask(result, table, ANCHOR_TAGS, only_paired=True))[0]
    assert "</think>" in tokenizer.decode(tokens[every].tolist())
    assert "think" not in tokenizer.decode(tokens[paired].tolist())
    assert (every & ~paired).any() and paired.any() and not (paired & ~every).any()


def test_merges_do_cross_the_edges_of_tags(contents):
    crossing = [
        c for c in contents if any(t.encode() in c and t.encode() != c for t in ANCHOR_TAGS)
    ]
    assert crossing, "the tokenizer of this module must be adversarial"


def test_a_tag_does_not_run_over_rows_or_their_ends(contents, table):
    byte_ids = {content: i for i, content in enumerate(contents) if len(content) == 1}
    ids = np.array([[byte_ids[b"x"]] * 4 + [byte_ids[bytes([b])] for b in b"</thi"]] * 2)
    ids[1] = [byte_ids[bytes([b])] for b in b"nk>xxxxxx"]
    assert not np.asarray(tag_mask(structural_tokens(ids, table), table)).any()


def test_columns_before_and_after_change_nothing(tokenizer, contents, table):
    ids = np.array([tokenizer.encode("<think>a</think><answer>B</answer>").ids], np.int32)
    padded = np.pad(ids, [(0, 0), (5, 7)], constant_values=tokenizer.encode("a").ids[0])
    inner, alone = structural_tokens(padded, table), structural_tokens(ids, table)
    np.testing.assert_array_equal(inner.tags[:, 5:-7], alone.tags)
    moved = np.where(np.asarray(alone.partners) >= 0, np.asarray(alone.partners) + 5, -1)
    np.testing.assert_array_equal(inner.partners[:, 5:-7], moved)


def test_the_table_is_an_argument_not_a_constant(table):
    leaves = jax.tree.leaves(table)
    assert len(leaves) == 7
    assert table.exits.shape[0] < len(table.kinds)


def test_unfit_tags_are_refused(contents):
    with pytest.raises(ValueError, match="must be of the form"):
        tag_table(contents, ["think"])


def test_vocabularies_that_are_not_byte_level_are_refused():
    with pytest.raises(ValueError, match="byte-level"):
        token_bytes({"▁the": 0}, {})


def test_an_embedding_smaller_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="size=1"):
        token_bytes({"a": 0, "b": 1}, {}, size=1)


# --- Tokens that hold a tag and content -----------------------------------------------------------

GLUED = ["<", "answer", ">", ">B", ">The", ">\n", "</", ".</", "B", " man", "x<", "<answer>", "\n"]
"""Splits as in Qwen's vocabulary, and two that it does not have."""


def credited(pieces, tags=ANCHOR_TAGS):
    """Which tokens of a row, given as texts, a `tag_mask` chooses."""
    table = tag_table([piece.encode() for piece in GLUED])
    tokens = np.array([[GLUED.index(piece) for piece in pieces]])
    chosen = np.asarray(tag_mask(structural_tokens(tokens, table), table, tags))[0]
    return [piece for piece, own in zip(pieces, chosen, strict=True) if own]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("<", "answer", ">", "B", "</", "answer", ">"), "< answer > </ answer >"),
        (("<", "answer", ">B", "</", "answer", ">"), "< answer </ answer >"),
        (("<", "answer", ">The", " man", "</", "answer", ">"), "< answer </ answer >"),
        (("<", "answer", ">B", ".</", "answer", ">\n"), "< answer answer >\n"),
        (("<", "answer", ">\n", "B", "\n", "</", "answer", ">"), "< answer >\n </ answer >"),
        (("x<", "answer", ">B"), "answer"),
        (("<answer>", "B", "</", "answer", ">The"), "<answer> </ answer"),
        (("<", "answer", "B", "<", "answer", ">"), "< answer >"),
    ],
)
def test_tags_are_chosen_and_content_that_shares_a_token_is_not(pieces, expected):
    assert " ".join(credited(pieces)) == expected


def test_most_of_a_vocabulary_moves_the_automaton_alike(contents, table):
    """Tokens are read by one representative of theirs; one by one they give the same table."""
    words = [b"answering", b"an answer", b"\r\n ", b"\n x", b"no>", b"thin", b"e", b" ", b""]
    alone = tag_table(words)
    for number, word in enumerate(words):
        own = tag_table([word])
        for name in ("exits", "completes", "continues", "filled"):
            got = getattr(alone, name)[alone.kinds[number]]
            np.testing.assert_array_equal(got, getattr(own, name)[own.kinds[0]], str(word))
