"""The two decoders of video files behind one interface: OpenCV, and FFmpeg's libraries (PyAV).

OpenCV reads most files. It has no AV1, and from 4.13 on it converts no interlaced frame but still
reports success, so that whatever its buffer held before is shown. PyAV reads those. Frames are what
the ffmpeg program gives, so interlaced ones have the lines of both fields woven.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import cv2
import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame

from pipelines.arrays import Picture
from pipelines.container import (
    REMEDY,
    Header,
    UnreadableVideo,
    check_file,
    demuxed,
    open_container,
)

# Containers round times, Matroska to milliseconds.
ROUNDING = 1e-3
# After so many packets in a row that cannot be decoded nothing else is expected to come.
DAMAGE = 64
# MPEG program streams give times now and then, and up to the first one they are guesses; seconds.
SETTLING = 3.0
# Codecs that OpenCV's builds know by name, but cannot decode without special hardware.
NOT_IN_OPENCV = ("av1",)
# FFmpeg's field orders of streams that do not announce interlaced frames.
UNKNOWN, PROGRESSIVE = 0, 1


@runtime_checkable
class Decoder(Protocol):
    """An open video file and a place in it, at first before its first frame."""

    @property
    def seekable(self) -> bool:
        """Whether it is worth trying."""
        ...

    def grab(self) -> bool:
        """Go on to the next frame, across damage; False at the end."""
        ...

    def time(self) -> float:
        """When this frame appears, seconds from the beginning of the stream; 0 if unknown."""
        ...

    def seek(self, seconds: float) -> None:
        """Make the frame of a time the next one. Another one may come: look at its time."""
        ...

    def image(self) -> Picture | None:
        """This frame, upright; None if what there is may be another one."""
        ...


class OpenCvDecoder:
    """Implements `Decoder`.

    OpenCV does not tell that it has not written a frame. Then its buffer holds the picture that was
    retrieved before, so a picture that equals that one is not given. There always is one before:
    the first frame of the file, which `first_frame` has seen to be one that OpenCV can convert.

    Raises:
        UnreadableVideo: nothing that OpenCV reads.
    """

    def __init__(self, path: str, threads: int = 1):
        check_file(path)
        options = (cv2.CAP_PROP_N_THREADS, threads)
        self._capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, options)
        if not self._capture.isOpened():
            raise UnreadableVideo(
                f"video {path}: OpenCV finds no video in it that it can decode; {REMEDY}"
            )
        self._first_is_next, self._at_first = self._grab(), False
        self._before = self._capture.retrieve()[1] if self._first_is_next else None

    @property
    def seekable(self) -> bool:
        """See `Decoder`."""
        return self._capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0

    def grab(self) -> bool:
        """See `Decoder`."""
        self._at_first, self._first_is_next = self._first_is_next, False
        return self._at_first or self._grab()

    def _grab(self) -> bool:
        return any(self._capture.grab() for _ in range(DAMAGE))

    def time(self) -> float:
        """See `Decoder`."""
        return self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000

    def seek(self, seconds: float) -> None:
        """See `Decoder`."""
        self._first_is_next = False
        self._capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * seconds)

    def image(self) -> Picture | None:
        """See `Decoder`."""
        if not self._at_first:
            ok, image = self._capture.retrieve()
            if not ok or self._before is None or np.array_equal(image, self._before):
                return None
            self._before = image
        assert self._before is not None
        return cv2.cvtColor(self._before, cv2.COLOR_BGR2RGB)


class AvDecoder:
    """Implements `Decoder`.

    Raises:
        UnreadableVideo: nothing that FFmpeg reads.
    """

    def __init__(self, path: str, threads: int = 1):
        self._path, self._threads = path, threads
        self._open()

    def _open(self) -> None:
        self._container, self._stream = open_container(self._path)
        self.header = Header.of(self._container, self._stream)
        """What the container announces."""
        context = self._stream.codec_context
        context.thread_count, context.thread_type = self._threads, "AUTO"
        self._begin()

    def _begin(self) -> None:
        """Decode from here on."""
        self._coming = self._decoded()
        self._frame: VideoFrame | None = None
        self._time, self._ahead = 0.0, False

    def _decoded(self) -> Iterator[VideoFrame]:
        """All frames that follow."""
        for packet in demuxed(self._container, self._stream):
            with contextlib.suppress(FFmpegError):
                yield from packet.decode()  # type: ignore[misc]  the stream is one of video

    @property
    def seekable(self) -> bool:
        """See `Decoder`."""
        return True

    def grab(self) -> bool:
        """See `Decoder`."""
        ahead, self._ahead = self._ahead, False
        if ahead:
            return True
        frame = next(self._coming, None)
        if frame is None:
            return False
        self._time, self._frame = self._time_of(frame), frame
        return True

    def _time_of(self, frame: VideoFrame) -> float:
        if frame.pts is not None and frame.time_base:
            return float((frame.pts - (self._stream.start_time or 0)) * frame.time_base)
        following = self._frame is not None and self.header.fps > 0
        return self._time + 1 / self.header.fps if following else 0.0

    def time(self) -> float:
        """See `Decoder`."""
        return self._time

    def seek(self, seconds: float) -> None:
        """See `Decoder`."""
        start, base = self._stream.start_time or 0, float(self._stream.time_base or 1)
        goal = seconds - (SETTLING if self._container.format.name == "mpeg" else 0)
        try:
            self._container.seek(start + round(max(goal, 0.0) / base), stream=self._stream)
            self._begin()
        except FFmpegError:
            self._open()
        # FFmpeg goes to a key frame before.
        while self.grab() and self._time < seconds - ROUNDING:
            pass
        self._ahead = self._frame is not None

    @property
    def frame(self) -> VideoFrame | None:
        """The frame as FFmpeg has it."""
        return self._frame

    def image(self) -> Picture | None:
        """See `Decoder`."""
        return None if self._frame is None else _rgb(self._frame)

    @property
    def interlaced(self) -> bool:
        """Whether this frame is, or the stream announces such ones."""
        announced = self._stream.codec_context.field_order not in (UNKNOWN, PROGRESSIVE)
        return announced or (self._frame is not None and self._frame.interlaced_frame)

    @property
    def codec(self) -> str:
        """Name of the format of the packets."""
        return self._stream.codec_context.codec.canonical_name


def _rgb(frame: VideoFrame) -> Picture:
    """By a filter graph, as in the ffmpeg program: a plain conversion mixes the colours of the
    fields of an interlaced frame."""
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    graph.link_nodes(source, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    graph.push(frame)
    converted = graph.pull()
    assert isinstance(converted, VideoFrame)
    return np.ascontiguousarray(np.rot90(converted.to_ndarray(), round(frame.rotation / 90)))


DECODERS: dict[str, type[OpenCvDecoder] | type[AvDecoder]] = {
    "opencv": OpenCvDecoder,
    "ffmpeg": AvDecoder,
}
"""By name."""
SURE = "ffmpeg"
"""The one that tells when it cannot convert a frame."""


@dataclasses.dataclass(frozen=True)
class FirstFrame:
    """What the header and the first frame of a file tell."""

    header: Header
    decoder: str
    """Which of `DECODERS` reads the file."""
    height: int
    width: int


def first_frame(path: str) -> FirstFrame:
    """Decode the first frame of a file, upright, and choose who reads the others.

    Raises:
        UnreadableVideo: no frame can be decoded.
    """
    decoder = AvDecoder(path)
    if not decoder.grab() or decoder.frame is None:
        raise UnreadableVideo(f"video {path}: no frame can be decoded; {REMEDY}")
    height, width = decoder.frame.height, decoder.frame.width
    if round(decoder.frame.rotation / 90) % 2:
        height, width = width, height
    beyond_opencv = decoder.interlaced or decoder.codec in NOT_IN_OPENCV
    return FirstFrame(decoder.header, SURE if beyond_opencv else "opencv", height, width)
