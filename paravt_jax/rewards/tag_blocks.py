"""A text as a row of tagged blocks and nothing else, as strict formats ask for it."""

from __future__ import annotations

import re

_OPEN = re.compile(r"<(\w{1,40})>")

Block = tuple[str, str]
"""Name of the tag, and what stands between its opening and the next closing one."""


def blocks(text: str, gap: str = r"\s*") -> list[Block] | None:
    """The blocks of a text that is `<a>...</a><b>...</b>...` with only gaps around and between
    them; None for any other text. A block ends at the first closing tag of its name.

    Args:
        text: what a turn or a rollout said.
        gap: regular expression of what may stand before, between and after blocks.
    """
    space, place, pairs = re.compile(gap), 0, []
    while (place := _skip(space, text, place)) < len(text):
        opened = _OPEN.match(text, place)
        end = text.find(f"</{opened[1]}>", opened.end()) if opened else -1
        if opened is None or end < 0:
            return None
        pairs.append((opened[1], text[opened.end() : end]))
        place = end + len(opened[1]) + len("</>")
    return pairs


def names(text: str) -> list[str]:
    """Names of the blocks of a text; empty if it is not made of blocks alone."""
    return [name for name, _ in blocks(text) or []]


def _skip(space: re.Pattern[str], text: str, place: int) -> int:
    match = space.match(text, place)
    return match.end() if match else place
