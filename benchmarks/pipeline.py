"""Reading videos against plain OpenCV, and whether reading keeps the learner fed.

    python benchmarks/pipeline.py read [--video FILE]   64 frames of a 30-minute H.264 file
    python benchmarks/pipeline.py feed [--steps 5]      share of the demo's steps spent waiting

`--clock cpu` measures processor time of all threads, for a machine that others use.
`read` makes its file with ffmpeg (two minutes) unless one is given. Both sides run in one process,
in turns; median and spread (smallest to largest) of `--repeats` runs. Plain OpenCV knows nothing of
the file: it is given the times, takes what it lands on, and is the fastest of several ways
to use it. Ours lists the packets, checks the end of the file and the time of every frame.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from pipelines.decode import probe, video_ref
from pipelines.video import VideoReader

FRAMES = 64
ROOT = Path(__file__).resolve().parents[1]
Way = Callable[[str, np.ndarray], np.ndarray]
"""Frames of a file at times, RGB `[n, h, w, 3]`."""


def jump(path: str, times: np.ndarray, *options: int) -> np.ndarray:
    """Plain OpenCV: set the position, read."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, list(options))
    frames = []
    for moment in times:
        capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * moment)
        frames.append(cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def jump_alone(path: str, times: np.ndarray) -> np.ndarray:
    """As `jump`, without FFmpeg's own threads."""
    return jump(path, times, cv2.CAP_PROP_N_THREADS, 1)


def walk(path: str, times: np.ndarray) -> np.ndarray:
    """Plain OpenCV: decode everything, keep what is wanted."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    frames = []
    for moment in times:
        while capture.grab() and capture.get(cv2.CAP_PROP_POS_MSEC) < 1000 * moment - 1:
            pass
        frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return np.stack(frames)


def ours(path: str, times: np.ndarray) -> np.ndarray:
    """A reader that has not seen the file before."""
    return VideoReader().overview(video_ref(path), len(times)).pixels


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What is measured."""


def seconds(way: Way, path: str, times: np.ndarray, clock: str) -> float:
    """How long one run takes."""
    began = CLOCKS[clock]()
    way(path, times)
    return CLOCKS[clock]() - began


def read(path: str, repeats: int, clock: str) -> None:
    """Time our reader and the fastest plain way, and compare their frames."""
    info = probe(path)
    times = info.times[np.linspace(0, info.frames - 1, FRAMES).round().astype(int)]
    plain = {way.__name__: seconds(way, path, times, clock) for way in (jump, jump_alone, walk)}
    print("plain OpenCV, seconds:", {name: round(value, 2) for name, value in plain.items()})
    fastest: Way = globals()[min(plain, key=lambda name: plain[name])]
    same = np.array_equal(fastest(path, times), ours(path, times))
    pairs = [
        (seconds(ours, path, times, clock), seconds(fastest, path, times, clock))
        for _ in range(repeats)
    ]
    mine, theirs = zip(*pairs, strict=True)
    print(f"same frames: {same}")
    print(f"ours {summary(mine)} s, {fastest.__name__} {summary(theirs)} s")
    print(f"ratio {summary([a / b for a, b in pairs])}")


def summary(values: list[float] | tuple[float, ...]) -> str:
    """Median and spread."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def make_video(path: str) -> None:
    """30 minutes of 640x360 at 30 frames per second, key frames every 250 (x264's own choice)."""
    import imageio_ffmpeg  # of the development requirements

    source = "testsrc2=size=640x360:rate=30:duration=1800"
    encoder = ("-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p")
    command = (imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "lavfi", "-i", source)
    subprocess.run([*command, *encoder, path], check=True)


def feed(steps: int, more: list[str]) -> None:
    """Run steps of the demo and print the share of each after the first that data was waited for.

    The first step waits for the first prompts of all, which nothing could hide.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--steps", str(steps), "--workdir", folder, "--set", "evaluation.rows=0", *more]
        command = [sys.executable, str(ROOT / "train" / "main.py"), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][1:]
    waits = [100 * record["data/wait"] for record in records]
    spent = [record["time/step"] for record in records]
    print(f"waiting for data {summary(waits)} % of steps of {summary(spent)} s")


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("read", "feed"))
    parser.add_argument("--video", help="file to read instead of a new one")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    args, more = parser.parse_known_args()
    if args.what == "feed":
        return feed(args.steps, more)
    if args.video:
        return read(args.video, args.repeats, args.clock)
    with tempfile.TemporaryDirectory() as folder:
        make_video(f"{folder}/long.mp4")
        read(f"{folder}/long.mp4", args.repeats, args.clock)
    return None


if __name__ == "__main__":
    main()
