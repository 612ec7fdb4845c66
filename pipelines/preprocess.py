"""Frames to patches as Qwen3-VL's vision tower takes them.

Sizes, resampling, normalisation and patch order are those of Hugging Face transformers: of the
Qwen2-VL image processor where frames are images of their own, of the Qwen3-VL video processor
where they are a video. `tests/parity/test_preprocessing.py` compares them.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import math
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from paravt_jax.records import Patches
from pipelines.arrays import Blocks, Picture, Pixels, Runs

# Frames longer than this many times their width, or the reverse, are refused.
MOST_SLENDER = 200

TOGETHER = "processor_config.json"
"""Where transformers 5 keeps the settings of all processors of a folder."""
OUTER, EACH = "outer", "each"
MARKS = {OUTER: "transformers>=5.10", EACH: "transformers<5.10"}
"""Where vision marks stand in a video, and who writes them so: around each pair of frames, and
`outer`: around the whole video besides. As the processors of 5.0, 5.9, 5.10 and 5.23 do."""

# Not `Self`: beartype, which checks shapes method by method, knows no class to put in its place.
Spec = TypeVar("Spec", bound="FrameSpec")


@dataclasses.dataclass(frozen=True)
class FrameSpec(abc.ABC):
    """How the frames of an overview or a crop are resized, grouped, normalised and cut.

    What images and videos have in common; defaults are those of Qwen3-VL.
    """

    patch_size: int = 16
    merge_size: int = 2
    """Side of the block of patches that the merger turns into one vision token."""
    temporal_patch_size: int = 2
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    mode: ClassVar[str]
    """What frames are to the model: `image` or `video`."""
    _file: ClassVar[str]
    _part: ClassVar[str]

    @property
    def factor(self) -> int:
        """Sides of a resized frame are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch: channels x frames x rows x columns."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def max_patches(self) -> int:
        """Most patches that a frame has after resizing, a whole number of merged blocks.

        Slivers and frames that `min_pixels` enlarges may exceed it by the rounding of their sides.
        """
        return self._most_frame_pixels() // self.factor**2 * self.merge_size**2

    @classmethod
    def from_folder(cls: type[Spec], folder: str) -> Spec:
        """Read a Hugging Face model folder: `preprocessor_config.json` for images,
        `video_preprocessor_config.json` for videos, or the part of `processor_config.json`
        in which transformers 5 keeps either.

        Raises:
            ValueError: the file is missing, lacks a field or holds a value that has no meaning.
        """
        path = os.path.join(folder, cls._file)
        combined = os.path.join(folder, TOGETHER)
        together = not os.path.exists(path) and os.path.exists(combined)
        path = combined if together else path
        try:
            with open(path, encoding="utf-8") as file:
                config = json.load(file)
            return cls._from_config(config[cls._part] if together else config)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {error!r}; the folder must hold a Qwen3-VL {cls.mode} processor"
            ) from error

    @classmethod
    def limit_folder(
        cls, folder: str, pixels: tuple[int, int], more: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Write limits for the pixels of a frame (see `limited`) over the settings of a folder's
        processor, wherever it keeps them, so that transformers resizes frames as we do.

        Settings that a folder lacks, or that cannot be read, stay as they are.

        Args:
            folder: a Hugging Face model folder.
            pixels: fewest and most pixels of a frame.
            more: further settings to write beside them.
        """
        for name, part in ((cls._file, None), (TOGETHER, cls._part)):
            path = os.path.join(folder, name)
            try:
                with open(path, encoding="utf-8") as file:
                    whole = json.load(file)
                settings = whole if part is None else whole[part]
                limits = cls._from_config(settings).limited(*pixels)._settings()
            except (OSError, KeyError, TypeError, ValueError):
                continue
            for overruling in ("min_pixels", "max_pixels"):  # of transformers 4
                settings.pop(overruling, None)
            settings.update({**limits, **more})
            with open(path, "w", encoding="utf-8") as file:
                json.dump(whole, file, indent=2)

    @classmethod
    def _from_config(cls: type[Spec], config: dict[str, Any]) -> Spec:
        size = {f"size.{name}": config["size"][name] for name in ("shortest_edge", "longest_edge")}
        sides = {name: config[name] for name in ("patch_size", "merge_size", "temporal_patch_size")}
        for name, value in (sides | size).items():
            if type(value) is not int or value < (name != "size.shortest_edge"):
                raise ValueError(f"{name}={value!r} is no number of pixels, patches or frames")
        return cls(
            patch_size=config["patch_size"],
            merge_size=config["merge_size"],
            temporal_patch_size=config["temporal_patch_size"],
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            **cls._limits(config),
        )

    @classmethod
    @abc.abstractmethod
    def _limits(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The fields about numbers of pixels, from a processor's settings."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The limits as settings of a processor, as far as those can say it."""

    @abc.abstractmethod
    def _most_frame_pixels(self) -> int:
        """Most pixels of one resized frame, whatever the number of frames."""

    @abc.abstractmethod
    def limited(self, min_pixels: int, max_pixels: int) -> FrameSpec:
        """This specification, with other limits for the pixels of one frame."""

    @abc.abstractmethod
    def target_size(self, height: int, width: int, count: int = 1) -> tuple[int, int]:
        """Height and width in pixels of each of `count` frames of `height x width` after resizing.

        Multiples of `factor`, within the limits on pixels, the aspect ratio kept as well as
        that allows.

        Raises:
            ValueError: one side is more than 200 times the other.
        """

    @abc.abstractmethod
    def group(self, frames: Pixels) -> Runs:
        """Frames in the runs that patches span."""

    @abc.abstractmethod
    def group_count(self, frames: int) -> int:
        """How many runs `group` makes of so many frames: what the vision tower sees as frames."""

    @abc.abstractmethod
    def _least_frame_pixels(self) -> int:
        """Fewest pixels of one resized frame."""

    def frames_within(self, tokens: int) -> int:
        """Most frames that `tokens` vision tokens can show, each of them at its least size."""
        least = max(-(-self._least_frame_pixels() // self.factor**2), 1)
        runs = max(tokens // least, 1)
        return runs * max(n for n in (1, self.temporal_patch_size) if self.group_count(n) == 1)

    def size_within(self, height: int, width: int, count: int, tokens: int) -> tuple[int, int]:
        """As `target_size`, for `count` frames that share a quota of `tokens` vision tokens.

        Each frame, or run of frames that patches span, gets the same share. Slivers may exceed
        theirs by the rounding of their sides. As in Video-o3's crops (arXiv 2601.23224).

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        _check_aspect(height, width)
        share = max(tokens // self.group_count(count), 1) * self.factor**2
        most = min(share, self._most_frame_pixels())
        return _fit(height, width, self.factor, (min(self._least_frame_pixels(), most), most))

    def resize(self, frames: Pixels) -> UInt8[np.ndarray, "f rows columns 3"]:
        """Resize the frames of one overview or crop to their target size.

        To be done once: the target size of frames of a target size may be another one.
        """
        count, height, width = frames.shape[:3]
        size = self.target_size(height, width, count)
        return np.stack([resize(frame, size) for frame in frames])


@dataclasses.dataclass(frozen=True)
class ImageSpec(FrameSpec):
    """Each frame is an image of its own (transformers' `Qwen2VLImageProcessor`)."""

    min_pixels: int = 65536
    """Fewest pixels of a resized frame."""
    max_pixels: int = 16777216
    """Most pixels of a resized frame."""

    mode: ClassVar[str] = "image"
    _file: ClassVar[str] = "preprocessor_config.json"
    _part: ClassVar[str] = "image_processor"

    @classmethod
    def _limits(cls, config: dict[str, Any]) -> dict[str, Any]:
        size = config["size"]
        return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}

    def _settings(self) -> dict[str, Any]:
        return {"size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}}

    def _most_frame_pixels(self) -> int:
        return self.max_pixels

    def _least_frame_pixels(self) -> int:
        return self.min_pixels

    def limited(self, min_pixels: int, max_pixels: int) -> ImageSpec:
        """Other limits for the pixels of a frame."""
        return dataclasses.replace(self, min_pixels=min_pixels, max_pixels=max_pixels)

    def target_size(self, height: int, width: int, count: int = 1) -> tuple[int, int]:
        """See `FrameSpec`; the number of frames does not matter."""
        _check_aspect(height, width)
        return _fit(height, width, self.factor, (self.min_pixels, self.max_pixels))

    def group(self, frames: Pixels) -> Runs:
        """Each frame, repeated as often as a patch is long."""
        return np.repeat(frames[:, None], self.temporal_patch_size, axis=1)

    def group_count(self, frames: int) -> int:
        """One for each frame."""
        return frames


@dataclasses.dataclass(frozen=True)
class VideoSpec(FrameSpec):
    """Frames are a video, whose frames share one budget (`Qwen3VLVideoProcessor`).

    The processor's own limits count the pixels of all frames together: many frames are smaller
    than few. `limited` adds limits for each frame.
    """

    min_pixels: int = 4096
    """Fewest pixels of all resized frames together."""
    max_pixels: int = 25165824
    """Most pixels of all resized frames together."""
    min_frame_pixels: int = 0
    """Fewest pixels of one frame."""
    max_frame_pixels: int | None = None
    """Most pixels of one frame, but never below 1.05 `min_pixels`; None lets few frames use up the
    budget of all. The processor's `max_video_tokens`, if it has `cap_pixels_per_frame`."""
    marks: str = OUTER
    """Where vision marks stand, one of `MARKS`. `video_marks` in the settings that we write."""

    mode: ClassVar[str] = "video"
    _file: ClassVar[str] = "video_preprocessor_config.json"
    _part: ClassVar[str] = "video_processor"

    @classmethod
    def _limits(cls, config: dict[str, Any]) -> dict[str, Any]:
        size, cap = config["size"], None
        if config.get("cap_pixels_per_frame"):
            merged = (config["patch_size"] * config["merge_size"]) ** 2
            cap = config.get("max_video_tokens", 768) * merged
        return {
            "min_pixels": size["shortest_edge"],
            "max_pixels": size["longest_edge"],
            "max_frame_pixels": cap,
            "marks": config.get("video_marks", OUTER),
        }

    def __post_init__(self) -> None:
        if self.marks not in MARKS:
            raise ValueError(
                f"video_marks={self.marks!r} is unknown; choose one of {', '.join(MARKS)}"
            )

    def _settings(self) -> dict[str, Any]:
        """A processor has no least size of a frame. What comes closest is that of the shortest
        clip for all frames together, as far as that leaves the most of a frame as it is; the most
        is told in whole vision tokens."""
        assert self.max_frame_pixels is not None, "limits are written by limit_folder"
        tokens = max(self.max_frame_pixels // self.factor**2, 1)
        shortest = max(self.min_pixels, self.temporal_patch_size * self.min_frame_pixels)
        least = min(shortest, int(tokens * self.factor**2 / 1.05))
        return {
            "size": {"shortest_edge": least, "longest_edge": self.max_pixels},
            "cap_pixels_per_frame": True,
            "max_video_tokens": tokens,
        }

    def _most_frame_pixels(self) -> int:
        # The fewest frames share the budget best; above them, what decides is by how much
        # `_depth` falls short of the count, most at 5 frames counted as 4.
        counts = range(self.temporal_patch_size, 4 * self.temporal_patch_size)
        return max(self._budget(count)[1] // self._depth(count) for count in counts)

    def _least_frame_pixels(self) -> int:
        return self.min_frame_pixels

    def limited(self, min_pixels: int, max_pixels: int) -> VideoSpec:
        """Limits for the pixels of a frame: `min_pixels` instead of the processor's fewest pixels
        of all frames, `max_pixels` within its most pixels of all frames."""
        return dataclasses.replace(
            self, min_pixels=0, min_frame_pixels=min_pixels, max_frame_pixels=max_pixels
        )

    def target_size(self, height: int, width: int, count: int = 1) -> tuple[int, int]:
        """See `FrameSpec`. A lone frame, which the processor refuses, counts as a pair of it."""
        count = max(count, self.temporal_patch_size)
        if min(height, width) < self.factor:
            scale = self.factor / min(height, width)
            height, width = int(height * scale), int(width * scale)
        _check_aspect(height, width)
        return _fit(height, width, self.factor, self._budget(count), count, self._depth(count))

    def group(self, frames: Pixels) -> Runs:
        """Neighbours form one patch, the last frame being repeated to fill up the last."""
        size = self.temporal_patch_size
        padding = np.repeat(frames[-1:], -len(frames) % size, axis=0)
        return np.concatenate([frames, padding]).reshape(-1, size, *frames.shape[1:])

    def group_count(self, frames: int) -> int:
        """One for each `temporal_patch_size` frames or part thereof."""
        return -(-frames // self.temporal_patch_size)

    def _budget(self, count: int) -> tuple[int, int]:
        """Fewest and most pixels of `count` frames together."""
        least, most = max(self.min_pixels, count * self.min_frame_pixels), self.max_pixels
        if self.max_frame_pixels is not None:
            share = min(self.max_frame_pixels, most // count)
            most = count * max(share, int(1.05 * self.min_pixels))
        return least, most

    def _depth(self, count: int) -> int:
        """Number of frames for the comparison with the budget, a multiple of a patch's length."""
        return round(count / self.temporal_patch_size) * self.temporal_patch_size


SPECS: dict[str, type[FrameSpec]] = {spec.mode: spec for spec in (ImageSpec, VideoSpec)}
"""How frames are shown to the model, by name."""


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) > MOST_SLENDER * min(height, width):
        raise ValueError(
            f"frame of {height}x{width}: sides differ by more than {MOST_SLENDER} times; "
            "crop the video"
        )


def _fit(
    height: int, width: int, factor: int, budget: tuple[int, int], count: int = 1, depth: int = 1
) -> tuple[int, int]:
    """Sides rounded to `factor`, then shrunk or enlarged to a budget of pixels (`smart_resize`).

    As in the processors, whether the budget is kept is asked for `depth` frames, but the scale
    that keeps it is computed for `count` of them.
    """
    least, most = budget
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if depth * rows * columns > most:
        shrink = math.sqrt(count * height * width / most)
        rows, columns = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif depth * rows * columns < least:
        grow = math.sqrt(least / (count * height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resize(frame: Picture, size: tuple[int, int]) -> UInt8[np.ndarray, "rows columns 3"]:
    """Resize one frame to (height, width); the same array if it has that size.

    Pillow's bicubic filter, widened when shrinking: what torchvision calls antialiased. The
    two round differently: 0.5 % of the values are one grey level apart.
    """
    if frame.shape[:2] == size:
        return frame
    rows, columns = size
    image, how = Image.fromarray(frame), Image.Resampling.BICUBIC
    # Along rows first, always, as torchvision does. Left to itself Pillow takes the cheaper order,
    # which clips other overshoots in between: up to 27 grey levels at hard edges.
    image = image.resize((columns, image.height), how).resize((columns, rows), how)
    return np.asarray(image)


def to_patches(frames: Pixels, spec: FrameSpec) -> Patches:
    """Cut resized frames into patches in merge-block order, to be normalised by their `scale`.

    Returns:
        Patches with values `[f', p, c]`: `f' = f` as images, `ceil(f / temporal)` as video.

    Raises:
        ValueError: the sides are no multiples of `spec.factor`.
    """
    height, width = frames.shape[1:3]
    if height % spec.factor or width % spec.factor:
        raise ValueError(
            f"frames of {height}x{width}: sides must be multiples of {spec.factor}; read them with "
            "VideoReader(spec=...), or resize them with spec.resize(frames)"
        )
    groups = spec.group(frames)
    rows, columns = height // spec.patch_size, width // spec.patch_size
    grids = np.full((len(groups), 2), (rows, columns), np.int32)
    values = _blocks(groups, spec).reshape(len(groups), rows * columns, spec.patch_values)
    return Patches(values, grids, (spec.mean, spec.std))


def from_patches(patches: Patches, spec: FrameSpec, count: int) -> list[Picture]:
    """The first `count` frames of what `to_patches` made: what the model saw. Frames of several
    videos may differ in size."""
    merge, patch, times = spec.merge_size, spec.patch_size, spec.temporal_patch_size
    shown = times if spec.group_count(times) == 1 else 1
    frames: list[Picture] = []
    for run, (rows, columns) in zip(
        np.asarray(patches.values), patches.grids[: -(-count // shown)], strict=False
    ):
        blocks = run[: rows * columns].reshape(
            *(rows // merge, columns // merge, merge, merge, 3, times, patch, patch)
        )
        pixels = blocks.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(
            times, rows * patch, columns * patch, 3
        )
        frames += list(pixels[:shown])
    return frames[:count]


def _blocks(groups: Runs, spec: FrameSpec) -> Blocks:
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
