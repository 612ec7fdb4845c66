"""Patches of several prompts in one array: every prompt padded to the same frames and patches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paravt_jax.records import Patches, Prompt


def stack_patches(
    items: Sequence[Patches | None], frames: int, patches: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values `[b, frames, patches, c]` and grids `[b, frames, 2]` of several prompts.

    Padding frames have grid (0, 0); a prompt without frames has nothing but those.

    Raises:
      ValueError: no prompt has frames, or one has more than fit.
    """
    present = [item for item in items if item is not None]
    if not present:
        raise ValueError("no prompt has frames; pass vision features of None instead")
    values = np.zeros((len(items), frames, patches, present[0].values.shape[2]), np.float32)
    grids = np.zeros((len(items), frames, 2), np.int32)
    for row, item in enumerate(items):
        if item is None:
            continue
        f, p, _ = item.values.shape
        if f > frames or p > patches:
            raise ValueError(f"{f} frames of {p} patches do not fit {frames} of {patches}")
        values[row, :f, :p] = item.values
        grids[row, :f] = item.grids
    return values, grids


def largest(items: Sequence[Patches | None]) -> tuple[int, int]:
    """Most frames, and most patches of a frame, among the prompts; (0, 0) if none has any."""
    shapes = [item.values.shape for item in items if item is not None]
    return max((s[0] for s in shapes), default=0), max((s[1] for s in shapes), default=0)


def restride(prompt: Prompt, patches: int) -> np.ndarray:
    """`vision_index` of a prompt whose frames were padded to `patches` patches each.

    The index counts merged tokens over padded frames, so its stride changes with the padding.
    """
    index, own = prompt.vision_index, prompt.patches
    if own is None or own.values.shape[1] == patches:
        return index
    area = merge_area(prompt)
    before, after = own.values.shape[1] // area, patches // area
    return np.where(index >= 0, index // before * after + index % before, -1).astype(np.int32)


def merge_area(prompt: Prompt) -> int:
    """How many patches make one vision token, counted from a prompt that has frames."""
    assert prompt.patches is not None
    return int(prompt.patches.grids.prod(axis=1).sum()) // int((prompt.vision_index >= 0).sum())


def join_patches(items: Sequence[Patches | None]) -> Patches | None:
    """Frames of all items one after the other, padded to the largest; None if there are none."""
    present = [item for item in items if item is not None]
    if len(present) < 2:
        return present[0] if present else None
    _, patches = largest(present)
    wide = [((0, 0), (0, patches - item.values.shape[1]), (0, 0)) for item in present]
    values = [np.pad(item.values, sides) for item, sides in zip(present, wide, strict=True)]
    return Patches(np.concatenate(values), np.concatenate([item.grids for item in present]))


def split_patches(patches: Patches, counts: Sequence[int]) -> list[Patches]:
    """The reverse of `join_patches`: items of this many frames each, padded as they are."""
    if len(counts) == 1:
        return [patches]
    ends = np.cumsum(counts)[:-1]
    values, grids = np.split(patches.values, ends), np.split(patches.grids, ends)
    return [Patches(*pair) for pair in zip(values, grids, strict=True)]
