"""Which part of Qwen3-VL each parameter belongs to."""

from __future__ import annotations

from paravt_jax.parts import Part

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
