"""Parts of a model that can be frozen, or learn at a rate of their own."""

from __future__ import annotations

from typing import Literal

Part = Literal["vision", "mergers", "embedding", "layers", "router", "head"]
"""`vision`: the tower without its `mergers`, which make tokens of what it sees. `embedding`: of
words, and the head where both are one. `layers`: of the language model, with the last norm, without
the `router` of experts. `head`: that of the vocabulary."""
SEEN: tuple[Part, ...] = ("vision", "mergers")
"""Parts that train only with `model.train_vision`."""

_BEGINNINGS: tuple[tuple[str, Part], ...] = (
    ("vision.merger.", "mergers"),
    ("vision.deepstack.", "mergers"),
    ("vision.", "vision"),
    ("text.embedding", "embedding"),
    ("head.", "head"),
)


def part_of(name: str) -> Part:
    """The part that the parameter of this name belongs to."""
    if ".router." in name:
        return "router"
    for start, part in _BEGINNINGS:
        if name.startswith(start):
            return part
    return "layers"
