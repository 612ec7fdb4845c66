"""Which frames of a video a protocol shows, and how large."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import numpy as np

from paravt_jax.ranges import above, at_least
from paravt_jax.settings import Refused, Settings


class TooFewFrames(ValueError):
    """The video has fewer frames than the protocol must show, upon which its harness raises."""


@dataclasses.dataclass(frozen=True)
class FrameRules(Settings):
    """How a video is shown."""

    form: Literal["video", "images"] = "video"
    """One video of frame pairs with their mean times, or each frame an image."""
    times: bool = False
    """Whether `<t seconds>` stands before each image, as in ParaVT's training. A video always has
    its times."""
    sampling: Literal["linspace", "interior", "fps", "steps", "longvideobench"] = "linspace"
    """`linspace` takes the first and the last frame and others evenly between them (qwen-vl-utils,
    lmms-eval); `interior` takes neither (VLMEvalKit); `fps` is linspace with a number of frames by
    the length of the video; `steps` has a frame each 1/fps seconds from the first one on, and is
    `interior` where these were more than `frames` (VLMEvalKit); `longvideobench` starts equal
    pieces (lmms-eval's `_val_i`)."""
    frames: Annotated[int, at_least(1)] = 32
    """How many; the most with `fps` and `steps`."""
    fps: Annotated[float, above(0)] = 2.0
    """Frames a second; read by the samplings `fps` and `steps` alone."""
    min_frames: Annotated[int, at_least(1)] = 4
    """Fewest with `fps`."""
    multiple: Annotated[int, at_least(1)] = 1
    """Their number is a multiple of this."""
    rounding: Literal["round", "floor"] = "round"
    """How places between frames become indices."""
    too_few: Literal["fewer", "error", "blind"] = "fewer"
    """What becomes of a video with fewer than `frames`: all of them are shown; the sample is an
    error; or no frame is shown and nobody is told (ParaVT's driver)."""
    min_pixels: Annotated[int, at_least(1)] = 784
    """Fewest pixels of a frame."""
    max_pixels: Annotated[int, at_least(1)] = 1605632
    """Most pixels of a frame."""
    total_pixels: Annotated[int, at_least(0)] = 0
    """Most pixels of all frames together; 0: no such limit."""

    def check_together(self) -> None:
        """Raises Refused where limits contradict one another."""
        if self.min_pixels > self.max_pixels:
            raise Refused(self, "{min_pixels} is more than {max_pixels}; lower it")
        if self.times and self.form == "video":
            raise Refused(self, "{times}: a video has its times anyway; leave it out")

    def indices(self, total: int, fps: float) -> list[int]:
        """Indices of the frames shown of a video with `total` frames, `fps` of them a second.

        Raises:
            TooFewFrames: there are too few, and the protocol's harness raises then.
        """
        if self.sampling == "longvideobench":
            return self._pieces(total, fps)
        if self.sampling == "steps" and total / fps * self.fps < self.frames + 1:
            return self._steps(total, fps)
        count = self._by_length(total, fps) if self.sampling == "fps" else self.frames
        if total < count:
            if self.too_few == "error":
                raise TooFewFrames(
                    f"the video has {total} frames and the protocol shows {count}; its harness "
                    "fails here too, choose a protocol that shows fewer"
                )
            if self.too_few == "blind":
                return []
            count = total
        count = count // self.multiple * self.multiple or min(max(count, 1), total)
        if self.sampling in ("interior", "steps"):
            return [int(number * (total / (count + 1))) for number in range(1, count + 1)]
        positions = np.linspace(0, total - 1, count)
        return (positions.round() if self.rounding == "round" else positions).astype(int).tolist()

    def _by_length(self, total: int, fps: float) -> int:
        """qwen-vl-utils' `smart_nframes`: within bounds, and no more than there are."""
        least = -(-self.min_frames // self.multiple) * self.multiple
        most = min(self.frames, total) // self.multiple * self.multiple
        count = int(min(max(total / fps * self.fps, least), most, total))
        return count // self.multiple * self.multiple

    def _steps(self, total: int, fps: float) -> list[int]:
        count = max(int(total / fps * self.fps), 1)
        return [min(int(number * fps / self.fps), total - 1) for number in range(count)]

    def _pieces(self, total: int, fps: float) -> list[int]:
        count = min(self.frames, max(int(total / fps), 1))
        return [int(total / count) * number for number in range(count)]
