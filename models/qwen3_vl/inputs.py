"""What a Hugging Face processor returns, as the policy takes it (host side, numpy)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int

from models.qwen3_vl.config import Qwen3VLConfig
from paravt_jax.pytrees import ArrayLike, pytree
from paravt_jax.rope_index import mrope_positions, vision_index


@pytree
@dataclasses.dataclass(frozen=True)
class PolicyInputs:
    """A batch of prompts, right-padded, with the frames of each."""

    tokens: Int[ArrayLike, "b t"]
    positions: Int[ArrayLike, "b t 3"]
    vision_index: Int[ArrayLike, "b t"]
    """-1 for text."""
    places: Int[ArrayLike, "b t"]
    """Column of each token in the caller's `input_ids`; -1 for padding."""
    patches: Float[ArrayLike, "b f p c"] | None
    """None without any frame."""
    grids: Int[ArrayLike, "b f 2"] | None


def from_processor(
    config: Qwen3VLConfig,
    input_ids: np.ndarray,
    attention_mask: np.ndarray | None = None,
    pixel_values: np.ndarray | None = None,
    image_grid_thw: np.ndarray | None = None,
    pixel_values_videos: np.ndarray | None = None,
    video_grid_thw: np.ndarray | None = None,
    size: Callable[[int], int] = int,
) -> PolicyInputs:
    """Split videos into frames, deal images and frames to their rows, pad on the right.

    `size` rounds up the numbers of tokens, of frames and of merged blocks per frame, so that
    inputs of similar size get one shape (`paravt_jax.shapes.bucket`).

    Raises:
      ValueError: pixels without grids, a patch count that does not fit its grids, or vision
        tokens that do not match the frames.
    """
    ids = np.asarray(input_ids)
    mask = np.ones(ids.shape, bool) if attention_mask is None else np.asarray(attention_mask) > 0
    supply = {
        config.image_token_id: _frames(config, "pixel_values", pixel_values, image_grid_thw),
        config.video_token_id: _frames(
            config, "pixel_values_videos", pixel_values_videos, video_grid_thw
        ),
    }
    rows = [_deal(row[keep], supply, config) for row, keep in zip(ids, mask, strict=True)]
    if any(next(frames, None) is not None for frames in supply.values()):
        raise ValueError(
            "input_ids hold fewer vision tokens than the pixels make: pass the "
            "input_ids that the processor returned with these pixels"
        )
    return _pad(rows, mask, config, size)


Frame = tuple[np.ndarray, tuple[int, int]]
"""Patches `[p, c]` of one frame, and its rows and columns."""


def _frames(
    config: Qwen3VLConfig, name: str, pixels: np.ndarray | None, grid_thw: np.ndarray | None
) -> Iterator[Frame]:
    """The frames of all images or all videos, in order."""
    if (pixels is None) != (grid_thw is None):
        raise ValueError(f"{name} and its grid_thw belong together: pass both or neither")
    if pixels is None:
        return iter(())
    grids = np.repeat(np.asarray(grid_thw)[:, 1:], np.asarray(grid_thw)[:, 0], axis=0)
    ends = np.cumsum(grids.prod(axis=1))
    shape = (int(ends[-1]) if len(ends) else 0, config.vision.patch_values)
    if pixels.shape != shape:
        raise ValueError(
            f"{name} has shape {pixels.shape}, its grid_thw and the config say "
            f"{shape}: pass what the processor of this model returned"
        )
    parts = np.split(np.asarray(pixels, np.float32), ends[:-1])
    return iter([(part, (int(r), int(c))) for part, (r, c) in zip(parts, grids, strict=True)])


def _deal(
    tokens: np.ndarray, supply: dict[int, Iterator[Frame]], config: Qwen3VLConfig
) -> tuple[np.ndarray, list[Frame]]:
    """The frames of one row, in the order of its vision tokens."""
    frames, at = [], 0
    where = np.flatnonzero(np.isin(tokens, list(supply)))
    while at < len(where):
        frame = next(supply[int(tokens[where[at]])], None)
        if frame is None:
            raise ValueError(
                "input_ids hold more vision tokens than the pixels make: pass the "
                "pixels that the processor returned with these input_ids"
            )
        frames.append(frame)
        at += len(frame[0]) // config.vision.spatial_merge_size**2
    return tokens, frames


def _pad(
    rows: list[tuple[np.ndarray, list[Frame]]],
    mask: np.ndarray,
    config: Qwen3VLConfig,
    size: Callable[[int], int],
) -> PolicyInputs:
    merge, kinds = config.vision.spatial_merge_size, (config.image_token_id, config.video_token_id)
    b, t, block = len(rows), size(mask.shape[1]), merge**2
    f = max(len(frames) for _, frames in rows)
    p = max((len(values) for _, frames in rows for values, _ in frames), default=0)
    f, p = size(f) if f else 0, size(p // block) * block
    patches = np.zeros((b, f, p, config.vision.patch_values), np.float32)
    grids = np.zeros((b, f, 2), np.int32)
    tokens, places = np.zeros((b, t), np.int32), np.full((b, t), -1, np.int32)
    positions, index = np.zeros((b, t, 3), np.int32), np.full((b, t), -1, np.int32)
    for i, (row, frames) in enumerate(rows):
        for j, (values, grid) in enumerate(frames):
            patches[i, j, : len(values)], grids[i, j] = values, grid
        sizes, visual, n = grids[i, : len(frames)], np.isin(row, kinds), len(row)
        tokens[i, :n], places[i, :n] = row, np.flatnonzero(mask[i])
        positions[i, :n] = mrope_positions(visual, sizes, merge)
        index[i, :n] = vision_index(visual, sizes, merge, p)
    return PolicyInputs(
        tokens, positions, index, places, patches if f else None, grids if f else None
    )
