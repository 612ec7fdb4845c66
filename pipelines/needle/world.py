"""Synthetic videos with short events, written as real mp4 files.

A video is a noisy grey gradient in which, once or twice, a coloured shape shows up for a
few seconds. A sparse overview mostly misses it; a crop of the right window shows it.
Everything follows from the parameters and the index of the video, so ground truth is never
stored: it is drawn again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile

import cv2
import numpy as np

from paravt_jax.records import VideoRef
from pipelines.arrays import Coverage, Greys, Pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 220),
    "yellow": (230, 220, 30),
    "purple": (150, 40, 180),
    "white": (245, 245, 245),
}
"""RGB of each colour."""
SHAPES = ("circle", "square", "triangle", "cross")
SPLITS = ("train", "held_out", "test")
"""Settings are compared on `held_out`. Figures to report are of `test`, on which no recipe, no
curriculum and no reward is tuned."""
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class NeedleWorld:
    """Parameters of the world; equal parameters give equal videos."""

    seed: int = 0
    train_videos: int = 2000
    held_out_videos: int = 256
    """Of `held_out`, and as many of `test`."""
    duration: int = 64
    """Seconds, and frames: videos have one frame per second."""
    window: int = 16
    """Seconds of a window; events keep to one window each. Divides the duration."""
    size: int = 32
    """Height and width of a frame in pixels."""
    events: tuple[int, int] = (1, 2)
    """Least and most events of a video."""
    visible: tuple[int, int] = (4, 6)
    """Least and most seconds for which an event is visible."""
    object_size: tuple[int, int] = (22, 26)
    """Least and most width of a shape in pixels."""
    centre: tuple[int, int] = (15, 17)
    """Least and most coordinate of a shape's centre, both axes."""
    noise: float = 5.0
    """Standard deviation of the grey noise of each pixel, in grey levels."""
    tilt: float = 40.0
    """Grey levels by which the background changes from one end of a frame to the other."""

    def __post_init__(self) -> None:
        if self.duration % self.window:
            raise ValueError(
                f"window={self.window} must divide duration={self.duration}: windows tile the video"
            )
        if not 1 <= self.events[0] <= self.events[1] <= min(self.duration // self.window, 4):
            raise ValueError(f"events={self.events}: 1 <= least <= most <= windows, and at most 4")
        if not 1 <= self.visible[0] <= self.visible[1] <= self.window:
            raise ValueError(f"visible={self.visible}: 1 <= least <= most <= window={self.window}")

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """The aligned windows (start, end) in seconds that tile the video."""
        return tuple((s, s + self.window) for s in range(0, self.duration, self.window))

    def count(self, split: str) -> int:
        """Number of videos of a split.

        Raises:
            ValueError: the split does not exist.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
        return self.train_videos if split == "train" else self.held_out_videos


@dataclasses.dataclass(frozen=True)
class Event:
    """One coloured shape that shows up for a while."""

    colour: str
    shape: str
    start: int
    """First second at which it is visible."""
    end: int
    """Second at which it is gone: the last visible second + 1."""
    size: int
    x: int
    y: int

    @property
    def name(self) -> str:
        """Colour and shape: `red circle`."""
        return f"{self.colour} {self.shape}"

    def visible(self, start: float, end: float) -> tuple[int, int] | None:
        """The part of the event inside the window [start, end), None if there is none."""
        first, last = max(self.start, int(np.ceil(start))), min(self.end, int(np.ceil(end)))
        return (first, last) if first < last else None


@dataclasses.dataclass(frozen=True)
class NeedleVideo:
    """A video of the world with its ground truth."""

    name: str
    """`split/index`."""
    video: VideoRef
    events: tuple[Event, ...]
    """In order of time; no two share a colour or a shape."""


def draw_events(world: NeedleWorld, split: str, index: int) -> tuple[Event, ...]:
    """Draw the events of one video, in order of time."""
    rng = _rng(world, split, index, 0)
    count = int(rng.integers(world.events[0], world.events[1] + 1))
    windows = np.sort(rng.choice(len(world.windows), count, replace=False))
    colours = rng.choice(list(COLOURS), count, replace=False)
    shapes = rng.choice(SHAPES, count, replace=False)
    events = []
    for window, colour, shape in zip(windows, colours, shapes, strict=True):
        length = int(rng.integers(world.visible[0], world.visible[1] + 1))
        start = world.windows[window][0] + int(rng.integers(world.window - length + 1))
        size = int(rng.integers(world.object_size[0], world.object_size[1] + 1))
        x, y = (int(v) for v in rng.integers(world.centre[0], world.centre[1] + 1, 2))
        events.append(Event(str(colour), str(shape), start, start + length, size, x, y))
    return tuple(events)


def draw_frames(world: NeedleWorld, split: str, index: int) -> Pixels:
    """Draw one video: a square frame each second."""
    rng = _rng(world, split, index, 1)
    shape = (world.duration, world.size, world.size)
    grey = _background(world, rng) + world.noise * rng.standard_normal(shape, np.float32)
    frames = np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    for event in draw_events(world, split, index):
        cover = _cover(event, world.size)[..., None].astype(np.uint16)
        part = frames[event.start : event.end]
        ink = cover * np.asarray(COLOURS[event.colour], np.uint16)
        part[:] = (part * (255 - cover) + ink) // 255
    return frames


def build(world: NeedleWorld, folder: str) -> str:
    """Write all videos of the world below `folder`, unless they are there already.

    The folder appears under its final name only when complete, so an interrupted run leaves
    nothing that looks finished.

    Returns:
        Folder of this world: `folder/needle-FINGERPRINT`, with one folder per split.
    """
    parameters = dataclasses.asdict(world)
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()
    target = os.path.join(os.path.abspath(folder), f"needle-{digest[:12]}")
    if _complete(world, target):
        return target
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".needle-") as scratch:
        made = os.path.join(scratch, "world")
        for split in SPLITS:
            _write_split(world, split, made)
        with open(os.path.join(made, MANIFEST), "w", encoding="utf-8") as file:
            json.dump(parameters, file, indent=1)
        _move(world, made, target)
    return target


def videos(world: NeedleWorld, folder: str, split: str) -> list[NeedleVideo]:
    """All videos of a split with their events, written first if need be.

    Raises:
        ValueError: the split does not exist.
    """
    count, root = world.count(split), build(world, folder)
    return [
        NeedleVideo(
            name=f"{split}/{index:05d}",
            video=VideoRef(_path(root, split, index), float(world.duration)),
            events=draw_events(world, split, index),
        )
        for index in range(count)
    ]


def _rng(world: NeedleWorld, split: str, index: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([world.seed, SPLITS.index(split), index, stream])


def _background(world: NeedleWorld, rng: np.random.Generator) -> Greys:
    """A grey gradient tilted by a random angle."""
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, world.size, dtype=np.float32)
    slope = np.cos(angle) * axis + np.sin(angle) * axis[:, None]
    return (128 + world.tilt * slope).astype(np.float32)


def _cover(event: Event, size: int) -> Coverage:
    """How much of each pixel the shape covers."""
    cover = np.zeros((size, size), np.uint8)
    half, x, y = event.size // 2, event.x, event.y
    arm = event.size // 8
    if event.shape == "circle":
        cv2.circle(cover, (x, y), half, 255, -1, cv2.LINE_AA)
    elif event.shape == "square":
        cv2.rectangle(cover, (x - half, y - half), (x + half, y + half), 255, -1)
    elif event.shape == "triangle":
        corners = np.array([[x, y - half], [x + half, y + half], [x - half, y + half]])
        cv2.fillPoly(cover, [corners], 255, cv2.LINE_AA)
    else:
        cv2.rectangle(cover, (x - arm, y - half), (x + arm, y + half), 255, -1)
        cv2.rectangle(cover, (x - half, y - arm), (x + half, y + arm), 255, -1)
    return cover


def _path(root: str, split: str, index: int) -> str:
    return os.path.join(root, split, f"{index:05d}.mp4")


def _write_split(world: NeedleWorld, split: str, root: str) -> None:
    os.makedirs(os.path.join(root, split))
    for index in range(world.count(split)):
        write_mp4(_path(root, split, index), draw_frames(world, split, index), fps=1.0)


def write_mp4(path: str, frames: Pixels, fps: float) -> None:
    """Write frames as MPEG-4 video.

    Raises:
        ValueError: OpenCV was built without the encoder, or cannot write there.
    """
    size = (frames.shape[2], frames.shape[1])
    writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        raise ValueError(
            f"cannot write video {path}: check the folder, or install opencv-python-headless, "
            "whose FFmpeg encodes mp4v"
        )
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def _complete(world: NeedleWorld, folder: str) -> bool:
    """Whether the folder holds the manifest and every video."""
    if not os.path.isfile(os.path.join(folder, MANIFEST)):
        return False
    folders = {split: os.path.join(folder, split) for split in SPLITS}
    return all(
        os.path.isdir(path) and len(os.listdir(path)) == world.count(split)
        for split, path in folders.items()
    )


def _move(world: NeedleWorld, made: str, target: str) -> None:
    """Give the finished folder its name; another process may have been faster."""
    if os.path.isdir(target) and not _complete(world, target):
        shutil.rmtree(target)
    try:
        os.rename(made, target)
    except OSError:
        if not _complete(world, target):
            raise
