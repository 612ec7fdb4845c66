"""Frames to patches: sizes, order and values, against transformers' own processors."""

import numpy as np
import pytest

from pipelines.preprocess import FrameSpec, to_patches
from tests.pipelines_fixtures import processor_folder

TINY = FrameSpec(patch_size=4, merge_size=2, min_pixels=64, max_pixels=4096)


def random_frames(count: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("max_pixels", [64, 100, 4096, 5000])
def test_most_patches_hold_every_frame_in_whole_merged_blocks(max_pixels):
    """The tower merges blocks of patches, so its padding must be a number of blocks."""
    spec = FrameSpec(patch_size=4, merge_size=2, min_pixels=64, max_pixels=max_pixels)
    assert spec.max_patches % spec.merge_size**2 == 0
    for height, width in ((8, 8), (40, 90), (333, 200), (64, 64)):
        rows, columns = (side // spec.patch_size for side in spec.target_size(height, width))
        assert rows * columns <= spec.max_patches


def load_processor():
    """transformers' processor, loaded from the folder that we write."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(processor_folder())


@pytest.fixture(scope="module")
def hf_processor():
    return load_processor()


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
    spec = FrameSpec()
    assert spec.target_size(*size) == expected
    assert spec.min_pixels <= expected[0] * expected[1] <= spec.max_pixels


def test_target_size_equals_transformers(hf_processor):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    spec = FrameSpec()
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 5000, (200, 2)).tolist():
        expected = smart_resize(height, width, spec.factor, spec.min_pixels, spec.max_pixels)
        assert spec.target_size(height, width) == expected


def test_target_size_refuses_slivers():
    with pytest.raises(ValueError, match="more than 200 times"):
        FrameSpec().target_size(10, 2001)


def test_patch_order_is_block_then_patch_then_channel_then_time():
    frames = random_frames(1, 8, 16)
    patches = to_patches(frames, TINY)
    assert patches.values.shape == (1, 8, 3 * 2 * 4 * 4)
    assert patches.grids.tolist() == [[2, 4]]
    # Patch 5 is in the second block: its row 0, column 1, so pixels [0:4, 12:16].
    patch = patches.values[0, 5].reshape(3, 2, 4, 4)
    expected = frames[0, 0:4, 12:16].transpose(2, 0, 1) / 255 * 2 - 1
    np.testing.assert_allclose(patch[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(patch[:, 0], patch[:, 1])


def test_video_pairs_frames_and_repeats_the_last():
    frames = random_frames(3, 8, 8)
    patches = to_patches(frames, TINY, as_video=True)
    values = patches.values.reshape(2, 4, 3, 2, 4, 4)
    first, last = (values[1, :, :, time] for time in (0, 1))
    np.testing.assert_array_equal(first, last)
    assert not np.array_equal(values[0, :, :, 0], values[0, :, :, 1])


def test_resize_is_skipped_when_nothing_changes():
    frame = random_frames(1, 32, 32)[0]
    assert FrameSpec(min_pixels=1024, max_pixels=1024).resize(frame) is frame


def test_resize_reaches_the_target():
    spec = FrameSpec(min_pixels=784, max_pixels=50176)
    frame = np.full((360, 640, 3), 90, np.uint8)
    resized = spec.resize(frame)
    assert resized.shape == (*spec.target_size(360, 640), 3)
    assert resized.shape[0] * resized.shape[1] <= 50176
    assert np.unique(resized).tolist() == [90]


@pytest.mark.parametrize("side", [32, 64])
def test_image_patches_equal_transformers(hf_processor, side):
    spec = FrameSpec(min_pixels=1024, max_pixels=64 * 64)
    frames = random_frames(3, side, side)
    ours = to_patches(frames, spec)
    size = {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels}
    theirs = hf_processor.image_processor(list(frames), return_tensors="np", size=size)
    values = theirs["pixel_values"].reshape(ours.values.shape)
    # One grey level is 2/255 after normalisation.
    np.testing.assert_allclose(ours.values, values, atol=1e-5)
    np.testing.assert_array_equal(theirs["image_grid_thw"][:, 1:], ours.grids)


def test_video_patches_equal_transformers(hf_processor):
    spec = FrameSpec.from_folder(processor_folder())
    frames = random_frames(6, 32, 32)
    ours = to_patches(frames, spec, as_video=True)
    theirs = hf_processor.video_processor(
        [frames.transpose(0, 3, 1, 2)], return_tensors="np", do_sample_frames=False
    )
    values = theirs["pixel_values_videos"].reshape(ours.values.shape)
    np.testing.assert_allclose(ours.values, values, atol=1e-5)
    assert theirs["video_grid_thw"].tolist() == [[3, 2, 2]]


def test_spec_of_a_folder_without_processor_names_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        FrameSpec.from_folder(str(tmp_path))
