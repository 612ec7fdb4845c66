"""Small videos as files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from pipelines.decode import VideoInfo


def write_video(
    path: str | Path,
    shade: int = 0,
    frames: int = 32,
    rate: float = 4.0,
    size: tuple[int, int] = (64, 64),
) -> None:
    """An mp4 of one slowly changing colour, `size` wide and high, with `rate` frames a second."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), (shade, 4 * number % 256, 80), np.uint8))
    writer.release()


def steady(frames: int, fps: float, height: int = 1, width: int = 1) -> VideoInfo:
    """A stream of frames that follow one another at a constant rate."""
    return VideoInfo(np.arange(frames) / fps, frames / fps, height, width)
