"""Task-decoupled attention masks against a plain oracle that looks at every pair of tokens."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import attention
from models.common.attention import QUERY_CHUNK, attend, reference
from paravt_jax.protocol import STRUCTURAL_TAGS, SYNTAXES
from paravt_jax.records import HiddenKeys, Prompt
from paravt_jax.structure import tag_table
from paravt_jax.task_masks import task_masks
from train.batch import LearnerStream, learner_batch
from train.sft.masking import TaskMasking

pytestmark = pytest.mark.slow

TAGS = SYNTAXES["grounding"].tags
# A tag can be one token or several, and a token can hold the end of one and more besides.
PIECES = [*TAGS, "<", "answer", ">", "</", "grounding", "ground", "ing>", ">x", "a", "b", "<think"]
PIECES += [">B", ".</", ">\n", "<answer>B</answer>", "</answer><answer>"]
IDS = {piece: index for index, piece in enumerate(PIECES)}
TABLE = tag_table([piece.encode() for piece in PIECES], TAGS)
VIDEO = IDS["a"]
"""Stands for any token without a meaning of its own."""


def oracle_spans(row, written, name):
    """Content of each closed span: the tokens between two tags that follow each other, and those
    with letters between them. What was not written ends everything; tags within thoughts are only
    spoken of."""
    text, owner = "", []
    for place, token in enumerate(row):
        piece = PIECES[token] if written[place] else "\x00"
        text, owner = text + piece, owner + [place] * len(piece)
    marks, thinking = [("", 0, 0)], False
    for at in range(len(text)):
        tag = next((tag for tag in (*TAGS, "\x00") if text.startswith(tag, at)), None)
        if tag in ("<think>", "</think>", "\x00") or (tag and not thinking):
            thinking = tag == "<think>" or (thinking and tag not in ("</think>", "\x00"))
            marks.append((tag, at, at + len(tag)))
    spans = []
    for (first, _, start), (second, stop, _) in itertools.pairwise(marks):
        if (first, second) == (f"<{name}>", f"</{name}>"):
            between = range(owner[start - 1] + 1, owner[stop])
            spans.append({*between, *(owner[i] for i in range(start, stop) if text[i].strip())})
    return spans


def oracle(row, written, videos, active, predictor):
    """Whether query i sees key j, for each pair."""
    visible = np.ones((len(row), len(row)), bool)
    if not active or videos.max() < 2:
        return visible
    for place in (*oracle_spans(row, written, "answer")[-1:],):
        for i in place | {i - 1 for i in place if predictor and i}:
            visible[i, videos == 1] = False
    for place in oracle_spans(row, written, "grounding")[1:]:
        for i in place | {i - 1 for i in place if predictor and i}:
            visible[i, videos == 2] = False
    return visible


def random_rows(rng, count, length):
    likely = np.r_[np.full(len(TAGS), 3.0), np.ones(len(PIECES) - len(TAGS))]
    tokens = rng.choice(len(PIECES), (count, length), p=likely / likely.sum())
    videos = rng.choice([0, 0, 0, 1, 2], (count, length))
    videos[: count // 8][videos[: count // 8] == 2] = 1
    tokens[videos > 0] = VIDEO
    return tokens, videos, rng.random((count, length)) < 0.95, rng.random(count) < 0.8


@pytest.mark.parametrize("predictor", [True, False])
def test_masks_equal_the_oracle_on_random_streams(predictor):
    rng = np.random.default_rng(0)
    tokens, videos, written, rows = random_rows(rng, 600, 40)
    masks = jax.jit(functools.partial(task_masks, predictor=predictor))
    got = masks(tokens, written, videos, rows, TABLE).visible(40, 40)
    for index, row in enumerate(tokens):
        want = oracle(row, written[index], videos[index], rows[index], predictor)
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
    alone = task_masks(tokens, written, videos, np.ones(1, bool), TABLE, predictor=False)
    np.testing.assert_array_equal(alone.blind[0], want)
    want[:-1] |= want[1:]
    np.testing.assert_array_equal(masks.blind[0], want)
    whole = masks.visible(len(parts), len(parts))
    part = masks.visible(3, second + 2, first=second)
    np.testing.assert_array_equal(part, whole[:, second : second + 3, : second + 2])


@pytest.mark.parametrize(
    ("parts", "predictor", "blind"),
    [
        # As Qwen's tokenizer splits an answer of one letter, of words, and after a line break.
        (("<", "answer", ">B", "</", "answer", ">"), False, (2,)),
        (("<", "answer", ">B", "</", "answer", ">"), True, (1, 2)),
        (("<", "answer", ">B", "b", ".</", "answer", ">"), False, (2, 3, 4)),
        (("<", "answer", ">\n", "b", "</", "answer", ">"), False, (3,)),
        (("<", "answer", ">\n", "b", "</", "answer", ">"), True, (2, 3)),
        (("a", "<answer>B</answer>", "a"), True, (0, 1)),
    ],
)
def test_an_answer_that_shares_tokens_with_its_tags(parts, predictor, blind):
    """No token that decides the answer sees the overview: neither the letter nor, unless asked as
    in the source, the token at which it is predicted."""
    tokens, written, videos = stream(1, 2, *parts)
    masks = task_masks(tokens, written, videos, np.ones(1, bool), TABLE, predictor)
    assert np.flatnonzero(masks.blind[0]).tolist() == [2 + place for place in blind]


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


@pytest.mark.parametrize(
    ("length", "scores"),
    [
        (20, attention.IN_TURNS),
        (QUERY_CHUNK + 30, attention.IN_TURNS),
        (QUERY_CHUNK + 30, 0),
        (3 * QUERY_CHUNK + 30, attention.IN_TURNS),
    ],
    ids=["at once", "in chunks", "head by head", "in chunks of loops"],
)
def test_attention_sees_nothing_that_is_hidden(length, scores, monkeypatch):
    """Beside causality and segments, all three at once, against the matrix written out. So do
    gradients."""
    monkeypatch.setattr(attention, "UNROLLED", 2 * QUERY_CHUNK)
    monkeypatch.setattr(attention, "IN_TURNS", scores)
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(rng.normal(size=(3, 2, length, 2, 8)), jnp.float32)
    kinds = rng.choice([0, 1, 2], (2, length))
    blind = np.where(kinds == 0, rng.choice([0, 0, 1, 2, 3], (2, length)), 0)
    segments = np.sort(rng.choice([1, 2], (2, length)), axis=1)
    sees = (blind[:, :, None] & kinds[:, None]) == 0
    sees &= np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None])
    terms = {"segments": jnp.asarray(segments), "hidden_keys": HiddenKeys(blind, kinds)}
    hiding, seeing = (jax.jit(functools.partial(attend, causal=True, **t)) for t in (terms, {}))
    got = hiding(query, key, value)
    np.testing.assert_allclose(got, reference(query, key, value, jnp.asarray(sees)), atol=1e-6)
    ours, plain = (
        jax.jit(jax.grad(lambda x, mixed=mixed: jnp.sum(mixed(x, x, x) ** 2)))(query)
        for mixed in (hiding, functools.partial(reference, visible=jnp.asarray(sees)))
    )
    np.testing.assert_allclose(ours, plain, atol=1e-5, rtol=1e-5)
    assert np.abs(got - seeing(query, key, value)).max() > 0.1


def test_masked_rows_are_a_share_that_is_drawn_for_each_batch_anew():
    """What counts as the overview is the prompt's; a batch draws the same rows every time."""
    parts = ("a", 1, "<grounding>", "b", "</grounding>", 2, "<answer>", "b", "</answer>")
    tokens, _, videos = stream(*parts)
    seen = np.where(videos > 0, 0, -1)
    count, plain = 400, np.zeros(len(parts) - 2, np.float32)
    prompt = Prompt(tokens[0, :2], np.zeros((2, 3), np.int32), seen[0, :2])
    streams = [LearnerStream(prompt, tokens[0, 2:], plain, plain)] * count
    batch = learner_batch(streams, length=len(parts), pad_id=0)
    batch = dataclasses.replace(batch, vision_index=np.repeat(seen, count, axis=0))
    masking = TaskMasking(0.1, seed=0, tags=TABLE)
    first = masking(batch, streams, (0, 0)).hidden_keys
    assert first is not None
    np.testing.assert_array_equal(first.kinds, np.repeat(videos, count, axis=0))
    rows = np.asarray(first.blind).any(axis=1)
    assert 20 < rows.sum() < 70
    answer = parts.index("<answer>")
    want = np.isin(np.arange(len(parts)), (answer, answer + 1)).astype(int)
    assert (np.asarray(first.blind)[rows] == want).all()
    for place, same in (((0, 0), True), ((0, 400), False), ((1, 0), False)):
        again = masking(batch, streams, place).hidden_keys
        assert again is not None
        assert np.array_equal(np.asarray(again.blind), np.asarray(first.blind)) == same
