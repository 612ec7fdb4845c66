"""Patches of several prompts in one array: every prompt padded to the same frames and patches."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from paravt_jax.lazy_array import LazyArray
from paravt_jax.records import Patches, Prompt, Scale


def stack_patches(
    items: Sequence[Patches | None], frames: int, patches: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values `[b, frames, patches, c]` and grids `[b, frames, 2]` of several prompts.

    Padding frames have grid (0, 0); a prompt without frames has nothing but those.

    Raises:
      ValueError: no prompt has frames, or one has more than fit.
    """
    rows = FrameRows(items, frames, patches)
    return rows[:], rows.grids


class FrameRows:
    """What `stack_patches` makes, row by row: a host of several stacks those alone that its devices
    hold.

    Raises:
      ValueError: see `stack_patches`.
    """

    def __init__(self, items: Sequence[Patches | None], frames: int, patches: int) -> None:
        present = [item for item in items if item is not None]
        if not present:
            raise ValueError("no prompt has frames; pass vision features of None instead")
        most, widest = largest(present)
        if most > frames or widest > patches:
            raise ValueError(f"{most} frames of {widest} patches do not fit {frames} of {patches}")
        self._items = items
        self.shape = (len(items), frames, patches, present[0].values.shape[2])
        """`[b, frames, patches, c]`."""
        self.grids = np.zeros((len(items), frames, 2), np.int32)
        for grids, item in zip(self.grids, items, strict=True):
            if item is not None:
                grids[: len(item.grids)] = item.grids

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> np.ndarray:
        """float32 values of some rows."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        items = self._items[first]
        values = np.zeros((len(items), *self.shape[1:]), np.float32)
        for row, item in zip(values, items, strict=True):
            if item is not None:
                f, p, _ = item.values.shape
                _normalise(item, row[:f, :p])
        return values[(slice(None), *rest)]


def normalised(item: Patches) -> np.ndarray:
    """float32 `[f, p, c]`: the values of patches as the vision tower takes them."""
    values = np.zeros(item.values.shape, np.float32)
    _normalise(item, values)
    return values


def _normalise(item: Patches, out: np.ndarray) -> None:
    """(x / 255 - mean) / std, written to `out`; zeros beyond each frame's own patches.

    In place: temporaries of this size cost more than the arithmetic.
    """
    if item.scale is None:
        out[:] = item.values
        return
    factor, offset = _steps(item.scale, out.shape[2])
    np.multiply(item.values, factor, out=out, dtype=np.float32)
    np.subtract(out, offset, out=out)
    for frame, count in zip(out, item.grids.prod(axis=1).tolist(), strict=True):
        frame[count:] = 0


@functools.lru_cache
def _steps(scale: Scale, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What each of `width` values, channels outermost, is multiplied by, and what is subtracted."""
    mean, std = (np.repeat(np.asarray(rgb, np.float32), width // len(rgb)) for rgb in scale)
    return np.float32(1 / 255) / std, mean / std


def largest(items: Sequence[Patches | None]) -> tuple[int, int]:
    """Most frames, and most patches of a frame, among the prompts; (0, 0) if none has any."""
    shapes = [item.values.shape for item in items if item is not None]
    return max((s[0] for s in shapes), default=0), max((s[1] for s in shapes), default=0)


def restride(prompt: Prompt, patches: int) -> np.ndarray:
    """`vision_index` of a prompt whose frames were padded to `patches` patches each.

    The index counts merged tokens over padded frames, so its stride changes with the padding.
    """
    index, frames = prompt.vision_index, prompt.patches
    if frames is None or frames.values.shape[1] == patches:
        return index
    area = merge_area(prompt)
    before, after = frames.values.shape[1] // area, patches // area
    return np.where(index >= 0, index // before * after + index % before, -1).astype(np.int32)


def merge_area(prompt: Prompt) -> int:
    """How many patches make one vision token, counted from a prompt that has frames."""
    assert prompt.patches is not None
    return int(prompt.patches.grids.prod(axis=1).sum()) // int((prompt.vision_index >= 0).sum())


def join_patches(items: Sequence[Patches | None]) -> Patches | None:
    """Frames of all items one after the other, padded to the largest; None if there are none.
    Where pixels of any are elsewhere, they are joined when they are first looked at."""
    present = [item for item in items if item is not None]
    if len(present) < 2:
        return present[0] if present else None
    first, alike = present[0], len({item.scale for item in present}) == 1
    grids, scale = np.concatenate([item.grids for item in present]), first.scale if alike else None
    joined = functools.partial(_joined_values, present, alike)
    if not any(isinstance(item.values, LazyArray) for item in present):
        return Patches(joined(), grids, scale)
    shape = len(grids), largest(present)[1], first.values.shape[2]
    dtype = first.values.dtype if alike else np.dtype(np.float32)
    return Patches(LazyArray(shape, dtype, joined), grids, scale)


def _joined_values(items: Sequence[Patches], alike: bool) -> np.ndarray:
    """Grey levels where all are scaled `alike`, else normalised values."""
    values = [np.asarray(item.values) if alike else normalised(item) for item in items]
    _, patches = largest(items)
    wide = [((0, 0), (0, patches - own.shape[1]), (0, 0)) for own in values]
    return np.concatenate([np.pad(own, sides) for own, sides in zip(values, wide, strict=True)])


def split_patches(patches: Patches, counts: Sequence[int]) -> list[Patches]:
    """The reverse of `join_patches`: items of this many frames each, padded as they are."""
    if len(counts) == 1:
        return [patches]
    ends, values = np.cumsum(counts).tolist(), patches.values
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    take = values.part if isinstance(values, LazyArray) else values.__getitem__
    return [Patches(take(own), patches.grids[own], patches.scale) for own in parts]
