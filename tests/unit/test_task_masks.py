"""Task-decoupled attention masks against a plain oracle that looks at every pair of tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.protocol import STRUCTURAL_TAGS, SYNTAXES
from paravt_jax.structure import tag_table
from paravt_jax.task_masks import task_masks

TAGS = SYNTAXES["grounding"].tags
# A tag can be one token or several, and a token can hold the end of one and more besides.
PIECES = [*TAGS, "<", "answer", ">", "</", "grounding", "ground", "ing>", ">x", "a", "b", "<think"]
IDS = {piece: index for index, piece in enumerate(PIECES)}
TABLE = tag_table([piece.encode() for piece in PIECES], TAGS)
VIDEO = IDS["a"]
"""Stands for any token without a meaning of its own."""


def oracle_spans(row, written, name):
    """Spans `(first, last)` of content tokens, read from bytes: text between two tags."""
    marks = []  # (place of the first token with bytes of the tag, of the last one, opens)
    text, owner = "", []
    for place, token in enumerate(row):
        piece = PIECES[token] if written[place] else "\x00"
        text, owner = text + piece, owner + [place] * len(piece)
    for at in range(len(text)):
        for tag, opens in ((f"<{name}>", True), (f"</{name}>", False)):
            if text.startswith(tag, at):
                marks.append((owner[at], owner[at + len(tag) - 1], opens))
    pairs = itertools.pairwise(marks)
    return [range(a[1] + 1, b[0]) for a, b in pairs if a[2] and not b[2]]


def oracle(row, written, videos, active):
    """Whether query i sees key j, for each pair."""
    visible = np.ones((len(row), len(row)), bool)
    if not active or videos.max() < 2:
        return visible
    for place in (*oracle_spans(row, written, "answer")[-1:],):
        for i in place:
            visible[i, videos == 1] = False
    for place in oracle_spans(row, written, "grounding")[1:]:
        for i in place:
            visible[i, videos == 2] = False
    return visible


def random_rows(rng, count, length):
    likely = np.r_[np.full(len(TAGS), 3.0), np.ones(len(PIECES) - len(TAGS))]
    tokens = rng.choice(len(PIECES), (count, length), p=likely / likely.sum())
    videos = rng.choice([0, 0, 0, 1, 2], (count, length))
    videos[: count // 8][videos[: count // 8] == 2] = 1
    tokens[videos > 0] = VIDEO
    return tokens, videos, rng.random((count, length)) < 0.95, rng.random(count) < 0.8


def test_masks_equal_the_oracle_on_random_streams():
    rng = np.random.default_rng(0)
    tokens, videos, written, rows = random_rows(rng, 600, 40)
    got = jax.jit(task_masks)(tokens, written, videos, rows, TABLE).visible(40, 40)
    for index, row in enumerate(tokens):
        want = oracle(row, written[index], videos[index], rows[index])
        np.testing.assert_array_equal(got[index], want, str([PIECES[t] for t in row]))
    hidden = ~np.asarray(got)
    assert hidden[:, :, :][rows].any() and not hidden[~rows].any()
    for kind in (1, 2):
        assert (hidden & (videos == kind)[:, None]).any(), "both masks must occur"


def stream(*parts):
    """Tokens, videos and what was written, of parts: tags, words, or numbers of videos."""
    tokens = [VIDEO if isinstance(part, int) else IDS[part] for part in parts]
    videos = [part if isinstance(part, int) else 0 for part in parts]
    return (
        np.array([tokens]),
        np.ones((1, len(parts)), bool),
        np.array([videos]),
    )


def test_an_episode_by_hand():
    look = ("<think>", "a", "</think>", "<grounding>", "b", "</grounding>")
    parts = (1, *look, 2, *look, 2, "<think>", "a", "</think>", "<answer>", "b", "</answer>")
    tokens, written, videos = stream(*parts)
    masks = task_masks(tokens, written, videos, np.ones(1, bool), TABLE)
    want = np.zeros(len(parts), int)
    want[parts.index("<answer>") + 1] = 1
    second = [at for at, part in enumerate(parts) if part == "<grounding>"][1]
    want[second + 1] = 2
    np.testing.assert_array_equal(masks.blind[0], want)
    whole = masks.visible(len(parts), len(parts))
    part = masks.visible(3, second + 2, first=second)
    np.testing.assert_array_equal(part, whole[:, second : second + 3, : second + 2])


def test_one_video_or_an_undrawn_row_is_left_alone():
    parts = (1, "<grounding>", "b", "</grounding>", "<answer>", "b", "</answer>")
    tokens, written, videos = stream(*parts)
    assert not task_masks(tokens, written, videos, np.ones(1, bool), TABLE).blind.any()
    tokens, written, videos = stream(*parts, 2)
    assert not task_masks(tokens, written, videos, np.zeros(1, bool), TABLE).blind.any()
    assert task_masks(tokens, written, videos, np.ones(1, bool), TABLE).blind.any()


def test_tags_that_the_agent_did_not_write_do_not_count():
    tokens, written, videos = stream(1, 2, "<answer>", "b", "</answer>")
    masks = task_masks(tokens, jnp.zeros_like(written), videos, np.ones(1, bool), TABLE)
    assert not masks.blind.any()


def test_a_table_without_the_tags_is_refused():
    table = tag_table([b"a"], STRUCTURAL_TAGS)
    with pytest.raises(ValueError, match="lacks <grounding>, </grounding>"):
        task_masks(*stream("a"), np.ones(1, bool), table)
