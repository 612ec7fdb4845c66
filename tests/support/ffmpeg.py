"""The ffmpeg program: makes videos for tests, and says independently what is in one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np


def ffmpeg(*arguments: str | Path) -> bytes:
    """Run it, overwriting files; what it writes to standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def numbered(rate: float | str = 10, seconds: float = 4, size: str = "64x48") -> tuple[str, ...]:
    """Arguments for a source whose frames show their number in binary, as 12 bars."""
    bars = "lum=16+219*mod(floor(N/pow(2\\,floor(12*X/W)))\\,2):cb=128:cr=128"
    return "-f", "lavfi", "-i", f"nullsrc=size={size}:rate={rate}:duration={seconds},geq={bars}"


def frame_times(path: Path) -> np.ndarray:
    """When ffmpeg shows each frame, seconds from the first one on, float64 `[n]`."""
    every = ("-map", "0:v:0", "-fps_mode", "passthrough", "-enc_time_base", "demux")
    lines = ffmpeg("-i", path, *every, "-f", "framemd5", "-").decode().splitlines()
    numerator, denominator = next(
        line.split()[-1].split("/") for line in lines if line.startswith("#tb")
    )
    ticks = [int(line.split(",")[2]) for line in lines if not line.startswith("#")]
    return (np.array(ticks) - ticks[0]) * int(numerator) / int(denominator)


def frame_pixels(path: Path, height: int, width: int) -> np.ndarray:
    """What ffmpeg shows, uint8 `[n, height, width, 3]`."""
    every = ("-map", "0:v:0", "-fps_mode", "passthrough")
    raw = ffmpeg("-i", path, *every, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)
