"""Tags in the released vocabulary of Qwen3-VL, whose tokens can hold words besides."""

import numpy as np
import pytest
from tokenizers import Tokenizer

from paravt_jax.protocol import SYNTAXES
from paravt_jax.structure import anchor_tags, structural_tokens, tag_credit, tag_mask, tag_table
from paravt_jax.task_masks import task_masks
from tests.support.vocabulary import contents_of

TAGS = tuple(dict.fromkeys(tag for syntax in SYNTAXES.values() for tag in syntax.tags))


@pytest.fixture(scope="module")
def vocabulary(qwen3_vl_folder):
    """The tokenizer and its table of all tags."""
    tokenizer = Tokenizer.from_file(str(qwen3_vl_folder / "tokenizer.json"))
    return tokenizer, tag_table(contents_of(tokenizer), TAGS)


def split(tokenizer, text):
    """Token ids `[1, t]` and their texts."""
    ids = tokenizer.encode(text).ids
    return np.array([ids]), [tokenizer.decode([i], skip_special_tokens=False) for i in ids]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("<answer>B</answer>", ["<", "answer", "</", "answer", ">"]),
        ("<answer>The man</answer>", ["<", "answer", "</", "answer", ">"]),
        ("<answer>No.</answer>", ["<", "answer", "answer", ">"]),
        ("<answer>(B) x</answer>", ["<", "answer", "</", "answer", ">"]),
        ("<answer>36 to 40</answer>\n", ["<", "answer", ">", "</", "answer", ">\n"]),
        ("<answer>\nB\n</answer>", ["<", "answer", ">\n", "</", "answer", ">"]),
        ("</think>\n\n<tool_call>\n{}\n</tool_call>", ["</think>", "<tool_call>", "</tool_call>"]),
    ],
)
def test_no_word_of_an_answer_is_structure(vocabulary, text, chosen):
    tokenizer, table = vocabulary
    tokens, pieces = split(tokenizer, text)
    found = structural_tokens(tokens, table)
    mask = np.asarray(tag_mask(found, table, anchor_tags()))[0]
    assert [piece for piece, own in zip(pieces, mask, strict=True) if own] == chosen
    ones = np.ones(tokens.shape, np.float32)
    credit = np.asarray(tag_credit(found, table, anchor_tags(), ones, ones))[0]
    assert not credit[~mask].any()


def test_masks_of_video_o3_blind_what_decides_a_letter(vocabulary):
    tokenizer, table = vocabulary
    tokens, pieces = split(tokenizer, "xy<answer>B</answer>")
    videos = np.zeros(tokens.shape, int)
    videos[0, :2] = 1, 2
    assert pieces[-6:] == ["<", "answer", ">B", "</", "answer", ">"]
    everywhere = np.ones(tokens.shape, bool)
    for predictor, blind in ((True, ["answer", ">B"]), (False, [">B"])):
        masks = task_masks(tokens, everywhere, videos, np.ones(1, bool), table, predictor)
        assert [pieces[at] for at in np.flatnonzero(masks.blind[0])] == blind
