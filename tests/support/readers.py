"""Videos without files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from paravt_jax.records import Frames, VideoRef


@dataclasses.dataclass(frozen=True)
class StillReader:
    """Frames of one shade."""

    size: tuple[int, int] = (32, 32)
    """Height and width in pixels."""
    seconds: float = 1.0
    """From one frame to the next."""
    shade: Callable[[VideoRef, int], int] = lambda video, count: 128
    """Of a video shown with so many frames."""
    clip_frames: int = 0
    """Frames of every clip; 0: nobody asks for one."""

    def overview(self, video: VideoRef, count: int) -> Frames:
        pixels = np.full((count, *self.size, 3), self.shade(video, count), np.uint8)
        return Frames(pixels, np.arange(count) * self.seconds)

    def clip(self, video: VideoRef, start: float, end: float, tokens: int | None = None) -> Frames:
        assert self.clip_frames, "nobody asks for a clip here"
        return self.overview(video, self.clip_frames)

    def frames_at(self, video: VideoRef, times: Sequence[float]) -> Frames:
        return self.overview(video, len(times))
