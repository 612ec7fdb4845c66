"""What a video file holds: its size, when its frames are shown, and frames by index.

The only place that opens video files. A frame is known by its time in the container, not by
`index / fps`: the rate may vary, and OpenCV counts frames wrongly after a jump if it does.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from paravt_jax.records import VideoRef
from pipelines.faults import UNREADABLE
from pipelines.preprocess import resize

REMEDY = (
    "check the path, or re-encode the file, for example with `ffmpeg -i IN -c:v libx264 OUT.mp4`"
)
# Skipping over fewer frames than this is cheaper than seeking to a key frame; shorter files are
# cheaper to decode than to list and to check.
SEEK_GAP = 64
# Pixels of all frames from which FFmpeg decodes with several threads. Small files are read side by
# side, and starting threads takes four times as long as decoding one.
LARGE = 1 << 28
THREADS = min(4, os.cpu_count() or 1)
# A file that holds less than this share of the packets that it announces was cut off.
WHOLE = 0.95
# Containers round times, Matroska to milliseconds.
ROUNDING = 1e-3

# Makes OpenCV read packets as they are, without decoding.
PACKETS = (cv2.CAP_PROP_FORMAT, -1)
# After so many packets in a row that cannot be decoded nothing else is expected to come.
DAMAGE = 64

Size = tuple[int, int]
"""Height and width in pixels."""
Decoded = dict[int, np.ndarray | None]
"""Frames by index; None for one that cannot be decoded."""


class UnreadableVideo(ValueError):
    """A video file is missing, is none, or is damaged. The message names file and remedy."""

    kind = UNREADABLE


@dataclasses.dataclass(frozen=True, eq=False)
class VideoInfo:
    """A video stream, as it is shown: turned upright if the container says so."""

    times: np.ndarray
    """float64 `[frames]`: when each frame appears, ascending seconds on the container's clock."""
    duration: float
    """Length in seconds."""
    height: int
    width: int

    @classmethod
    def steady(cls, frames: int, fps: float, height: int, width: int) -> VideoInfo:
        """Of frames that follow one another at a constant rate."""
        return cls(np.arange(frames) / fps, frames / fps, height, width)

    @functools.cached_property
    def frames(self) -> int:
        """How many there are."""
        return len(self.times)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a container announces, which need not be so."""

    frames: int
    """0 if it does not tell."""
    fps: float
    """On average; 0 if it does not tell."""

    @classmethod
    def of(cls, capture: cv2.VideoCapture) -> Header:
        """Of an open file."""
        frames, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        # Unknown counts are computed from an unknown duration: large negative numbers.
        return cls(max(int(frames), 0), max(float(fps), 0.0))

    @property
    def duration(self) -> float:
        """Seconds; 0 if it does not tell."""
        return self.frames / self.fps if self.fps else 0.0

    def end(self, last: float) -> float:
        """Length in seconds of a file whose last frame appears at `last`: as announced, unless the
        rate varies and that is too short."""
        least = last + 1 / self.fps
        return least if self.duration < least - ROUNDING else self.duration


def probe(path: str) -> VideoInfo:
    """List the frames of a video file, without decoding most of them.

    Raises:
        UnreadableVideo: the file is missing, is no video, holds no frame that can be decoded, does
            not tell when its frames are shown, or is cut off.
    """
    capture = _open(path)
    header = Header.of(capture)
    times = packet_times(path) if header.frames > SEEK_GAP else np.empty(0)
    # Packets may lack times, or never be shown, as those before an edited beginning.
    listed = len(times) > 0 and bool(np.all(np.diff(times) > 0)) and _ends_at(capture, times)
    if not listed:
        times = shown_times(path)
    _check(path, header, times)
    return VideoInfo(
        times=times,
        duration=header.end(times[-1]) if listed else _length(times, header),
        height=int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        width=int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
    )


def _length(times: np.ndarray, header: Header) -> float:
    """Seconds until the last frame was shown as long as the others on average."""
    if len(times) == 1:
        return 1 / (header.fps or 1.0)
    return float(times[-1] + (times[-1] - times[0]) / (len(times) - 1))


def _check(path: str, header: Header, times: np.ndarray) -> None:
    if not len(times):
        raise UnreadableVideo(f"video {path}: no frame can be decoded; {REMEDY}")
    if len(times) > 1 and not times[-1] > times[0]:
        raise UnreadableVideo(f"video {path}: it does not tell when its frames are shown; {REMEDY}")
    # Counts alone may be estimates, and lengths lack how long the last frame stands.
    if len(times) < WHOLE * header.frames and _length(times, header) < WHOLE * header.duration:
        packets = packet_times(path)
        if len(packets) < WHOLE * header.frames:
            raise UnreadableVideo(
                f"video {path}: cut off after {times[-1]:.1f} s of the {header.duration:.1f} s "
                "that it announces; copy it again"
            )


def video_ref(path: str) -> VideoRef:
    """A reference to a video file, its duration read from the header and the last packets, or from
    all frames if the header does not tell.

    Raises:
        UnreadableVideo: see `probe`.
    """
    capture = _open(path, *PACKETS)
    header = Header.of(capture)
    capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * header.duration)
    last = max(_walk(capture), default=0.0)
    duration = header.end(last) if header.duration and last else probe(path).duration
    return VideoRef(path=os.path.abspath(path), duration=duration)


def packet_times(path: str) -> np.ndarray:
    """Times of the packets of the video stream, ascending seconds, float64 `[n]`.

    Nothing is decoded: a file of half an hour takes a fraction of a second.
    """
    return np.sort(np.fromiter(_walk(_open(path, *PACKETS)), np.float64))


def shown_times(path: str) -> np.ndarray:
    """Times of the frames that decoding the whole file yields, ascending seconds, float64 `[n]`."""
    times = np.fromiter(_walk(_open(path)), np.float64)
    if len(times) > 2 and times[-1] <= times[-2]:
        # The last frames out of a decoder that held them back have lost their times.
        lost = np.argmax(np.diff(times) <= 0) + 1
        step = np.median(np.diff(times[:lost])) if lost > 1 else 0.0
        times[lost:] = times[lost - 1] + step * np.arange(1, len(times) - lost + 1)
    return times


def _walk(capture: cv2.VideoCapture) -> Iterator[float]:
    """Times of all that follows."""
    while _grab(capture):
        yield _position(capture)


def _grab(capture: cv2.VideoCapture) -> bool:
    """Go on to what follows, across damage."""
    return any(capture.grab() for _ in range(DAMAGE))


def _position(capture: cv2.VideoCapture) -> float:
    return capture.get(cv2.CAP_PROP_POS_MSEC) / 1000


def _ends_at(capture: cv2.VideoCapture, times: np.ndarray) -> bool:
    """Whether the last of these is the last one that can be decoded."""
    capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * times[-1])
    shown = list(_walk(capture))
    return bool(shown) and abs(shown[-1] - times[-1]) < ROUNDING


def complete(path: str, frames: Decoded) -> dict[int, np.ndarray]:
    """Frames in ascending order, with copies of the one before in the places of absent ones.

    Raises:
        UnreadableVideo: fewer than half of them are present.
    """
    present = [frame for frame in frames.values() if frame is not None]
    if 2 * len(present) < len(frames) or not present:
        raise UnreadableVideo(
            f"video {path}: only {len(present)} of {len(frames)} frames can be decoded; {REMEDY}"
        )
    shown, last = {}, present[0]
    for index, frame in frames.items():
        shown[index] = last = last if frame is None else frame
    return shown


def decode_present(
    path: str, info: VideoInfo, indices: Sequence[int], size: Size | None = None
) -> dict[int, np.ndarray]:
    """Frames at `indices` (ascending) as RGB uint8 `[h, w, 3]`, resized to `size`; those that
    cannot be decoded are left out.

    Raises:
        UnreadableVideo: the file cannot be opened.
    """
    large = info.frames * info.height * info.width > LARGE
    walk = _Walk(path, info.times, THREADS if large else 1)
    frames: dict[int, np.ndarray] = {}
    for index in indices:
        # What lies between two frames may be damaged: a second attempt goes straight to the frame.
        image = walk.frame(index)
        if image is None:
            walk.seek(index)
            image = walk.frame(index)
        if image is not None:
            frames[index] = image if size is None else resize(image, size)
    return frames


class _Walk:
    """Goes through a file from frame to frame, and always knows by its time at which one it is."""

    def __init__(self, path: str, times: np.ndarray, threads: int):
        self._path, self._times, self._threads = path, times, threads
        self._restart()
        self._seekable = Header.of(self._capture).frames > 0

    def frame(self, index: int) -> np.ndarray | None:
        """Frame `index` as RGB; None if it does not follow."""
        if index - self._at > SEEK_GAP:
            self.seek(index)
        while self._at < index and self._next():
            pass
        if self._at != index:
            return None
        ok, image = self._capture.retrieve()
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if ok else None

    def seek(self, index: int) -> None:
        """Go to frame `index` or to one before it."""
        goal = index if self._seekable else 0
        while goal > 0:
            self._capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * self._times[goal])
            self._at = -1
            # A frame that comes without a time would pass for the first one.
            if self._next() and 0 < self._at <= index:
                return
            # OpenCV counts frames at the average rate from a key frame on, so that it goes too far
            # where frames are rare, and transport streams are not sought exactly.
            goal -= max(SEEK_GAP, 2 * (self._at - index))
        self._restart()

    def _restart(self) -> None:
        self._capture, self._at = _open(self._path, threads=self._threads), -1

    def _next(self) -> bool:
        """Go on by a frame."""
        if not _grab(self._capture):
            return False
        nearest = int(np.searchsorted(self._times, _position(self._capture) - ROUNDING))
        # The last frames of some files come without a time.
        self._at = max(self._at + 1, nearest)
        return True


def _open(path: str, *options: int, threads: int = 1) -> cv2.VideoCapture:
    """An open file.

    Raises:
        UnreadableVideo: it is none, or nothing that OpenCV reads.
    """
    if not os.path.isfile(path):
        fault = "it is a folder" if os.path.isdir(path) else "no such file"
        raise UnreadableVideo(f"video {path}: {fault}; {REMEDY}")
    options = (cv2.CAP_PROP_N_THREADS, threads, *options)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, options)
    if not capture.isOpened():
        raise UnreadableVideo(
            f"video {path}: OpenCV finds no video in it that it can decode; {REMEDY}"
        )
    return capture
