"""What a video file says of itself, read by FFmpeg's libraries (PyAV): codec, packets, lengths.

Nothing is decoded here. Times are seconds from the beginning of the video stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator
from typing import cast

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.stream import VideoStream

from paravt_jax.remote import is_file, is_remote, store_of
from pipelines.arrays import Seconds
from pipelines.faults import UNREADABLE

REMEDY = (
    "check the path, or re-encode the file, for example with `ffmpeg -i IN -c:v libx264 OUT.mp4`"
)
# Containers that hold their pictures themselves. Playlists and lists, which FFmpeg also takes,
# name other files, and a data set does not choose which files are opened.
FORMATS = (
    "3dostr,amv,apng,asf,av1,avi,avs2,avs3,bink,cavsvideo,dirac,dnxhd,dv,evc,flv,gif,gxf,h261,h263,"
    "h264,hevc,ivf,ivr,live_flv,lvf,m4v,matroska,mj2,mjpeg,mov,mp4,mpeg,mpegts,mpegvideo,mpjpeg,"
    "mxf,nsv,nut,obu,ogg,rawvideo,rm,roq,rpl,swf,vc1,vivo,vvc,webm,wtv,yuv4mpegpipe"
)

# The last picture may be in any of the packets of the last seconds: they are in decoding order.
TAIL = 3.0
# Of a remote file, at once.
READ_BYTES = 1 << 18


class UnreadableVideo(ValueError):
    """A video file is missing, is none, or is damaged. The message names file and remedy."""

    kind = UNREADABLE


def check_file(path: str) -> None:
    """Refuse what is no file.

    Raises:
        UnreadableVideo: it is none.
    """
    if not is_file(path):
        fault = "it is a folder" if os.path.isdir(path) else "no such file"
        raise UnreadableVideo(f"video {path}: {fault}; {REMEDY}")


def open_container(path: str) -> tuple[InputContainer, VideoStream]:
    """An open file and its first video stream.

    Raises:
        UnreadableVideo: it is no file, or no video.
    """
    check_file(path)
    try:
        options = {"format_whitelist": FORMATS}
        opened = av.open(_source(path), container_options=options)
        container = cast(InputContainer, opened)
    except (FFmpegError, OSError, ValueError) as error:
        raise UnreadableVideo(f"video {path}: FFmpeg finds no video in it; {REMEDY}") from error
    if not container.streams.video or not container.streams.video[0].codec_context:
        container.close()
        raise UnreadableVideo(f"video {path}: FFmpeg finds no video in it; {REMEDY}")
    return container, container.streams.video[0]


def _source(path: str) -> str | io.IOBase:
    """What FFmpeg opens. A remote file is read where it is: lengths stand at its ends."""
    if is_remote(path):
        opened = store_of(path).open(path, "rb", cache_type="readahead", block_size=READ_BYTES)
        return cast(io.IOBase, opened)
    # With its protocol, so that no path is taken for another one.
    return "file:" + os.path.abspath(path)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a container announces, which need not be so."""

    frames: int
    """0 if it does not tell."""
    fps: float
    """On average; 0 if it does not tell."""
    duration: float
    """Seconds; 0 if it does not tell."""

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream) -> Header:
        """Of an open file."""
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        duration = (container.duration or 0) / av.time_base
        if stream.duration and stream.time_base:
            duration = float(stream.duration * stream.time_base)
        duration = max(duration, 0.0)
        return cls(stream.frames or round(duration * fps), fps, duration)


@dataclasses.dataclass(frozen=True, eq=False)
class Packets:
    """The packets of the video stream whose pictures are shown: not those before an edited
    beginning, which are only needed to decode others."""

    times: Seconds
    """Ascending; NaN, at the end, for packets without a time."""
    end: float
    """When the last picture has been shown as long as its packet says; 0 without any."""

    @classmethod
    def of(cls, packets: Iterable[Packet], stream: VideoStream, fps: float) -> Packets:
        """Of some packets of the stream."""
        base, start = float(stream.time_base or 1), stream.start_time or 0
        shown = [(p.pts, p.duration) for p in packets if p.size and not p.is_discard]
        ticks = np.array([np.nan if pts is None else pts - start for pts, _ in shown], np.float64)
        lasting = np.array([duration or 0 for _, duration in shown], np.float64) * base
        lasting[lasting <= 0] = 1 / fps if fps else 0.0
        times = ticks * base
        return cls(np.sort(times), float(np.nanmax(times + lasting, initial=0.0)))


def read_packets(path: str, last: bool = False) -> Packets:
    """List the packets of the video stream, or the last ones only.

    A file of half an hour is listed in a fraction of a second.

    Raises:
        UnreadableVideo: see `open_container`.
    """
    container, stream = open_container(path)
    with contextlib.closing(container):
        header = Header.of(container, stream)
        if last and stream.time_base:
            # A file that cannot be sought is read from its beginning.
            with contextlib.suppress(FFmpegError):
                goal = max(header.duration - TAIL, 0.0) / float(stream.time_base)
                container.seek((stream.start_time or 0) + round(goal), stream=stream)
        return Packets.of(demuxed(container, stream), stream, header.fps)


def demuxed(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """The packets that follow, as far as the file can be read; an empty one at its end."""
    with contextlib.suppress(FFmpegError):
        yield from container.demux(stream)
