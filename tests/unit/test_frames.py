"""Frames to patches: sizes, order, values; transformers is asked in parity/test_preprocessing."""

import numpy as np
import pytest

from paravt_jax.patches import FrameRows, join_patches, normalised, stack_patches
from paravt_jax.records import Patches
from pipelines.preprocess import SPECS, ImageSpec, VideoSpec, resize, to_patches

TINY = ImageSpec(patch_size=4, min_pixels=64, max_pixels=4096)
TINY_VIDEO = VideoSpec(patch_size=4, min_pixels=64, max_pixels=4096)


def random_frames(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode", SPECS)
@pytest.mark.parametrize("max_pixels", [64, 100, 4096, 5000])
def test_most_patches_hold_every_frame_in_whole_merged_blocks(mode, max_pixels):
    """The tower merges blocks of patches, so its padding must be a number of blocks."""
    spec = SPECS[mode](patch_size=4).limited(64, max_pixels)
    assert spec.max_patches % spec.merge_size**2 == 0
    for height, width in ((8, 8), (40, 90), (333, 200), (64, 64), (72, 64)):
        for count in range(1, 12):
            size = spec.target_size(height, width, count)
            rows, columns = (side // spec.patch_size for side in size)
            assert rows * columns <= spec.max_patches


@pytest.mark.parametrize("spec", [TINY_VIDEO, TINY_VIDEO.limited(64, 640)])
def test_most_patches_of_a_video_are_reached(spec):
    """Two frames share the budget of all; under a limit per frame, five are weighed as four."""
    sides = range(24, 160, 8)  # no slivers, which may exceed every limit
    sizes = [spec.target_size(h, w, n) for h in sides for w in sides for n in (2, 5)]
    most = max(height * width for height, width in sizes)
    assert most // spec.patch_size**2 == spec.max_patches


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((32, 32), (256, 256)),
        ((360, 640), (352, 640)),
        ((1000, 30), (1504, 64)),
        ((6000, 8000), (3520, 4704)),
    ],
)
def test_target_size_keeps_multiples_and_limits(size, expected):
    spec = ImageSpec()
    assert spec.target_size(*size) == expected
    assert spec.min_pixels <= expected[0] * expected[1] <= spec.max_pixels


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1024, 1792)), (2, (1024, 1792)), (64, (448, 768)), (256, (224, 384))],
)
def test_frames_of_a_video_share_its_budget(count, expected):
    """A lone frame is a pair of itself."""
    spec = VideoSpec(max_pixels=64 * 360000)
    assert spec.target_size(1030, 1800, count) == expected


def test_limits_of_a_frame_act_on_images_and_videos():
    for spec in (ImageSpec(), VideoSpec()):
        small, large = (spec.limited(low, 50176) for low in (784, 16384))
        rows, columns = small.target_size(1080, 1920, 16)
        assert 0.7 * 50176 < rows * columns <= 50176
        assert small.target_size(64, 64, 16) == (64, 64)
        assert large.target_size(64, 64, 16) == (128, 128)


def test_limits_of_a_frame_stay_within_the_budget_of_a_video():
    spec = VideoSpec(max_pixels=16 * 4096).limited(784, 50176)
    assert spec.target_size(512, 512, 16) == (64, 64)
    assert spec.target_size(512, 512, 2) == (160, 160)


@pytest.mark.parametrize("spec", [ImageSpec(), VideoSpec()])
def test_target_size_refuses_slivers(spec):
    with pytest.raises(ValueError, match="more than 200 times"):
        spec.target_size(32, 6401, 4)


def test_patch_order_is_block_then_patch_then_channel_then_time():
    frames = random_frames(1, 8, 16)
    patches = to_patches(frames, TINY)
    assert patches.values.shape == (1, 8, 3 * 2 * 4 * 4)
    assert patches.grids.tolist() == [[2, 4]]
    # Patch 5 is in the second block: its row 0, column 1, so pixels [0:4, 12:16].
    patch = normalised(patches)[0, 5].reshape(3, 2, 4, 4)
    expected = frames[0, 0:4, 12:16].transpose(2, 0, 1) / 255 * 2 - 1
    np.testing.assert_allclose(patch[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(patch[:, 0], patch[:, 1])


def test_video_pairs_frames_and_repeats_the_last():
    frames = random_frames(3, 8, 8)
    patches = to_patches(frames, TINY_VIDEO)
    values = patches.values.reshape(2, 4, 3, 2, 4, 4)
    first, last = (values[1, :, :, time] for time in (0, 1))
    np.testing.assert_array_equal(first, last)
    assert not np.array_equal(values[0, :, :, 0], values[0, :, :, 1])


def test_grey_levels_are_normalised_where_they_are_put_into_a_batch():
    """Whichever rows a host makes of it, and whatever the frames are padded to."""
    large, small = (to_patches(random_frames(2, 8, width), TINY) for width in (16, 8))
    made = Patches(normalised(small), small.grids)
    values, grids = stack_patches([large, None, join_patches([large, small])], 5, 10)
    np.testing.assert_array_equal(values[0, :2, :8], normalised(large))
    np.testing.assert_array_equal(values[2, 2:4, :4], normalised(small))
    assert not values[0, 2:].any() and not values[1].any() and not values[2, 2:4, 4:].any()
    assert grids[:, :, 0].tolist() == [[2, 2, 0, 0, 0], [0] * 5, [2, 2, 2, 2, 0]]
    mixed = join_patches([large, made])
    np.testing.assert_array_equal(mixed.values, values[2, :4, :8])
    rows = FrameRows([large, None, mixed], 5, 10)
    for index in (slice(0, 1), slice(1, 2), slice(1, 3)):
        np.testing.assert_array_equal(rows[index, :, :, :], values[index])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_groups_are_counted_without_the_frames(count):
    for spec in (TINY, TINY_VIDEO):
        assert spec.group_count(count) == len(spec.group(random_frames(count, 8, 8)))


def test_resize_is_skipped_when_nothing_changes():
    frame = random_frames(1, 32, 32)[0]
    assert resize(frame, (32, 32)) is frame


@pytest.mark.parametrize("spec", [ImageSpec(), VideoSpec()])
def test_resize_reaches_the_target(spec):
    spec = spec.limited(784, 50176)
    frames = np.full((3, 360, 640, 3), 90, np.uint8)
    resized = spec.resize(frames)
    assert resized.shape == (3, *spec.target_size(360, 640, 3), 3)
    assert np.unique(resized).tolist() == [90]


def test_patches_are_cut_from_resized_frames_only():
    """To resize again here could change the size that the reader chose."""
    with pytest.raises(ValueError, match=r"frames of 36x64: .* multiples of 8; .*spec\.resize"):
        to_patches(random_frames(1, 36, 64), TINY)


@pytest.mark.parametrize("spec", [ImageSpec, VideoSpec])
def test_spec_of_a_folder_without_processor_names_the_file(tmp_path, spec):
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json.* {spec.mode} processor"):
        spec.from_folder(str(tmp_path))
