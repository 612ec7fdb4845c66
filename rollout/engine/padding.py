"""Few static sizes, whatever comes: prompts and appended blocks, padded and put into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from paravt_jax.records import Prompt
from paravt_jax.shapes import bucket
from rollout.engine.engine import PaddedTokens

T = TypeVar("T")

# Batches of 1 and of 16 and nothing between: each further size would multiply the shapes that are
# compiled, and up to a quarter of a batch is cheaper one by one.
MAX_BATCH = 16
"""Most prompts, or blocks for running rows, in one call on few devices."""
MIN_PROMPT, MIN_APPEND = 64, 8
"""Smallest static sizes, in tokens, of prompts and of what is appended to running rows."""
NO_LIMIT = np.iinfo(np.int32).max


def static_size(tokens: int, frames: int, least: int, most: int = NO_LIMIT) -> tuple[int, int]:
    """Tokens and frames that a block of these many is padded to, tokens at least `least` and at
    most `most`. Coarse sizes, as those of tokens and of frames multiply; but where there are many
    tokens, padding takes longer than compiling for one more size."""
    shown = bucket(frames, coarse=True) if frames else 0
    return bucket(tokens, least, most, coarse=tokens <= MIN_PROMPT), shown


def static_shape(block: Prompt, least: int, most: int = NO_LIMIT) -> tuple[int, int]:
    """`static_size` of a prompt or an appended block."""
    frames = 0 if block.patches is None else len(block.patches.grids)
    return static_size(len(block.tokens), frames, least, most)


def grouped(
    items: Iterable[T], key: Callable[[T], tuple[int, int]]
) -> list[tuple[tuple[int, int], list[T]]]:
    """Items of each key, in the order in which the keys first occur."""
    groups: dict[tuple[int, int], list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def full_batch(most: int, shards: int) -> int:
    """Most items in one call, of `most` that there can be: no fewer than the `shards` that a mesh
    splits rows into, or every device would take all of them."""
    return min(max(MAX_BATCH, shards), most)


def batches(items: Sequence[T], most: int, shards: int) -> Iterator[tuple[list[T], int]]:
    """Cut into batches, each with the size that it is to be padded to: `full_batch` or 1, so that
    few shapes occur."""
    size = full_batch(most, shards)
    for start in range(0, len(items), size):
        batch = list(items[start : start + size])
        if len(batch) >= smallest_batch(most):
            yield batch, size
        else:
            yield from (([item], 1) for item in batch)


def smallest_batch(most: int) -> int:
    """The fewest items that `batches` puts into one batch; fewer go one by one."""
    return min(MAX_BATCH, most) // 4 + 1


def prompt_batches(
    groups: Iterable[tuple[tuple[int, int], list[T]]], most: int, shards: int
) -> Iterator[tuple[tuple[int, int], list[T], int]]:
    """Batches of prompts, each with its shape and the number of rows that it is padded to.

    Prompts that are alone with their shape are read in the shape of a larger one where that is less
    work: a mesh splits the rows of a batch into `shards`, and reads a single prompt on every device
    alike. No shape occurs that none of them has.
    """
    size, alone = full_batch(most, shards), []
    for shape, items in groups:
        for batch, rows in batches(items, most, shards):
            if rows > 1:
                yield shape, batch, rows
            else:
                alone += [(shape, item) for item in batch]
    alone.sort(key=lambda pair: pair[0], reverse=True)
    # A device reads its share of a full batch, but all of one that does not divide.
    each = size // shards if size % shards == 0 else size
    while alone:
        (tokens, frames), first = alone[0]
        inside = [at for at, (own, _) in enumerate(alone) if own[1] <= frames][:size]
        work = sum(alone[at][0][0] for at in inside)
        if len(inside) >= smallest_batch(most) and each * tokens < work:
            yield (tokens, frames), [alone[at][1] for at in inside], size
        else:
            inside = [0]
            yield (tokens, frames), [first], 1
        alone = [pair for at, pair in enumerate(alone) if at not in inside]


def pad(
    blocks: Sequence[Prompt],
    index_B_T: Sequence[np.ndarray],
    width: int,
    pad_id: int,
    starts: Sequence[int] | None = None,
) -> PaddedTokens:
    """Blocks as one batch, padded on the right to `width` tokens.

    Args:
        blocks: prompts, or what is appended to rows.
        index_B_T: the `vision_index` of each block into the features of the batch.
        starts: added to the positions of each block.
    """
    rows = len(blocks)
    tokens = np.full((rows, width), pad_id, np.int32)
    positions = np.zeros((rows, width, 3), np.int32)
    vision_index = np.full((rows, width), -1, np.int32)
    for row, (block, index) in enumerate(zip(blocks, index_B_T, strict=True)):
        tokens[row, : len(index)] = block.tokens
        positions[row, : len(index)] = block.positions + (starts[row] if starts else 0)
        vision_index[row, : len(index)] = index
    lengths = np.array([len(block.tokens) for block in blocks], np.int32)
    return PaddedTokens(tokens, positions, vision_index, lengths)
