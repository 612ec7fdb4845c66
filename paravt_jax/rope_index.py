"""Positions of tokens and vision tokens in a prompt (host side, numpy).

Qwen3-VL gives every token three positions (time, height, width). Text tokens count up on all
three; the tokens of one frame share one time and spread over height and width. Each frame
of a video stands alone between timestamps written as text, so a video is a list of frames
and an image is one frame.
"""

from __future__ import annotations

import numpy as np


def mrope_positions(visual: np.ndarray, grids: np.ndarray, merge: int) -> np.ndarray:
    """M-RoPE positions of one token stream without padding.

    Args:
      visual: bool `[t]`, True where a vision token stands.
      grids: int `[f, 2]`, rows and columns of patches of each frame, in the order in which
        their tokens appear.
      merge: side of the block of patches that makes one vision token.

    Returns:
      int32 `[t, 3]`: temporal, height and width position, as transformers'
      `Qwen3VLModel.get_rope_index`.

    Raises:
      ValueError: the runs of vision tokens are not the frames' tokens.
    """
    positions = np.zeros((len(visual), 3), np.int32)
    at = start = 0
    for (rows, cols), first in zip(
        _merged(grids, merge), _frame_starts(visual, grids, merge), strict=True
    ):
        text = first - at
        positions[at:first] = start + np.arange(text)[:, None]
        start += text
        at = first + rows * cols
        positions[first:at, 0] = start
        positions[first:at, 1] = start + np.repeat(np.arange(rows), cols)
        positions[first:at, 2] = start + np.tile(np.arange(cols), rows)
        # A frame takes one moment of time, and what follows stands behind its longer side.
        start += max(rows, cols)
    positions[at:] = start + np.arange(len(visual) - at)[:, None]
    return positions


def vision_index(
    visual: np.ndarray, grids: np.ndarray, merge: int, patches_per_frame: int
) -> np.ndarray:
    """Which vision token stands at each place, or -1 for text.

    Vision tokens are counted frame-major over frames padded to `patches_per_frame` patches,
    the order in which the tower returns them. Other arguments and errors as
    `mrope_positions`.
    """
    index = np.full(len(visual), -1, np.int32)
    for frame, first in enumerate(_frame_starts(visual, grids, merge)):
        count = int(np.prod(grids[frame])) // merge**2
        index[first : first + count] = frame * (patches_per_frame // merge**2) + np.arange(count)
    return index


def next_position(positions: np.ndarray) -> int:
    """The position, on all three axes, of the text token that follows this stream."""
    return int(positions.max()) + 1 if len(positions) else 0


def _merged(grids: np.ndarray, merge: int) -> list[tuple[int, int]]:
    return [(int(rows) // merge, int(cols) // merge) for rows, cols in grids]


def _frame_starts(visual: np.ndarray, grids: np.ndarray, merge: int) -> list[int]:
    """Where the first token of each frame stands."""
    where = np.flatnonzero(visual)
    counts = np.array([rows * cols for rows, cols in _merged(grids, merge)], np.int64)
    if counts.sum() != len(where):
        raise ValueError(
            f"{len(where)} vision tokens for frames that make {counts.sum()} "
            f"(grids {np.asarray(grids).tolist()}): render one token per merged block of patches"
        )
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)[: len(counts)]
    firsts = where[starts] if len(counts) else starts
    for first, count in zip(firsts, counts, strict=True):
        if not visual[first : first + count].all():
            raise ValueError(f"the vision tokens of the frame at token {first} are interrupted")
    return [int(first) for first in firsts]
