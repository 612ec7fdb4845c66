"""Frames from video files, read by OpenCV and kept in a cache of bounded size."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future

import cv2
import numpy as np

from paravt_jax.records import Frames, VideoRef
from pipelines.preprocess import FrameSpec, resize

REMEDY = (
    "check the path, or re-encode the file, for example with `ffmpeg -i IN -c:v libx264 OUT.mp4`"
)
# Skipping over fewer frames than this is cheaper than seeking to a key frame.
SEEK_GAP = 64
# A video that is smaller than this when decoded is decoded whole, once, at its first use.
WHOLE_BYTES = 1 << 20

Size = tuple[int, int]
"""Height and width in pixels."""
Key = tuple[str, Size]
"""What frames are kept by: the file and their size."""
Decoded = dict[int, np.ndarray | None]
"""Frames by index; None for one that the container announces but does not hold."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a container says about its video stream."""

    frames: int
    fps: float
    height: int
    width: int

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self.frames / self.fps


def probe(path: str) -> VideoInfo:
    """Read the stream properties of a video file.

    Raises:
        ValueError: the file is missing, is not a video, or does not tell its length.
    """
    capture = _open(path)
    info = VideoInfo(
        frames=int(capture.get(cv2.CAP_PROP_FRAME_COUNT)),
        fps=float(capture.get(cv2.CAP_PROP_FPS)),
        height=int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        width=int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
    )
    capture.release()
    if info.frames <= 0 or not info.fps > 0:
        raise ValueError(f"video {path}: {info.frames} frames at {info.fps} fps; {REMEDY}")
    return info


def video_ref(path: str) -> VideoRef:
    """A reference to a video file, its duration read from the file.

    Raises:
        ValueError: see `probe`.
    """
    return VideoRef(path=os.path.abspath(path), duration=probe(path).duration)


def overview_indices(frames: int, count: int) -> np.ndarray:
    """Indices of `count` frames spread evenly from the first to the last, both included.

    int64 `[min(count, frames)]`; the rule of Qwen3-VL's video processor.
    """
    count = min(count, frames)
    return np.linspace(0, frames - 1, count).round().astype(np.int64)


def rate_indices(
    info: VideoInfo, fps: float, min_frames: int = 4, max_frames: int = 768
) -> np.ndarray:
    """Indices of frames spread evenly over the whole video, `fps` of them per second.

    At least `min_frames` and at most `max_frames`, but no more than there are. int64 `[n]`; the
    rule and the defaults of Qwen3-VL's video processor (`sample_frames`).

    Raises:
        ValueError: the rate is not positive, or no number of frames is allowed.
    """
    if not fps > 0 or not 1 <= min_frames <= max_frames:
        raise ValueError(
            f"fps={fps}, min_frames={min_frames}, max_frames={max_frames}: choose a positive rate "
            "and 1 <= min_frames <= max_frames"
        )
    count = int(info.frames / info.fps * fps)
    return overview_indices(info.frames, min(max(count, min_frames), max_frames))


def clip_indices(info: VideoInfo, start: float, end: float, fps: float, cap: int) -> np.ndarray:
    """Indices of the frames on screen at evenly spaced moments of the window [start, end).

    The window is half-open, so that neighbouring windows share no frame and a window of
    `cap / fps` seconds is sampled at exactly `fps`. int64 `[n]`, `1 <= n <= cap`.

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
    # The small term keeps 3.0 s * 10 fps = 29.999... on frame 30.
    indices = np.floor(moments * info.fps + 1e-6).astype(np.int64)
    return np.unique(np.minimum(indices, info.frames - 1))


class VideoReader:
    """Implements `FrameReader`: overview and crop frames of video files, cached in memory.

    Args:
        crop_fps: sampling rate of `clip`, frames per second.
        crop_cap: most frames that one `clip` returns.
        cache_bytes: bound on the decoded frames kept; the least recently used videos go first.
        spec: the size that frames are resized to before they are cached, so that no
            full-resolution frame is held. Without it frames keep the size of the file.
        overview_tokens: most vision tokens of an overview; None leaves that to the spec.

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
    ):
        if not crop_fps > 0 or crop_cap < 1:
            raise ValueError(
                f"crop_fps={crop_fps}, crop_cap={crop_cap}: a crop needs a positive rate and "
                "at least one frame"
            )
        self._crop_fps, self._crop_cap = crop_fps, crop_cap
        self._cache_bytes, self._spec = cache_bytes, spec
        self._overview_tokens = overview_tokens
        self._clear()

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._frames: OrderedDict[Key, Decoded] = OrderedDict()
        self._coming: dict[Key, dict[int, Future[Decoded]]] = {}
        self._infos: dict[str, VideoInfo] = {}
        self._held = self._asked = self._decoded = 0

    def __getstate__(self) -> dict:
        kept = ("_crop_fps", "_crop_cap", "_cache_bytes", "_spec", "_overview_tokens")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._clear()

    @property
    def cached_bytes(self) -> int:
        """Bytes of decoded frames held now."""
        return self._held

    @property
    def figures(self) -> dict[str, float]:
        """Frames asked for and frames decoded so far, and bytes held, for `metrics.jsonl`."""
        return {
            "frames/asked": float(self._asked),
            "frames/decoded": float(self._decoded),
            "frames/cache_bytes": float(self._held),
        }

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

    def info(self, video: VideoRef) -> VideoInfo:
        """Stream properties of the file, probed once."""
        if video.path not in self._infos:
            self._infos[video.path] = probe(video.path)
        return self._infos[video.path]

    def _read(
        self, path: str, info: VideoInfo, indices: np.ndarray, tokens: int | None = None
    ) -> Frames:
        wanted = indices.tolist()
        key = (path, self._target_size(info, len(wanted), tokens))
        small = info.frames * info.height * info.width * 3 <= WHOLE_BYTES
        with self._lock:
            self._asked += len(wanted)
        found = None
        while found is None:
            found = self._gather(key, wanted, range(info.frames) if small else ())
        frames = complete(path, found)
        return Frames(np.stack([frames[index] for index in wanted]), indices / info.fps)

    def _gather(self, key: Key, wanted: Sequence[int], others: Sequence[int]) -> Decoded | None:
        """The frames wanted, from the cache, from this thread or from another one; None if another
        one failed, whose request may have been at fault."""
        found, awaited, mine, promise = self._claim(key, wanted, others)
        if mine:
            found |= self._decode(key, mine, promise)
        for index, future in awaited.items():
            if future.exception() is not None:
                return None
            found[index] = future.result()[index]
        return {index: found[index] for index in wanted}

    def _claim(
        self, key: Key, wanted: Sequence[int], others: Sequence[int]
    ) -> tuple[Decoded, dict[int, Future[Decoded]], list[int], Future[Decoded]]:
        """What the cache holds, what is on its way, what this thread must decode, and where to.

        If anything has to be decoded, so are `others`, unless they are held or on their way.
        """
        promise: Future[Decoded] = Future()
        with self._lock:
            held, coming = self._frames.get(key, {}), self._coming.setdefault(key, {})
            if held:
                self._frames.move_to_end(key)
            missing = [index for index in wanted if index not in held and index not in coming]
            if missing:
                more = [index for index in others if index not in held and index not in coming]
                missing = sorted({*missing, *more})
            found = {index: held[index] for index in wanted if index in held}
            awaited = {index: coming[index] for index in wanted if index in coming}
            coming.update(dict.fromkeys(missing, promise))
        return found, awaited, missing, promise

    def _decode(self, key: Key, mine: list[int], promise: Future[Decoded]) -> Decoded:
        """Decode what was claimed, for the cache and for everybody who waits for it."""
        try:
            present = decode_present(key[0], mine, key[1])
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

    def _target_size(self, info: VideoInfo, count: int, tokens: int | None) -> Size:
        """Of `count` frames shown together, within `tokens` vision tokens if given.

        Raises:
            ValueError: tokens are given, and there is no `spec` to say what they are.
        """
        if tokens is not None:
            if self._spec is None:
                raise ValueError(f"tokens={tokens}: give the reader the spec that they are of")
            return self._spec.size_within(info.height, info.width, count, tokens)
        if self._spec is None:
            return info.height, info.width
        return self._spec.target_size(info.height, info.width, count)

    def _store(self, key: Key, decoded: Decoded) -> None:
        # A file's frames are kept apart by size: as video, few are shown larger than many.
        held = self._frames.setdefault(key, {})
        self._frames.move_to_end(key)
        self._held -= _size(held)
        held.update(decoded)
        self._held += _size(held)
        while self._held > self._cache_bytes:
            _, dropped = self._frames.popitem(last=False)
            self._held -= _size(dropped)


def decode(path: str, indices: Sequence[int], size: Size | None = None) -> dict[int, np.ndarray]:
    """Decode the frames at `indices` (ascending) as RGB uint8 `[h, w, 3]`, resized to `size`.

    Containers often announce a few frames too many; those stand as copies of the last frame
    that could be decoded.

    Raises:
        ValueError: fewer than half of the frames could be decoded.
    """
    present = decode_present(path, indices, size)
    return complete(path, {index: present.get(index) for index in indices})


def complete(path: str, frames: Decoded) -> dict[int, np.ndarray]:
    """Frames in ascending order, with copies of the last one present in the places of absent ones.

    Raises:
        ValueError: fewer than half of them are present.
    """
    present = [frame for frame in frames.values() if frame is not None]
    if 2 * len(present) < len(frames) or not present:
        raise ValueError(
            f"video {path}: only {len(present)} of {len(frames)} frames can be decoded; {REMEDY}"
        )
    return {index: present[-1] if frame is None else frame for index, frame in frames.items()}


def decode_present(
    path: str, indices: Sequence[int], size: Size | None = None
) -> dict[int, np.ndarray]:
    """As `decode`, without the frames that cannot be decoded.

    Raises:
        ValueError: the file cannot be opened.
    """
    capture = _open(path)
    frames: dict[int, np.ndarray] = {}
    for index in indices:
        # What lies between two frames may be damaged: a second attempt goes straight to the frame.
        image = _grab(capture, index)
        if image is None:
            image = _grab(capture, index, seek=True)
        if image is not None:
            frames[index] = image if size is None else resize(image, size)
    capture.release()
    return frames


def _grab(capture: cv2.VideoCapture, index: int, seek: bool = False) -> np.ndarray | None:
    """Frame `index` as RGB, which lies at or after the capture's position unless `seek`."""
    position = int(capture.get(cv2.CAP_PROP_POS_FRAMES))
    if seek or index - position > SEEK_GAP:
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        position = index
    if not all(capture.grab() for _ in range(index - position + 1)):
        return None
    ok, image = capture.retrieve()
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB) if ok else None


def _open(path: str) -> cv2.VideoCapture:
    if not os.path.isfile(path):
        raise ValueError(f"video {path}: no such file; {REMEDY}")
    # One thread per capture: Grain reads many files side by side, and starting FFmpeg's own
    # threads takes four times as long as decoding a small video.
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise ValueError(f"video {path}: OpenCV cannot open it; {REMEDY}")
    return capture


def _size(frames: Decoded) -> int:
    return sum(frame.nbytes for frame in frames.values() if frame is not None)
