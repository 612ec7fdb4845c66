"""Frames of real mp4 files: which, at what times, and what happens when a file is broken."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from paravt_jax.records import VideoRef
from pipelines import decode, video
from pipelines.container import UnreadableVideo
from pipelines.decode import complete, decode_present, probe, video_ref
from pipelines.needle.world import write_mp4
from pipelines.preprocess import ImageSpec, VideoSpec
from pipelines.video import VideoReader, clip_indices, overview_indices
from tests.support.videos import steady

COUNT, FPS, SIDE = 150, 10.0, 48


def grey(index: int) -> int:
    """Grey level of a frame: neighbours differ by 37 or more, compression errs by less than 8."""
    return 20 + (index * 37) % 200


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory) -> VideoRef:
    """15 s at 10 fps; every frame has a grey level of its own kind."""
    path = str(tmp_path_factory.mktemp("video") / "grey.mp4")
    frames = np.stack([np.full((SIDE, SIDE, 3), grey(i), np.uint8) for i in range(COUNT)])
    write_mp4(path, frames, FPS)
    return video_ref(path)


def levels(frames) -> np.ndarray:
    return frames.pixels.mean(axis=(1, 2, 3))


def test_probe_reads_the_stream(clip_file):
    info = probe(clip_file.path)
    assert (info.frames, info.height, info.width) == (COUNT, SIDE, SIDE)
    assert info.duration == pytest.approx(15.0)
    assert clip_file.duration == pytest.approx(15.0)


def test_overview_spreads_from_first_to_last_frame(clip_file):
    frames = VideoReader().overview(clip_file, 4)
    np.testing.assert_allclose(frames.times, np.array([0, 50, 99, 149]) / FPS)
    np.testing.assert_allclose(levels(frames), [grey(i) for i in (0, 50, 99, 149)], atol=8)


def test_overview_of_a_short_video_shows_every_frame_once():
    assert overview_indices(3, 8).tolist() == [0, 1, 2]


def test_clip_is_half_open_and_samples_at_its_rate(clip_file):
    frames = VideoReader(crop_fps=2.0).clip(clip_file, 3.0, 6.0)
    np.testing.assert_allclose(frames.times, [3.0, 3.5, 4.0, 4.5, 5.0, 5.5])
    np.testing.assert_allclose(levels(frames), [grey(i) for i in range(30, 60, 5)], atol=8)


def test_clip_cap_spreads_frames_over_the_window(clip_file):
    frames = VideoReader(crop_fps=10.0, crop_cap=5).clip(clip_file, 0.0, 15.0)
    np.testing.assert_allclose(frames.times, [0, 3, 6, 9, 12])


def test_clip_is_cut_at_the_ends_of_the_video(clip_file):
    frames = VideoReader().clip(clip_file, -2.0, 400.0)
    assert frames.times.min() >= 0 and frames.times.max() < 15


def test_clip_of_a_moment_is_one_frame():
    info = steady(100, 10.0)
    assert clip_indices(info, 2.0, 2.01, fps=1.0, cap=16).tolist() == [20]


@pytest.mark.parametrize("window", [(5.0, 5.0), (6.0, 5.0), (15.0, 20.0)])
def test_empty_windows_are_refused(clip_file, window):
    with pytest.raises(ValueError, match="empty in a video of 15 s"):
        VideoReader().clip(clip_file, *window)


def test_seeking_finds_the_same_frames_as_reading_on(clip_file, monkeypatch):
    wanted, info = [3, 90, 140], probe(clip_file.path)
    seeking = decode_present(clip_file.path, info, wanted)
    monkeypatch.setattr(decode, "SEEK_GAP", 10**6)
    for index, frame in decode_present(clip_file.path, info, wanted).items():
        np.testing.assert_array_equal(seeking[index], frame)


def test_cache_answers_without_the_file_and_keeps_its_bound(tmp_path):
    refs = []
    for name in "abc":
        path = str(tmp_path / f"{name}.mp4")
        write_mp4(path, np.full((20, 32, 32, 3), ord(name), np.uint8), 1.0)
        refs.append(video_ref(path))
    reader = VideoReader(cache_bytes=2 * 20 * 32 * 32 * 3)
    first = [reader.overview(ref, 4) for ref in refs]
    assert reader._frames.held <= 2 * 20 * 32 * 32 * 3
    for ref in refs:
        (tmp_path / ref.path).unlink()
    np.testing.assert_array_equal(reader.overview(refs[2], 4).pixels, first[2].pixels)
    with pytest.raises(ValueError, match=r"a\.mp4: no such file"):
        reader.overview(refs[0], 4)


def test_reader_resizes_before_it_caches(clip_file):
    reader = VideoReader(spec=ImageSpec(patch_size=8, min_pixels=256, max_pixels=256))
    assert reader.overview(clip_file, 4).pixels.shape == (4, 16, 16, 3)
    assert reader._frames.held == COUNT * 16 * 16 * 3


def test_frames_of_one_file_are_kept_apart_by_size(clip_file):
    """As video, few frames are larger than many; what was read before does not matter."""
    spec = VideoSpec(patch_size=8, min_pixels=256, max_pixels=4 * 32 * 32)
    reader = VideoReader(spec=spec)
    for count, side in ((4, 32), (16, 16), (4, 32)):
        shown = reader.overview(clip_file, count)
        assert shown.pixels.shape == (count, side, side, 3)
        fresh = VideoReader(spec=spec).overview(clip_file, count)
        np.testing.assert_array_equal(shown.pixels, fresh.pixels)


def test_a_lone_frame_of_a_video_is_shown(clip_file):
    """A crop of a moment: transformers' processor refuses one frame, a crop must not."""
    reader = VideoReader(spec=VideoSpec(patch_size=8))
    assert reader.clip(clip_file, 2.0, 2.01).pixels.shape == (1, 48, 48, 3)


def test_threads_that_ask_at_once_decode_every_frame_once(clip_file, monkeypatch):
    """Overlapping requests of four threads: each frame is decoded once, all get their frames."""
    monkeypatch.setattr(video, "WHOLE_BYTES", 0)
    calls: list[list[int]] = []
    together = threading.Barrier(4)

    def slow(path, info, indices, size):
        calls.append(list(indices))
        time.sleep(0.05)
        return original(path, info, indices, size)

    original = video.decode_present
    monkeypatch.setattr(video, "decode_present", slow)
    reader = VideoReader(crop_fps=2.0)

    def ask(start: float):
        together.wait()
        return reader.clip(clip_file, start, start + 6.0)

    with ThreadPoolExecutor(4) as pool:
        shown = list(pool.map(ask, (0.0, 0.0, 3.0, 3.0)))
    assert sorted(index for asked in calls for index in asked) == list(range(0, 90, 5))
    for frames, start in zip(shown, (0, 0, 30, 30), strict=True):
        np.testing.assert_allclose(
            levels(frames), [grey(start + i) for i in range(0, 60, 5)], atol=8
        )
    metrics = reader.take_metrics()
    assert (metrics["frames/asked"], metrics["frames/decoded"]) == (48, 18)
    assert metrics["frames/cache_hits"] == 48 - 18
    assert metrics["frames/decode_seconds"] > 2 * 0.05
    assert reader._frames.held == 18 * SIDE * SIDE * 3
    assert set(reader.take_metrics().values()) == {0.0}


def test_a_thread_whose_decoding_fails_does_not_fail_another(clip_file, monkeypatch):
    monkeypatch.setattr(video, "WHOLE_BYTES", 0)
    began, fail = threading.Event(), threading.Event()
    original = video.decode_present

    def once(path, info, indices, size):
        monkeypatch.setattr(video, "decode_present", original)
        began.set()
        fail.wait()
        raise OSError("the disk hiccups")

    monkeypatch.setattr(video, "decode_present", once)
    reader = VideoReader(crop_fps=2.0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(reader.clip, clip_file, 0.0, 4.0)
        began.wait()
        second = pool.submit(reader.clip, clip_file, 2.0, 4.0)
        time.sleep(0.05)
        fail.set()
        with pytest.raises(OSError, match="hiccups"):
            first.result()
        np.testing.assert_allclose(
            levels(second.result()), [grey(i) for i in (20, 25, 30, 35)], atol=8
        )


def test_absent_frames_are_copies_within_each_request(clip_file):
    """What stands for a frame that is listed but cannot be decoded does not depend on who asked for
    it first."""
    shown, info = [], steady(160, FPS, SIDE, SIDE)
    for first in (148, 100):
        reader = VideoReader()
        for index in (first, 248 - first):
            frames = reader._read(clip_file.path, info, np.array([index, 155]))
            np.testing.assert_array_equal(frames.pixels[0], frames.pixels[1])
            shown.append((index, frames.pixels[1]))
    np.testing.assert_array_equal(shown[0][1], shown[3][1])
    np.testing.assert_array_equal(shown[1][1], shown[2][1])


def test_a_file_that_takes_too_long_is_given_up_and_named(clip_file):
    reader = VideoReader(decode_seconds=1e-4)
    for _ in range(2):
        with pytest.raises(UnreadableVideo, match=r"grey\.mp4: .*data\.decode_seconds=0\.0001"):
            pickle.loads(pickle.dumps(reader)).overview(clip_file, 4)
    assert len(VideoReader(decode_seconds=60).overview(clip_file, 4).times) == 4


def test_a_file_that_hangs_holds_up_one_request_for_its_time(clip_file, monkeypatch):
    """The thread that hangs stays behind; others decode on, and nobody waits for the file again."""
    release, tries = threading.Event(), []
    original = video.probe

    def hanging(path):
        tries.append(path)
        return original(path) if path == clip_file.path else release.wait()

    monkeypatch.setattr(video, "probe", hanging)
    reader, stuck = VideoReader(decode_seconds=0.5), VideoRef("/mnt/stuck.mp4", 4.0)
    began = time.monotonic()
    for _ in range(40):  # twenty seconds, if each waited
        with pytest.raises(UnreadableVideo, match=r"stuck\.mp4: decoding takes longer"):
            reader.overview(stuck, 4)
    assert 0.5 <= time.monotonic() - began < 15
    assert len(reader.overview(clip_file, 4).times) == 4
    assert tries == [stuck.path, clip_file.path]
    release.set()


def test_reader_goes_to_another_process(clip_file):
    reader = VideoReader(crop_fps=2.0, crop_cap=3)
    reader.overview(clip_file, 2)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._frames.held == 0
    assert len(copy.clip(clip_file, 0.0, 15.0).times) == 3


def test_absent_frames_are_copies_of_the_one_before():
    first, second = np.zeros((1, 1, 3), np.uint8), np.ones((1, 1, 3), np.uint8)
    frames = complete("a.mp4", {3: None, 4: first, 5: None, 7: second, 9: None, 11: second})
    assert [int(frame[0, 0, 0]) for frame in frames.values()] == [0, 0, 0, 1, 1, 1]


def test_mostly_missing_frames_are_an_error(clip_file):
    info = steady(800, FPS, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"grey\.mp4: only 1 of 4 frames"):
        VideoReader()._read(clip_file.path, info, np.array([10, 500, 600, 700]))


@pytest.mark.parametrize("options", [{"crop_fps": 0.0}, {"crop_cap": 0}])
def test_reader_refuses_options_that_show_nothing(options):
    with pytest.raises(ValueError, match="positive rate"):
        VideoReader(**options)


def test_overview_refuses_no_frames(clip_file):
    with pytest.raises(ValueError, match="count=0"):
        VideoReader().overview(clip_file, 0)


@pytest.mark.parametrize("kind", [ImageSpec, VideoSpec])
@pytest.mark.parametrize("tokens", [1, 4, 7, 16, 64])
@pytest.mark.parametrize("size", [(48, 48), (360, 640), (640, 360)])
def test_a_clip_keeps_to_its_quota_of_vision_tokens(kind, tokens, size):
    spec = kind().limited(32 * 32, 128 * 128)
    for count in range(1, spec.frames_within(tokens) + 1):
        height, width = spec.size_within(*size, count, tokens)
        each = (height // spec.factor) * (width // spec.factor)
        assert each >= 1 and each * spec.group_count(count) <= tokens
        assert height * width <= 128 * 128


def test_a_larger_quota_shows_more_and_larger_frames(clip_file):
    reader = VideoReader(2.0, 16, spec=ImageSpec(min_pixels=32 * 32, max_pixels=64 * 64))
    shapes = [reader.clip(clip_file, 0.0, 6.0, tokens).pixels.shape[:3] for tokens in (4, 12, 48)]
    assert shapes == [(4, 32, 32), (12, 32, 32), (12, 64, 64)]
    assert reader.clip(clip_file, 0.0, 6.0).pixels.shape[:3] == (12, 64, 64)
    with pytest.raises(ValueError, match="spec"):
        VideoReader().clip(clip_file, 0.0, 6.0, tokens=4)
    shared = VideoReader(spec=ImageSpec(min_pixels=32 * 32, max_pixels=64 * 64), overview_tokens=8)
    copy = pickle.loads(pickle.dumps(shared))
    assert copy.overview(clip_file, 8).pixels.shape[:3] == (8, 32, 32)
    assert copy.overview(clip_file, 2).pixels.shape[:3] == (2, 64, 64)
