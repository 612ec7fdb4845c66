"""Words that others wrote, without the tags that would let them speak for somebody else."""

from __future__ import annotations

import re

_BRACKET = re.compile("([<>])")


def without_tags(text: str, tag: re.Pattern[str]) -> str:
    """Text without tags, and without those that removing others joins (`<thi<think>nk>`).

    Takes time linear in the text: brackets are matched as in a parser, where searching again after
    each removal takes quadratic time on nested tags.

    Args:
        text: any text.
        tag: matches whole tags: `<`, no other bracket, `>`.
    """
    if not tag.search(text):
        return text
    kept: list[str] = []
    opened: list[int] = []  # where in `kept` a tag may begin
    for piece in _BRACKET.split(text):
        if piece == "<":
            opened.append(len(kept))
        elif piece == ">" and opened:
            start = opened.pop()
            if tag.fullmatch("".join(kept[start:]) + ">"):
                del kept[start:]
                continue
            # What is left of it stands inside of every tag that began earlier: none of them is one.
            opened.clear()
        kept.append(piece)
    return "".join(kept)
