"""What a video file holds: its size, when its frames are shown, and frames by index.

A frame is known by its time in the container, not by `index / fps`: the rate may vary, and OpenCV
counts frames wrongly after a jump if it does.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from paravt_jax.fetched import local_file
from paravt_jax.records import VideoRef
from paravt_jax.remote import absolute
from pipelines.arrays import Picture, Seconds
from pipelines.container import (
    REMEDY,
    Header,
    UnreadableVideo,
    read_packets,
)
from pipelines.decoders import DECODERS, ROUNDING, SURE, Decoder, first_frame
from pipelines.preprocess import resize

# Skipping over fewer frames than this is cheaper than seeking to a key frame; shorter files are
# cheaper to decode than to list and to check.
SEEK_GAP = 64
# Pixels of all frames from which FFmpeg decodes with several threads. Small files are read side by
# side, and starting threads takes four times as long as decoding one.
LARGE = 1 << 28
THREADS = min(4, os.cpu_count() or 1)
# A file that holds less than this share of the packets that it announces was cut off.
WHOLE = 0.95

Size = tuple[int, int]
"""Height and width in pixels."""
Decoded = dict[int, Picture | None]
"""Frames by index; None for one that cannot be decoded."""


@dataclasses.dataclass(frozen=True, eq=False)
class VideoInfo:
    """A video stream, as it is shown: turned upright if the container says so."""

    times: Seconds
    """When each frame appears, ascending seconds on the container's clock."""
    duration: float
    """Length in seconds."""
    height: int
    width: int
    decoder: str = "opencv"
    """Which of `DECODERS` reads it."""

    @functools.cached_property
    def frames(self) -> int:
        """How many there are."""
        return len(self.times)


def probe(path: str) -> VideoInfo:
    """List the frames of a video file, without decoding most of them.

    Raises:
        UnreadableVideo: the file is missing, is no video, holds no frame that can be decoded, does
            not tell when its frames are shown, or is cut off.
    """
    frame = first_frame(path)
    header, times, duration = frame.header, np.empty(0), 0.0
    if header.frames > SEEK_GAP:
        packets = read_packets(path)
        times, duration = packets.times, packets.end
    # Packets may lack times, or never be shown.
    listed = len(times) > 0 and bool(np.all(np.diff(times) > 0))
    if not listed or not _ends_at(DECODERS[frame.decoder](path), times):
        times = shown_times(DECODERS[frame.decoder](path))
        duration = _length(times, header)
    _check(path, header, times)
    return VideoInfo(times, duration, frame.height, frame.width, frame.decoder)


def _length(times: Seconds, header: Header) -> float:
    """Seconds until the last frame was shown as long as the others on average."""
    if len(times) < 2:
        return 1 / (header.fps or 1.0)
    return float(times[-1] + (times[-1] - times[0]) / (len(times) - 1))


def _check(path: str, header: Header, times: Seconds) -> None:
    if not len(times):
        raise UnreadableVideo(f"video {path}: no frame can be decoded; {REMEDY}")
    if len(times) > 1 and not times[-1] > times[0]:
        raise UnreadableVideo(f"video {path}: it does not tell when its frames are shown; {REMEDY}")
    # Counts alone may be estimates, and lengths lack how long the last frame stands.
    if len(times) < WHOLE * header.frames and _length(times, header) < WHOLE * header.duration:
        packets = read_packets(path)
        if len(packets.times) < WHOLE * header.frames:
            raise UnreadableVideo(
                f"video {path}: cut off after {times[-1]:.1f} s of the {header.duration:.1f} s "
                "that it announces; copy it again"
            )


def video_ref(path: str) -> VideoRef:
    """A reference to a video file, its duration read from the last packets, or from all frames if
    they do not tell.

    Raises:
        UnreadableVideo: see `probe`.
    """
    path = absolute(path)
    duration = read_packets(path, last=True).end
    if not duration:
        with local_file(path) as copy:
            duration = probe(copy).duration
    return VideoRef(path, duration)


def shown_times(decoder: Decoder) -> Seconds:
    """Times of the frames that decoding the whole file yields, ascending seconds."""
    times = np.fromiter(_walk(decoder), np.float64)
    if len(times) > 2 and times[-1] <= times[-2]:
        # The last frames out of a decoder that held them back have lost their times.
        lost = np.argmax(np.diff(times) <= 0) + 1
        step = np.median(np.diff(times[:lost])) if lost > 1 else 0.0
        times[lost:] = times[lost - 1] + step * np.arange(1, len(times) - lost + 1)
    return times


def _walk(decoder: Decoder) -> Iterator[float]:
    """Times of all that follows."""
    while decoder.grab():
        yield decoder.time()


def _ends_at(decoder: Decoder, times: Seconds) -> bool:
    """Whether the last of these is the last one that can be decoded."""
    last = float(times[-1])
    decoder.seek(last)
    shown = list(_walk(decoder))
    return bool(shown) and abs(shown[-1] - last) < ROUNDING


def complete(path: str, frames: Decoded) -> dict[int, Picture]:
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
) -> dict[int, Picture]:
    """Frames at `indices` (ascending) as RGB, resized to `size`; those that
    cannot be decoded are left out.

    Raises:
        UnreadableVideo: the file cannot be opened.
    """
    walk = _Cursor(path, info, info.decoder)
    sure = walk if info.decoder == SURE else _Cursor(path, info, SURE)
    frames: dict[int, Picture] = {}
    for index in indices:
        image = walk.frame(index)
        if image is None:
            image = sure.frame(index)
        if image is None:
            # What lies before it may be damaged: this goes straight to the frame.
            sure.seek(index)
            image = sure.frame(index)
        if image is not None:
            frames[index] = resize(image, size or (info.height, info.width))
    return frames


class _Cursor:
    """Goes through a file from frame to frame, and always knows by its time at which one it is."""

    def __init__(self, path: str, info: VideoInfo, decoder: str):
        large = info.frames * info.height * info.width > LARGE
        self._open = functools.partial(DECODERS[decoder], path, THREADS if large else 1)
        self._times = info.times
        self._at = -1

    @functools.cached_property
    def _decoder(self) -> Decoder:
        """Opened at its first use."""
        return self._open()

    def frame(self, index: int) -> Picture | None:
        """Frame `index` as RGB; None if it does not follow, or is not certain to be it."""
        if index - self._at > SEEK_GAP:
            self.seek(index)
        while self._at < index and self._next():
            pass
        return self._decoder.image() if self._at == index else None

    def seek(self, index: int) -> None:
        """Go to frame `index` or to one before it."""
        goal = index if self._decoder.seekable else 0
        while goal > 0:
            self._decoder.seek(self._times[goal])
            self._at = -1
            # A frame that comes without a time would pass for the first one.
            if self._next() and 0 < self._at <= index:
                return
            # OpenCV counts frames at the average rate from a key frame on, so that it goes too far
            # where frames are rare, and transport streams are not sought exactly.
            goal -= max(SEEK_GAP, 2 * (self._at - index))
        self._decoder, self._at = self._open(), -1

    def _next(self) -> bool:
        """Go on by a frame."""
        if not self._decoder.grab():
            return False
        nearest = int(np.searchsorted(self._times, self._decoder.time() - ROUNDING))
        # The last frames of some files come without a time.
        self._at = max(self._at + 1, nearest)
        return True
