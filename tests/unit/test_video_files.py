"""Video files of all kinds: each reads as ffmpeg reads it, or is refused with a reason."""

import dataclasses

import cv2
import numpy as np
import pytest

from paravt_jax.records import VideoRef
from pipelines import decode
from pipelines.decode import probe, video_ref
from pipelines.decoders import DECODERS, OpenCvDecoder
from pipelines.preprocess import VideoSpec
from pipelines.video import VideoReader
from tests.support.ffmpeg import ffmpeg, frame_pixels, frame_times, numbered

pytestmark = pytest.mark.slow

X264 = ("-c:v", "libx264", "-g", "12", "-bf", "2", "-pix_fmt", "yuv420p")
BURSTS = ("-vf", "select='if(between(t,1,2)+gt(t,6),not(mod(n,29)),1)'", "-fps_mode", "vfr")
"""30 frames per second, but for two stretches with one per second."""


def plain(folder, seconds=8, *more):
    ffmpeg(*numbered(seconds=seconds), *X264, *more, folder / "plain.mp4")
    return folder / "plain.mp4"


def remuxed(folder, name, *before):
    """Other containers for the same packets; `before` belongs to the input."""
    ffmpeg(*before, "-i", plain(folder), "-c", "copy", folder / name)
    return folder / name


def encoded(folder, name, *arguments, **source):
    ffmpeg(*numbered(**source), *arguments, folder / name)
    return folder / name


def variable_mkv(folder):
    ffmpeg("-i", encoded(folder, "v.mp4", *BURSTS, *X264, rate=30), "-c", "copy", folder / "v.mkv")
    return folder / "v.mkv"


def without_duration(folder):
    ffmpeg("-i", plain(folder), "-c", "copy", "-live", "1", "-f", "matroska", folder / "live.mkv")
    return folder / "live.mkv"


def beside_sound(folder):
    """The sound begins two seconds before the pictures."""
    sound = ("-f", "lavfi", "-i", "sine=duration=4")
    ffmpeg(*sound, "-itsoffset", "2", *numbered(), *X264, folder / "sound.mp4")
    return folder / "sound.mp4"


def wrongly_named(folder):
    return plain(folder).rename(folder / "plain.txt")


def linked(folder):
    (folder / "link.mp4").symlink_to(plain(folder))
    return folder / "link.mp4"


ODD = ("-c:v", "libx264", "-pix_fmt", "yuv444p")
READ = {
    "constant rate": plain,
    "variable rate": lambda f: encoded(f, "v.mp4", *BURSTS, *X264, rate=30, seconds=9),
    "variable rate in milliseconds": variable_mkv,
    "rotated": lambda f: remuxed(f, "r.mp4", "-display_rotation", "90"),
    "odd size": lambda f: encoded(f, "odd.mp4", *ODD, size="65x49"),
    "no duration in the header": without_duration,
    "one frame": lambda f: encoded(f, "one.mp4", "-frames:v", "1", *X264),
    "beginning cut by an edit list": lambda f: remuxed(f, "e.mp4", "-ss", "1.55"),
    "open groups of pictures": lambda f: encoded(f, "o.mp4", *X264, "-flags", "-cgop"),
    "transport stream": lambda f: remuxed(f, "t.ts"),
    "times lost at the end": lambda f: encoded(f, "a.avi", "-c:v", "mpeg4", "-bf", "2", seconds=8),
    "packets without times": lambda f: encoded(f, "p.mpg", "-c:v", "mpeg2video", seconds=9),
    "fragments": lambda f: remuxed(f, "f.mp4"),
    "gif": lambda f: encoded(f, "g.gif"),
    "beside sound": beside_sound,
    "wrong extension": wrongly_named,
    "link": linked,
}


def interlaced(folder, name, *arguments, size="64x48"):
    """20 frames of 40 fields of different moments."""
    source = f"testsrc2=size={size}:rate=50:duration=0.8"
    ffmpeg("-f", "lavfi", "-i", source, "-vf", "interlace", *arguments, folder / name)
    return folder / name


def partly_interlaced(folder):
    """Nothing at its beginning announces what follows."""
    steady = encoded(folder, "steady.ts", *X264, rate=25, seconds=1)
    woven = interlaced(folder, "woven.ts", *X264, "-flags", "+ilme+ildct")
    ffmpeg("-i", f"concat:{steady}|{woven}", "-c", "copy", folder / "both.ts")
    return folder / "both.ts"


WOVEN = ("-flags", "+ilme+ildct")
BEYOND_OPENCV = {
    "H.264": lambda f: interlaced(f, "i.mp4", *X264, *WOVEN, "-x264-params", "tff=1"),
    "HEVC": lambda f: interlaced(
        f, "i.mp4", "-c:v", "libx265", "-x265-params", "interlace=tff:log-level=error"
    ),
    # Encoded by one thread: with several, a busy machine now and then writes other time stamps.
    "MPEG-2": lambda f: interlaced(f, "i.mpg", "-c:v", "mpeg2video", "-threads", "1", *WOVEN),
    "MPEG-4": lambda f: interlaced(f, "i.mp4", "-c:v", "mpeg4", *WOVEN),
    "DV": lambda f: interlaced(
        f, "i.avi", "-c:v", "dvvideo", "-pix_fmt", "yuv420p", size="720x576"
    ),
    "AV1": lambda f: encoded(f, "a.mp4", "-c:v", "libaom-av1", "-cpu-used", "8", seconds=2),
}


@pytest.mark.parametrize("make", BEYOND_OPENCV.values(), ids=list(BEYOND_OPENCV))
def test_what_opencv_cannot_read_is_read_as_ffmpeg_reads_it(make, tmp_path):
    path = make(tmp_path)
    info = probe(str(path))
    assert info.decoder == "ffmpeg"
    np.testing.assert_allclose(info.times - info.times[0], frame_times(path), atol=1e-3)
    check_pixels(path, info, atol=3)


def test_interlaced_frames_among_others_are_seen(tmp_path):
    """The file looks like one for OpenCV, which does not tell that it cannot convert its end."""
    path = partly_interlaced(tmp_path)
    info = probe(str(path))
    assert info.decoder == "opencv" and info.frames > 40
    check_pixels(path, info, atol=3)


@pytest.mark.skipif(
    tuple(map(int, cv2.__version__.split(".")[:2])) < (4, 13),
    reason="OpenCV before 4.13 converts interlaced frames",
)
def test_opencv_gives_no_frame_that_it_has_not_written(tmp_path):
    decoder = OpenCvDecoder(str(BEYOND_OPENCV["H.264"](tmp_path)))
    assert decoder.grab()
    rest = [decoder.image() for _ in range(10) if decoder.grab()]
    assert len(rest) == 10 and all(image is None for image in rest)


def test_frames_that_repeat_the_one_before_are_shown(tmp_path):
    source = ("-f", "lavfi", "-i", "color=red:size=64x48:rate=10:duration=9")
    ffmpeg(*source, "-c:v", "mpeg4", tmp_path / "still.mp4")
    info = probe(str(tmp_path / "still.mp4"))
    assert info.decoder == "opencv" and info.frames == 90
    check_pixels(tmp_path / "still.mp4", info, atol=3)


def check_pixels(path, info, atol):
    """All frames, and one alone, are what ffmpeg shows."""
    pixels = frame_pixels(path, info.height, info.width).astype(int)
    for indices in (list(range(info.frames)), [info.frames - 2]):
        frames = decode.decode_present(str(path), info, indices)
        assert list(frames) == indices
        for index, frame in frames.items():
            assert np.abs(pixels[index] - frame).max() <= atol


@pytest.fixture(params=list(DECODERS))
def every_decoder(request, monkeypatch):
    """Files that OpenCV reads are read by PyAV as well."""
    if request.param != "opencv":
        found = decode.probe
        monkeypatch.setattr(
            decode, "probe", lambda path: dataclasses.replace(found(path), decoder=request.param)
        )


@pytest.mark.usefixtures("every_decoder")
@pytest.mark.parametrize("make", READ.values(), ids=list(READ))
def test_files_are_read_as_ffmpeg_reads_them(make, tmp_path, monkeypatch):
    """All frames at once, and some alone, by seeking with FFmpeg's threads as in large files; times
    to the millisecond."""
    monkeypatch.setattr(decode, "SEEK_GAP", 4)
    path = make(tmp_path)
    info, times = probe(str(path)), frame_times(path)
    np.testing.assert_allclose(info.times - info.times[0], times, atol=1e-3)
    pixels = frame_pixels(path, info.height, info.width)
    assert len(pixels) == info.frames
    for wanted in (range(info.frames), *([i] for i in range(0, info.frames, 7))):
        shown = decode.decode_present(str(path), info, wanted)
        assert [nearest(frame, pixels) for frame in shown.values()] == list(wanted)
        monkeypatch.setattr(decode, "LARGE", 0)


def nearest(frame: np.ndarray, pixels: np.ndarray) -> int:
    """The most similar frame of ffmpeg's, which must be very similar."""
    errors = np.abs(pixels.astype(int) - frame).mean(axis=(1, 2, 3))
    assert errors.min() < 2
    return int(errors.argmin())


def test_rotation_swaps_height_and_width(tmp_path):
    info = probe(str(READ["rotated"](tmp_path)))
    assert (info.height, info.width) == (64, 48)


@pytest.mark.parametrize(
    ("make", "seconds"),
    [(plain, 8), (without_duration, 8), (READ["one frame"], 0.1), (READ["variable rate"], 8.73)],
)
def test_durations(make, seconds, tmp_path):
    path = str(make(tmp_path))
    assert video_ref(path).duration == pytest.approx(seconds, abs=0.05)
    assert probe(path).duration == pytest.approx(seconds, abs=0.05)


@pytest.mark.parametrize("name", ["cut.mp4", "cut.mov", "cut.mkv", "cut.ts"])
@pytest.mark.parametrize("start", ["0", "3.7"])
def test_a_clip_cut_without_encoding_is_as_long_as_what_it_shows(name, start, tmp_path):
    """MP4 and MOV keep packets that are not shown, from the key frame before the beginning on."""
    source = plain(tmp_path, 12, "-g", "50")
    ffmpeg("-ss", start, "-t", "3.16", "-i", source, "-c", "copy", tmp_path / name)
    path = str(tmp_path / name)
    times = frame_times(tmp_path / name)
    shown = times[-1] + 0.1
    assert video_ref(path).duration == pytest.approx(shown, abs=0.021)
    assert probe(path).duration == pytest.approx(shown, abs=0.021)
    assert probe(path).frames == len(times)


def test_a_crop_shows_what_is_on_screen_whatever_the_rate(tmp_path):
    """A moment between two frames shows the earlier one."""
    path = READ["variable rate"](tmp_path)
    frames = VideoReader(crop_fps=4.0).clip(video_ref(str(path)), 0.5, 4.5)
    times, moments = frame_times(path), 0.5 + np.arange(16) / 4
    expected = [times[times <= moment + 1e-6].max() for moment in moments]
    np.testing.assert_allclose(frames.times, np.unique(expected), atol=1e-3)


def test_three_hours_are_sought(tmp_path, monkeypatch):
    """Few frames are decoded, and they are the right ones."""
    path = encoded(tmp_path, "long.mp4", *X264, rate="1/4", seconds=3 * 3600, size="32x32")
    grabs = count_grabs(monkeypatch)
    reader = VideoReader(crop_fps=0.25)
    overview = reader.overview(video_ref(str(path)), 4)
    crop = reader.clip(video_ref(str(path)), 9000.0, 9016.0)
    assert 0 < sum(grabs) < 2700 / 4
    times, pixels = frame_times(path), frame_pixels(path, 32, 32)
    for frames, expected in ((overview, (0, 900, 1799, 2699)), (crop, range(2250, 2254))):
        np.testing.assert_allclose(frames.times, times[list(expected)], atol=1e-3)
        assert [nearest(frame, pixels) for frame in frames.pixels] == list(expected)


def count_grabs(monkeypatch) -> list[int]:
    grabs: list[int] = []
    step = decode._Cursor._next
    monkeypatch.setattr(decode._Cursor, "_next", lambda walk: grabs.append(1) or step(walk))
    return grabs


def test_four_k_is_read_at_the_size_that_is_shown(tmp_path):
    quick = ("-c:v", "libx264", "-preset", "ultrafast")
    source = "testsrc=size=3840x2160:rate=2:duration=1.5"
    path = tmp_path / "4k.mp4"
    ffmpeg("-f", "lavfi", "-i", source, *quick, path)
    spec = VideoSpec(patch_size=8, min_pixels=256, max_pixels=4 * 48 * 32)
    reader = VideoReader(spec=spec)
    frames = reader.overview(video_ref(str(path)), 3)
    assert frames.pixels.shape[1:] == (*spec.target_size(2160, 3840, 3), 3)
    assert reader._frames.held == frames.pixels.nbytes
    np.testing.assert_allclose(frames.times, [0, 0.5, 1.0])


# --- what is refused --------------------------------------------------------------------------


def text(folder, content="no video"):
    (folder / "text.mp4").write_text(content)
    return folder / "text.mp4"


def cut(source, share=0.5):
    data = source.read_bytes()
    source.write_bytes(data[: int(len(data) * share)])
    return source


def zero_frames(folder):
    """A file that ends where its frames would begin."""
    source = without_duration(folder)
    data = source.read_bytes()
    source.write_bytes(data[: data.index(b"\x1f\x43\xb6\x75")])
    return source


def playlist(folder):
    """It names another file, which must not be opened through it."""
    return text(folder, f"#EXTM3U\n#EXTINF:8,\n{remuxed(folder, 't.ts')}\n#EXT-X-ENDLIST\n")


def concatenation(folder):
    return text(folder, f"ffconcat version 1.0\nfile {plain(folder).name}\n")


def overwritten(folder):
    """Most of the pictures are zeros."""
    path = plain(folder)
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 4
    data[begin : data.index(b"moov") - 4] = bytes(data.index(b"moov") - 4 - begin)
    path.write_bytes(data)
    return path


REFUSED = {
    "missing": (lambda f: f / "absent.mp4", "no such file"),
    "folder": (lambda f: f, "it is a folder"),
    "dangling link": (lambda f: linked(f).rename(f / "d.mp4"), "no such file"),
    "empty": (lambda f: text(f, ""), "finds no video"),
    "text": (text, "finds no video"),
    "playlist": (playlist, "finds no video"),
    "list of files": (concatenation, "finds no video"),
    "sound only": (
        lambda f: ffmpeg("-f", "lavfi", "-i", "sine=duration=2", f / "s.mp4") or f / "s.mp4",
        "finds no video",
    ),
    "zero frames": (zero_frames, "finds no video"),
    "cut before its index": (lambda f: cut(plain(f)), "finds no video"),
    "cut after its index": (
        lambda f: cut(plain(f, 60, "-movflags", "faststart"), 0.6),
        r"cut off after \d+\.\d s of the 60\.0 s",
    ),
    "no times": (lambda f: remuxed(f, "raw.h264"), "does not tell when its frames are shown"),
    "overwritten": (overwritten, "no frame can be decoded|cut off"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_files_are_refused_with_a_reason(make, reason, tmp_path):
    path = make(tmp_path)
    if make is REFUSED["dangling link"][0]:
        (tmp_path / "plain.mp4").unlink()
    with pytest.raises(ValueError, match=reason) as refusal:
        VideoReader().overview(VideoRef(str(path), 4.0), 4)
    assert str(refusal.value).startswith(f"video {path}: ")


def test_damage_leaves_the_rest_of_a_file_readable(tmp_path):
    path = encoded(tmp_path, "d.mp4", *X264, seconds=12)
    pixels = frame_pixels(path, 48, 64)
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (data.index(b"moov") - data.index(b"mdat")) // 2
    data[middle : middle + 600] = bytes(600)
    path.write_bytes(data)
    frames = VideoReader().overview(VideoRef(str(path), 12.0), 12)
    expected = pixels[np.round(frames.times * 10).astype(int)].astype(int)
    errors = np.abs(expected - frames.pixels).mean(axis=(1, 2, 3))
    assert frames.times[-1] > 11.5 and (errors < 2).sum() >= 10
