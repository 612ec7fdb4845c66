"""Structural positions against a plain search in the bytes, on an adversarial byte-level BPE."""

import random
import re

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from paravt_jax.protocol import STRUCTURAL_TAGS
from paravt_jax.structure import (
    ANCHOR_TAGS,
    structural_mask,
    structural_tokens,
    tag_table,
    token_bytes,
)

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
    """Bytes of each id; three ids more than the tokenizer has, as in a padded embedding."""
    added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}
    return token_bytes(tokenizer.get_vocab(), added, size=tokenizer.get_vocab_size() + 3)


@pytest.fixture(scope="module")
def table(contents):
    return tag_table(contents)


def oracle(ids, contents, tags):
    """Join the bytes, search the tags, and ask of each token which occurrences it touches.

    An id without bytes is written as a zero byte, which no tag holds.
    """
    pieces = [contents[i] or b"\0" for i in ids]
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])
    found = np.full(len(ids), -1)
    counts = np.zeros(len(tags), int)
    pattern = b"|".join(re.escape(tag.encode()) for tag in tags)
    for match in reversed(list(re.finditer(pattern, b"".join(pieces)))):
        tag = tags.index(match.group().decode())
        counts[tag] += 1
        touched = (starts[:-1] < match.end()) & (starts[1:] > match.start())
        found[touched] = tag
    return found, counts


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


def test_every_position_agrees_with_a_search_in_the_bytes(tokenizer, contents, table):
    batch = np.array(list(sequences(tokenizer, contents, count=2000, length=40)), np.int32)
    result = structural_tokens(batch, table)
    expected = [oracle(ids, contents, table.tags) for ids in batch]
    np.testing.assert_array_equal(result.ids, [found for found, _ in expected])
    np.testing.assert_array_equal(result.counts, [counts for _, counts in expected])
    assert np.asarray(result.counts).sum(axis=0).min() > 100
    assert np.asarray(result.mask).mean() > 0.1


def test_anchor_tags_alone_leave_out_the_others(tokenizer, contents):
    table = tag_table(contents, ANCHOR_TAGS)
    text = "<think>a</think>\n<tool_call>{}</tool_call><answer>B</answer>"
    ids = np.array([tokenizer.encode(text).ids], np.int32)
    found, counts = oracle(ids[0], contents, ANCHOR_TAGS)
    np.testing.assert_array_equal(structural_mask(ids, table)[0], found >= 0)
    assert counts.tolist() == [1, 1, 1, 1]


def test_merges_do_cross_the_edges_of_tags(contents):
    crossing = [
        c for c in contents if any(t.encode() in c and t.encode() != c for t in ANCHOR_TAGS)
    ]
    assert crossing, "the tokenizer of this module must be adversarial"


def test_a_tag_does_not_run_over_rows_or_their_ends(contents, table):
    byte_ids = {content: i for i, content in enumerate(contents) if len(content) == 1}
    ids = np.array([[byte_ids[b"x"]] * 4 + [byte_ids[bytes([b])] for b in b"</thi"]] * 2)
    ids[1] = [byte_ids[bytes([b])] for b in b"nk>xxxxxx"]
    assert not np.asarray(structural_mask(ids, table)).any()


def test_columns_before_and_after_change_nothing(tokenizer, contents, table):
    ids = np.array([tokenizer.encode("<think>a</think><answer>B</answer>").ids], np.int32)
    padded = np.pad(ids, [(0, 0), (5, 7)], constant_values=tokenizer.encode("a").ids[0])
    np.testing.assert_array_equal(
        structural_tokens(padded, table).ids[:, 5:-7], structural_tokens(ids, table).ids
    )


def test_the_table_is_an_argument_not_a_constant(table):
    leaves = jax.tree.leaves(table)
    assert len(leaves) == 6
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
