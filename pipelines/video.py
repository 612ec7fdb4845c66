"""Frames from video files, kept in a cache of bounded size (`pipelines.decode` reads them)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import numpy as np

from paravt_jax.deadlines import OutOfTime, within_seconds
from paravt_jax.fetched import local_file
from paravt_jax.records import Frames, VideoRef
from pipelines.arrays import Indices, Seconds
from pipelines.container import REMEDY, UnreadableVideo
from pipelines.decode import Decoded, Size, VideoInfo, complete, decode_present, probe
from pipelines.decoders import ROUNDING
from pipelines.preprocess import FrameSpec

DECODE_SECONDS = 300.0
"""Enough for 64 frames of hours in 4K from a slow disk."""
# A video that is smaller than this when decoded is decoded whole, once, at its first use.
WHOLE_BYTES = 1 << 20
# Bound on the frame times kept, 8 bytes each: some 80 hours at 30 frames per second.
TIMES_BYTES = 1 << 26

T = TypeVar("T")
Key = tuple[str, Size]
"""What frames are kept by: the file and their size."""


def overview_indices(frames: int, count: int) -> Indices:
    """Indices of `count` frames spread evenly from the first to the last, both included.

    At most as many as there are; the rule of Qwen3-VL's video processor.
    """
    count = min(count, frames)
    return np.linspace(0, frames - 1, count).round().astype(np.int64)


def clip_indices(info: VideoInfo, start: float, end: float, fps: float, cap: int) -> Indices:
    """Indices of the frames on screen at evenly spaced moments of the window [start, end).

    The window is half-open, so that neighbouring windows share no frame and a window of
    `cap / fps` seconds is sampled at exactly `fps`; `1 <= n <= cap`.

    Raises:
        ValueError: the window is empty or begins at or after the end of the video.
    """
    end = min(end, info.duration)
    start = max(start, 0.0)
    if not start < end:
        raise ValueError(
            f"window [{start:g}, {end:g}] s is empty in a video of {info.duration:g} s; "
            "choose start < end within the video"
        )
    count = int(np.clip(round((end - start) * fps), 1, cap))
    moments = start + (end - start) * np.arange(count) / count
    return np.unique(shown_at(info, moments))


def shown_at(info: VideoInfo, moments: Seconds) -> Indices:
    """Indices of the frames on screen at these seconds."""
    shown = np.searchsorted(info.times, moments + ROUNDING, side="right") - 1
    return np.maximum(shown, 0)


class VideoReader:
    """Implements `FrameReader`: overview and crop frames of video files, cached in memory.

    Args:
        crop_fps: sampling rate of `clip`, frames per second.
        crop_cap: most frames that one `clip` returns.
        cache_bytes: bound on the decoded frames kept; the least recently used videos go first.
        spec: the size that frames are resized to before they are cached, so that no
            full-resolution frame is held. Without it frames keep the size of the file.
        overview_tokens: most vision tokens of an overview; None leaves that to the spec.
        decode_seconds: most seconds that decoding the frames of one request may take, and finding
            out which frames there are.

    Methods may be called from several threads, which never decode the same frame twice at a time,
    and do not change one another's results. A copy sent to another process starts empty.
    """

    def __init__(
        self,
        crop_fps: float = 1.0,
        crop_cap: int = 16,
        cache_bytes: int = 1 << 29,
        spec: FrameSpec | None = None,
        overview_tokens: int | None = None,
        decode_seconds: float = DECODE_SECONDS,
    ):
        if not crop_fps > 0 or crop_cap < 1:
            raise ValueError(
                f"crop_fps={crop_fps}, crop_cap={crop_cap}: a crop needs a positive rate and "
                "at least one frame"
            )
        self._crop_fps, self._crop_cap = crop_fps, crop_cap
        self._cache_bytes, self._spec = cache_bytes, spec
        self._overview_tokens, self._limit = overview_tokens, decode_seconds
        self._clear()

    def _clear(self) -> None:
        self._lock, self._timeout = threading.Lock(), ReadTimeout(self._limit)
        self._frames: LruCache[Decoded] = LruCache(self._cache_bytes)
        self._infos: LruCache[VideoInfo] = LruCache(TIMES_BYTES)
        self._coming: dict[Key, dict[int, Future[Decoded]]] = {}
        self._requested = self._missed = self._decoded = 0
        self._seconds = 0.0

    def __getstate__(self) -> dict:
        settings = ("_crop_fps", "_crop_cap", "_cache_bytes", "_spec", "_overview_tokens", "_limit")
        return {name: self.__dict__[name] for name in settings}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._clear()

    def take_metrics(self) -> dict[str, float]:
        """What was done since the last call, for `metrics.jsonl`: frames asked for, those among
        them that were not decoded for it, frames decoded, and the seconds that all threads together
        spent on it. What worker processes do is not seen."""
        with self._lock:
            metrics = {
                "frames/asked": float(self._requested),
                "frames/cache_hits": float(self._requested - self._missed),
                "frames/decoded": float(self._decoded),
                "frames/decode_seconds": self._seconds,
            }
            self._requested = self._missed = self._decoded = 0
            self._seconds = 0.0
        return metrics

    def overview(self, video: VideoRef, count: int) -> Frames:
        """`count` frames spread over the whole video (all of them if it has fewer).

        Raises:
            ValueError: the file cannot be read, or `count` is not positive.
        """
        if count < 1:
            raise ValueError(f"count={count}: an overview needs at least one frame")
        info = self.info(video)
        indices = overview_indices(info.frames, count)
        return self._read(video.path, info, indices, self._overview_tokens)

    def at(self, video: VideoRef, indices: Sequence[int], tokens: int | None = None) -> Frames:
        """The frames of these indices, within `tokens` vision tokens if given.

        Raises:
            ValueError: the file cannot be read.
        """
        return self._read(video.path, self.info(video), np.asarray(indices, np.int64), tokens)

    def clip(self, video: VideoRef, start: float, end: float, tokens: int | None = None) -> Frames:
        """Frames of the window [start, end) seconds at the crop rate, at most the cap.

        With `tokens`, as many of them as fit that many vision tokens at their least size, and
        then as large as they fit.

        Raises:
            ValueError: the file cannot be read, the window is empty (see `clip_indices`), or
                `tokens` is given to a reader without a `spec`, which knows no vision tokens.
        """
        info, cap = self.info(video), self._crop_cap
        if tokens is not None and self._spec is not None:
            cap = min(cap, self._spec.frames_within(tokens))
        indices = clip_indices(info, start, end, self._crop_fps, cap)
        return self._read(video.path, info, indices, tokens)

    def frames_at(self, video: VideoRef, times: Sequence[float]) -> Frames:
        """The frames on screen at these seconds, in the resolution of the file. They are not kept.

        Raises:
            ValueError: the file cannot be read.
        """
        info, path = self.info(video), video.path
        indices = shown_at(info, np.asarray(times))
        unique = sorted(set(indices.tolist()))
        with self._busy():
            present = self._timeout(path, lambda: _of_file(decode_present, path, info, unique))
        frames = complete(path, {index: present.get(index) for index in unique})
        return Frames(np.stack([frames[index] for index in indices]), info.times[indices])

    def info(self, video: VideoRef) -> VideoInfo:
        """Size of the video and times of its frames, found once."""
        with self._lock:
            info = self._infos.get(video.path)
        if info is None:
            with self._busy():
                info = self._timeout(video.path, lambda: _of_file(probe, video.path))
            with self._lock:
                self._infos.put(video.path, info, info.times.nbytes)
        return info

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        """Count the time spent inside."""
        began = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - began

    def _read(
        self, path: str, info: VideoInfo, indices: Indices, tokens: int | None = None
    ) -> Frames:
        numbers = indices.tolist()
        key = (path, self.size_of(info, len(numbers), tokens))
        small = info.frames * info.height * info.width * 3 <= WHOLE_BYTES
        with self._lock:
            self._requested += len(numbers)
        decoded = None
        while decoded is None:
            decoded = self._gather(key, info, numbers, range(info.frames) if small else ())
        frames = complete(path, decoded)
        return Frames(np.stack([frames[index] for index in numbers]), info.times[indices])

    def _gather(
        self, key: Key, info: VideoInfo, numbers: Sequence[int], others: Sequence[int]
    ) -> Decoded | None:
        """The frames wanted, from the cache, from this thread or from another one; None if another
        one failed, whose request may have been at fault."""
        frames, awaited, mine, promise = self._claim(key, numbers, others)
        if mine:
            frames |= self._decode(key, info, mine, promise)
        for index, future in awaited.items():
            if future.exception() is not None:
                return None
            frames[index] = future.result()[index]
        return {index: frames[index] for index in numbers}

    def _claim(
        self, key: Key, numbers: Sequence[int], others: Sequence[int]
    ) -> tuple[Decoded, dict[int, Future[Decoded]], list[int], Future[Decoded]]:
        """What the cache holds, what is on its way, what this thread must decode, and where to.

        If anything has to be decoded, so are `others`, unless they are held or on their way.
        """
        promise: Future[Decoded] = Future()
        with self._lock:
            cached, coming = self._frames.get(key) or {}, self._coming.setdefault(key, {})
            missing = [index for index in numbers if index not in cached and index not in coming]
            self._missed += len(missing)
            if missing:
                more = [index for index in others if index not in cached and index not in coming]
                missing = sorted({*missing, *more})
            frames = {index: cached[index] for index in numbers if index in cached}
            awaited = {index: coming[index] for index in numbers if index in coming}
            coming.update(dict.fromkeys(missing, promise))
        return frames, awaited, missing, promise

    def _decode(
        self, key: Key, info: VideoInfo, mine: list[int], promise: Future[Decoded]
    ) -> Decoded:
        """Decode what was claimed, for the cache and for everybody who waits for it."""
        try:
            with self._busy():
                path, size = key
                present = self._timeout(
                    path, lambda: _of_file(decode_present, path, info, mine, size)
                )
        except BaseException as error:
            with self._lock:
                self._forget(key, mine)
            promise.set_exception(error)
            raise
        decoded: Decoded = {index: present.get(index) for index in mine}
        with self._lock:
            self._forget(key, mine)
            self._store(key, decoded)
            self._decoded += len(mine)
        promise.set_result(decoded)
        return decoded

    def _forget(self, key: Key, indices: Sequence[int]) -> None:
        """These frames are no longer on their way."""
        for index in indices:
            del self._coming[key][index]

    def size_of(self, info: VideoInfo, count: int, tokens: int | None) -> Size:
        """Height and width of `count` frames shown together, within `tokens` vision tokens if
        given."""
        if tokens is not None:
            if self._spec is None:
                raise ValueError(f"tokens={tokens}: give the reader the spec that they are of")
            return self._spec.size_within(info.height, info.width, count, tokens)
        if self._spec is None:
            return info.height, info.width
        return self._spec.target_size(info.height, info.width, count)

    def _store(self, key: Key, decoded: Decoded) -> None:
        # A file's frames are kept apart by size: as video, few are shown larger than many.
        frames = (self._frames.get(key) or {}) | decoded
        size = sum(frame.nbytes for frame in frames.values() if frame is not None)
        self._frames.put(key, frames, size)


def _of_file(read: Callable[..., T], path: str, *arguments: Any) -> T:
    """What `read` finds in a file, or in the copy of a remote one.

    Raises:
        UnreadableVideo: it is not there.
        OSError: it cannot be fetched.
    """
    try:
        with local_file(path) as copy:
            return read(copy, *arguments)
    except FileNotFoundError as error:
        raise UnreadableVideo(f"video {error}; {REMEDY}") from error


class LruCache(Generic[T]):
    """Keeps what was used last, up to a number of bytes. Not safe for threads."""

    def __init__(self, limit: int):
        # Memory of a run grows for hundreds of steps until this is reached: that is no leak.
        self._limit = limit
        self._items: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self.held = 0
        """Bytes of all that is kept."""

    def get(self, key: Hashable) -> T | None:
        """What was kept by this key, if it still is."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: Hashable, value: T, size: int) -> None:
        """Keep it, and drop what has not been used for the longest time."""
        _, before = self._items.pop(key, (None, 0))
        self._items[key] = value, size
        self.held += size - before
        while self.held > self._limit:
            _, (_, dropped) = self._items.popitem(last=False)
            self.held -= dropped


class ReadTimeout:
    """Waits for files to be read, so many seconds for each request; a file that takes longer is not
    tried again."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._given_up: set[str] = set()

    def __call__(self, path: str, work: Callable[[], T]) -> T:
        """What `work`, which reads the file, returns.

        Raises:
            UnreadableVideo: it takes longer, or once did.
            Exception: whatever the work raises.
        """
        try:
            if path not in self._given_up:
                return within_seconds(work, self._seconds)
        except OutOfTime:
            self._given_up.add(path)
        raise UnreadableVideo(
            f"video {path}: decoding takes longer than data.decode_seconds={self._seconds:g}; "
            "re-encode the file with a key frame every few seconds, or raise the limit"
        )
