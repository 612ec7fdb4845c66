"""Tags are removed as by searching again and again, in linear time."""

import random
import re
import time

import pytest

from paravt_jax.markup import without_tags
from pipelines.render import ChatRenderer
from rollout.responses import _MARKUP, strip_markup
from tests.support.needle import renderer

PARTS = ["<", ">", "<|", "|>", "a", "</", "think", "tool_call", "im_end", "<think>", "</answer>"]
PARTS += ["<|im_end|>", "|", "\n", "π", "<think", "<<", ">>", "<|a", "<answer>"]


def again_and_again(text: str, tag: re.Pattern) -> str:
    while (plain := tag.sub("", text)) != text:
        text = plain
    return text


@pytest.mark.parametrize("tag", [_MARKUP, renderer()._control], ids=["markup", "control"])
def test_as_by_searching_again_and_again(tag):
    dice = random.Random(0)
    removed = 0
    for _ in range(20_000):
        text = "".join(dice.choices(PARTS, k=dice.randrange(1, 30)))
        plain = without_tags(text, tag)
        assert plain == again_and_again(text, tag)
        assert not tag.search(plain)
        removed += plain != tag.sub("", text)
    assert removed > 100, "tags that removal joins were hardly put to the test"


NESTED = {
    "nested": lambda n: "<thi" * n + "<think>" + "nk>" * n,
    "opened": lambda n: "<" * n + "<think>" + "a" * n,
    "closed": lambda n: "<think>" + ">" * n + "<|" * n,
    "a long name": lambda n: "<|" + "a" * n + "<think>" + "|" * n + ">",
    "many": lambda n: "<think>x" * n,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", NESTED)
def test_two_million_characters_take_seconds(kind):
    """Searching again took 0.6 s for 40,000, and would take half an hour for these."""
    text = NESTED[kind](2_000_000 // max(len(NESTED[kind](101)) - len(NESTED[kind](100)), 1))
    began = time.process_time()
    strip_markup(text)
    released(renderer(), text)
    assert time.process_time() - began < 300


def released(own: ChatRenderer, text: str) -> None:
    assert not own._control.search(own.without_control(text))
