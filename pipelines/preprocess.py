"""Frames to patches as Qwen3-VL's vision tower takes them.

Sizes, normalisation and patch order follow the Qwen2-VL image processor of Hugging Face
transformers. Resampling differs: OpenCV's area filter when shrinking and bicubic when
enlarging, instead of torchvision's antialiased bicubic.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os

import cv2
import numpy as np

from paravt_jax.records import Patches


@dataclasses.dataclass(frozen=True)
class FrameSpec:
    """How frames are resized, normalised and cut; defaults are those of Qwen3-VL."""

    patch_size: int = 16
    merge_size: int = 2
    """Side of the block of patches that the merger turns into one vision token."""
    temporal_patch_size: int = 2
    min_pixels: int = 65536
    """Fewest pixels of a resized frame."""
    max_pixels: int = 16777216
    """Most pixels of a resized frame."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @property
    def factor(self) -> int:
        """Sides of a resized frame are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def max_patches(self) -> int:
        """Most patches that a frame can have after resizing, a whole number of merged blocks."""
        return self.max_pixels // self.factor**2 * self.merge_size**2

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: channels x frames x rows x columns."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_folder(cls, folder: str) -> FrameSpec:
        """Read `preprocessor_config.json` of a Hugging Face model folder, or the image part of
        `processor_config.json`, where transformers 5 keeps it.

        Raises:
            ValueError: the file is missing or lacks a field.
        """
        path = os.path.join(folder, "preprocessor_config.json")
        combined = os.path.join(folder, "processor_config.json")
        together = not os.path.exists(path) and os.path.exists(combined)
        path = combined if together else path
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            config = config["image_processor"] if together else config
            return cls(
                patch_size=config["patch_size"],
                merge_size=config["merge_size"],
                temporal_patch_size=config["temporal_patch_size"],
                min_pixels=config["size"]["shortest_edge"],
                max_pixels=config["size"]["longest_edge"],
                mean=tuple(config["image_mean"]),
                std=tuple(config["image_std"]),
            )
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: {error!r}; the folder must hold a Qwen3-VL image processor"
            ) from error

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of a frame of `height x width` after resizing.

        Multiples of `factor`, between `min_pixels` and `max_pixels` in area, the aspect ratio
        kept as well as that allows (`smart_resize` of the Qwen2-VL image processor).

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        if max(height, width) > 200 * min(height, width):
            raise ValueError(f"frame of {height}x{width}: sides differ by more than 200 times")
        rows, columns = (round(side / self.factor) * self.factor for side in (height, width))
        if rows * columns > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rows, columns = (
                max(self.factor, math.floor(side / shrink / self.factor) * self.factor)
                for side in (height, width)
            )
        elif rows * columns < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rows, columns = (
                math.ceil(side * grow / self.factor) * self.factor for side in (height, width)
            )
        return rows, columns

    def resize(self, frame: np.ndarray) -> np.ndarray:
        """Resize one uint8 frame `[h, w, 3]` to its target size."""
        height, width = frame.shape[:2]
        rows, columns = self.target_size(height, width)
        if (rows, columns) == (height, width):
            return frame
        shrinking = rows * columns < height * width
        how = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
        return cv2.resize(frame, (columns, rows), interpolation=how)


def to_patches(frames: np.ndarray, spec: FrameSpec, as_video: bool = False) -> Patches:
    """Cut uint8 frames `[f, h, w, 3]` into normalised patches in merge-block order.

    A patch spans `temporal_patch_size` frames. As images, each frame is repeated that often
    and stays a frame of its own; as video, that many neighbours form one, the last frame
    being repeated to fill up the last.

    Returns:
        Patches with values `[f', p, c]`: `f' = f` as images, `ceil(f / temporal)` as video.
    """
    resized = np.stack([spec.resize(frame) for frame in frames])
    groups = _temporal_groups(resized, spec.temporal_patch_size, as_video)
    values = _normalise(_blocks(groups, spec), spec)
    rows, columns = (side // spec.patch_size for side in resized.shape[1:3])
    grids = np.full((len(groups), 2), (rows, columns), np.int32)
    return Patches(values.reshape(len(groups), rows * columns, spec.patch_values), grids)


def _temporal_groups(frames: np.ndarray, size: int, as_video: bool) -> np.ndarray:
    """uint8 `[f', temporal, h, w, 3]`."""
    if not as_video:
        return np.repeat(frames[:, None], size, axis=1)
    padding = np.repeat(frames[-1:], -len(frames) % size, axis=0)
    filled = np.concatenate([frames, padding])
    return filled.reshape(-1, size, *frames.shape[1:])


def _blocks(groups: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """Order: block row, block column, row and column in the block, channel, time, y, x."""
    count, times, height, width, channels = groups.shape
    patch, merge = spec.patch_size, spec.merge_size
    split = groups.reshape(
        count,
        times,
        height // spec.factor,
        merge,
        patch,
        width // spec.factor,
        merge,
        patch,
        channels,
    )
    return split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)


def _normalise(blocks: np.ndarray, spec: FrameSpec) -> np.ndarray:
    """(x / 255 - mean) / std on blocks whose fourth axis from the end is the channel.

    In place on one float array: temporaries of this size cost more than the arithmetic.
    """
    mean, std = (np.asarray(v, np.float32)[:, None, None, None] for v in (spec.mean, spec.std))
    values = np.ascontiguousarray(blocks).astype(np.float32)
    values *= np.float32(1 / 255) / std
    values -= mean / std
    return values
