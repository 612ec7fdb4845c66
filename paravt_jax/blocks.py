"""Pieces of a token stream, with or without frames, put one after the other (host side, numpy).

A block is a `Prompt` whose positions count from 0. Joined, each block continues where the one
before it ended: one above its largest position, as text does after frames (M-RoPE).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paravt_jax.patches import join_patches, largest, merge_area, restride
from paravt_jax.records import Prompt, Shown
from paravt_jax.rope_index import next_position


def text_block(tokens: Sequence[int] | np.ndarray) -> Prompt:
    """Tokens without frames."""
    ids = np.asarray(tokens, np.int32)
    positions = np.repeat(np.arange(len(ids), dtype=np.int32)[:, None], 3, axis=1)
    return Prompt(ids, positions, np.full(len(ids), -1, np.int32))


def join_blocks(blocks: Sequence[Prompt]) -> Prompt:
    """One block of all tokens and all frames, in order."""
    return Prompt(
        tokens=np.concatenate([block.tokens for block in blocks]),
        positions=_joined_positions(blocks),
        vision_index=_joined_index(blocks),
        patches=join_patches([block.patches for block in blocks]),
    )


def whole_stream(prompt: Prompt, tokens: np.ndarray, shown: Sequence[Shown] = ()) -> Prompt:
    """Everything that a rollout read and wrote, as one block: its prompt, then its own `tokens`
    with the frames that tool responses brought into them."""
    return join_blocks([prompt, own_block(tokens, shown)])


def own_block(tokens: np.ndarray, shown: Sequence[Shown] = ()) -> Prompt:
    """What a rollout read and wrote after its prompt, as one block; see `whole_stream`."""
    blocks, at = [], 0
    for piece in shown:
        blocks += [text_block(tokens[at : piece.at]), piece.block]
        at = piece.at + len(piece.block.tokens)
    return join_blocks([*blocks, text_block(tokens[at:])])


def _joined_positions(blocks: Sequence[Prompt]) -> np.ndarray:
    start, parts = 0, []
    for block in blocks:
        parts.append(block.positions + start)
        start += next_position(block.positions)
    return np.concatenate(parts).astype(np.int32)


def _joined_index(blocks: Sequence[Prompt]) -> np.ndarray:
    """Vision tokens are counted over the frames of all blocks, padded to the largest frame."""
    _, patches = largest([block.patches for block in blocks])
    frames, parts = 0, []
    for block in blocks:
        index = restride(block, patches)
        if block.patches is not None:
            index = np.where(index >= 0, index + frames * (patches // merge_area(block)), -1)
            frames += len(block.patches.grids)
        parts.append(index.astype(np.int32))
    return np.concatenate(parts)
