"""Prompts equal what transformers' `Qwen3VLProcessor` makes from the same frames.

Token ids, grids and positions are identical. Pixels are within one grey level on 99.9 % of the
values: Pillow and torchvision share the filter but round differently. Measured on the cases below
with transformers 5.23, torchvision 0.28 and Pillow 13: 99.995 % at worst, never 3 levels apart.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from models.qwen3_vl import Qwen3VLConfig
from models.qwen3_vl.inputs import from_processor
from paravt_jax.patches import normalised
from paravt_jax.records import Frames, VideoRef
from pipelines.conversation import FrameRate
from pipelines.preprocess import SPECS, ImageSpec, VideoSpec
from pipelines.render import ChatRenderer
from pipelines.video import overview_indices
from tests.support.needle import processor_folder
from tests.support.qwen3_vl_torch import torch_model
from tests.support.tiny_models import NEEDLE_MODEL

pytestmark = pytest.mark.slow

FPS = 7.0
QUESTION = "What colour is the circle?"
SETTINGS = {
    "released": (
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}},
        {"size": {"shortest_edge": 4096, "longest_edge": 25165824}},
    ),
    "small": (
        {"size": {"shortest_edge": 784, "longest_edge": 50176}},
        {"size": {"shortest_edge": 20000, "longest_edge": 400000}},
    ),
    "capped": (
        {"size": {"shortest_edge": 1024, "longest_edge": 1024}},
        {
            "size": {"shortest_edge": 9000, "longest_edge": 400000},
            "cap_pixels_per_frame": True,
            "max_video_tokens": 48,
        },
    ),
}
"""Limits of the image and of the video processor; the first are those of the released models."""

IMAGE_CASES = [
    # settings, frames, height, width
    ("released", 1, 1080, 1920),  # large
    ("released", 1, 32, 32),
    ("released", 2, 5, 9),  # tiny
    ("released", 3, 360, 640),  # landscape
    ("released", 1, 854, 480),  # portrait
    ("released", 5, 257, 255),  # already near a multiple
    ("released", 1, 12, 2400),  # exactly 200 to 1
    ("small", 4, 640, 361),
    ("small", 3, 224, 224),  # already at its target
    ("small", 1, 2000, 21),
    ("small", 2, 27, 33),
    ("capped", 16, 32, 32),
    ("capped", 2, 477, 333),
]
VIDEO_CASES = [
    ("released", 2, 1080, 1920),
    ("released", 1, 90, 160),  # a lone frame
    ("released", 3, 361, 641),
    ("released", 4, 32, 32),
    ("released", 5, 3, 4),
    ("small", 4, 640, 360),
    ("small", 5, 288, 288),  # five frames are weighed as four
    ("small", 7, 121, 243),
    ("small", 3, 20, 31),
    ("small", 2, 1500, 9),
    ("small", 2, 31, 6200),  # 200 to 1 after small sides are scaled up
    ("small", 64, 96, 64),
    ("capped", 2, 719, 405),
    ("capped", 9, 333, 500),
    ("capped", 32, 240, 320),
    ("capped", 16, 32, 32),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The needle world's tokenizer with the limits of each setting."""
    made = {}
    for name, changes in SETTINGS.items():
        made[name] = str(tmp_path_factory.mktemp(name) / "model")
        shutil.copytree(processor_folder(), made[name])
        files = (f"{made[name]}/{spec._file}" for spec in SPECS.values())
        for path, change in zip(files, changes, strict=True):
            with open(path, encoding="utf-8") as file:
                config = json.load(file) | change
            with open(path, "w", encoding="utf-8") as file:
                json.dump(config, file)
    return made


@pytest.fixture(scope="module")
def processors(folders) -> dict[str, Qwen3VLProcessor]:
    return {name: AutoProcessor.from_pretrained(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def rope_index():
    """Positions `[3, b, t]` of transformers for processor outputs."""
    model = torch_model().model

    def index(inputs) -> np.ndarray:
        names = ("input_ids", "mm_token_type_ids", "attention_mask")
        grids = {k: torch.tensor(v) for k, v in inputs.items() if k.endswith("thw")}
        arrays = {k: torch.tensor(inputs[k]) for k in names}
        return model.get_rope_index(**arrays, **grids)[0].numpy()

    return index


def scene(count: int, height: int, width: int) -> np.ndarray:
    """Frames with smooth ground, hard edges and, on one half, noise."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width] / max(height, width)
    frames = []
    for shift in range(count):
        waves = [np.sin((3 + c) * x + 2 * y + shift) for c in range(3)]
        frame = 127 + 120 * np.stack(waves, -1) * np.sign(np.sin(40 * (x - y)))[..., None]
        frame[: height // 2] = rng.integers(0, 256, (height // 2, width, 3))
        frames.append(frame.astype(np.uint8))
    return np.stack(frames)


def clip_metadata(indices) -> dict:
    return {"fps": FPS, "frames_indices": list(indices), "total_num_frames": 1000}


def chat(content: list[dict]) -> list[dict]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]


def apply(processor, text: list[str], **inputs):
    return processor(
        text=text,
        return_tensors="np",
        return_mm_token_type_ids=True,
        do_sample_frames=False,
        **inputs,
    )


def as_template(processor, content: list[dict]) -> str:
    return processor.apply_chat_template(chat(content), tokenize=False, add_generation_prompt=True)


def by_processor(processor, mode: str, frames: np.ndarray, indices: np.ndarray):
    """What the processor returns for the frames, shown as one video or as timed images."""
    if mode == "video":
        # It refuses a lone frame; ours stands for a pair of it.
        if len(frames) == 1:
            frames, indices = np.repeat(frames, 2, 0), np.repeat(indices, 2)
        shown = {
            "videos": [frames.transpose(0, 3, 1, 2)],
            "video_metadata": [clip_metadata(indices)],
        }
        return apply(processor, [as_template(processor, [{"type": "video"}])], **shown)
    content = []
    for time in indices / FPS:
        content += [{"type": "text", "text": f"<{time:.1f} seconds>"}, {"type": "image"}]
    return apply(processor, [as_template(processor, content)], images=list(frames))


def grey(values: np.ndarray) -> np.ndarray:
    """Normalised values to grey levels; mean and deviation are 0.5."""
    return np.round((values * 0.5 + 0.5) * 255)


@pytest.mark.parametrize(
    ("mode", "case"),
    [("image", case) for case in IMAGE_CASES] + [("video", case) for case in VIDEO_CASES],
)
def test_prompt_equals_the_processor(folders, processors, rope_index, mode, case):
    setting, *shape = case
    frames, indices = scene(*shape), np.arange(shape[0]) * 11 + 3
    theirs = by_processor(processors[setting], mode, frames, indices)

    renderer = ChatRenderer.from_folder(folders[setting], mode)
    shown = Frames(renderer.spec.resize(frames), indices / FPS)
    ours = renderer.prompt(shown, QUESTION)

    np.testing.assert_array_equal(ours.tokens, theirs["input_ids"][0])
    np.testing.assert_array_equal(ours.positions, rope_index(theirs)[:, 0].T)
    pixels = theirs["pixel_values" if mode == "image" else "pixel_values_videos"]
    grid_thw = theirs[f"{mode}_grid_thw"]
    grids = np.repeat(grid_thw[:, 1:], grid_thw[:, 0], axis=0)
    np.testing.assert_array_equal(ours.patches.grids, grids)
    values = normalised(ours.patches).reshape(pixels.shape)
    gaps = np.abs(grey(values) - grey(pixels))
    share = (gaps <= 1).mean()
    print(f"{mode} {case}: {share:.4%} within one grey level, at most {gaps.max():.0f} apart")
    assert share >= 0.999
    assert gaps.max() <= 2
    if shown.pixels.shape == frames.shape:
        np.testing.assert_allclose(values, pixels, atol=1e-5)


def test_sizes_equal_the_processors(processors, folders):
    """On random frames under every setting."""
    rng = np.random.default_rng(0)
    for setting, processor in processors.items():
        image, video = (spec.from_folder(folders[setting]) for spec in (ImageSpec, VideoSpec))
        for _ in range(300):
            count = int(rng.integers(2, 80))
            height, width = np.exp(rng.uniform(2.5, 7.5, 2)).astype(int).tolist()
            patches = processor.image_processor.get_number_of_image_patches(height, width)
            assert np.prod(image.target_size(height, width)) == patches * 16**2
            patches = processor.video_processor.get_num_of_video_patches(count, height, width)
            rows, columns = video.target_size(height, width, count)
            assert -(-count // 2) * rows * columns == patches * 16**2


def test_limits_of_a_frame_are_limits_of_its_clip_to_the_processor(processors):
    """`limited` for n frames is the processor's `size` of n times as much."""
    spec = VideoSpec().limited(4096, 50176)
    for count, *frame in ((2, 360, 640), (5, 20, 30), (16, 1080, 1920), (33, 224, 224)):
        size = {"shortest_edge": count * 4096, "longest_edge": count * 50176}
        patches = processors["released"].video_processor.get_num_of_video_patches(
            count, *frame, {"size": size}
        )
        rows, columns = spec.target_size(*frame, count)
        assert -(-count // 2) * rows * columns == patches * 16**2


@pytest.mark.parametrize("setting", SETTINGS)
def test_folders_that_transformers_5_saves_mean_the_same(folders, processors, setting, tmp_path):
    processors[setting].save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    for spec in SPECS.values():
        assert spec.from_folder(str(tmp_path)) == spec.from_folder(folders[setting])


@pytest.mark.parametrize(("mode", "size"), [("image", (10, 2001)), ("video", (40, 8001))])
def test_what_the_processor_refuses_is_refused(processors, folders, mode, size):
    frames = np.zeros((2, *size, 3), np.uint8)
    with pytest.raises(ValueError, match="aspect ratio"):
        by_processor(processors["released"], mode, frames, np.arange(2))
    with pytest.raises(ValueError, match="more than 200 times"):
        SPECS[mode].from_folder(folders["released"]).resize(frames)


@pytest.mark.parametrize(("frames", "fps"), [(2000, 30.0), (301, 29.97), (5, 10.0), (90000, 25.0)])
def test_sampling_equals_the_processor(processors, frames, fps):
    sample = processors["released"].video_processor.sample_frames
    metadata = VideoMetadata(total_num_frames=frames, fps=fps)
    video = VideoRef("a.mp4", frames / fps)
    for count in (1, 2, 4, 5):
        np.testing.assert_array_equal(
            overview_indices(frames, count), sample(metadata, num_frames=count)
        )
    for rate in (0.3, 1.0, 2, 23.976):
        count = FrameRate(rate, least=4, most=768).count(video)
        np.testing.assert_array_equal(overview_indices(frames, count), sample(metadata, fps=rate))


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_of_padded_rows_of_images_and_videos(processors, rope_index, side):
    """Two videos and two images between words in one row, one video in the other."""
    processor = processors["small"]
    clips = [scene(3, 96, 64), scene(6, 50, 160), scene(4, 64, 64)]
    rows = [("image", "video", "image", "video"), ("video",)]
    theirs = apply(
        processor,
        [as_template(processor, [{"type": kind} for kind in row]) for row in rows],
        images=[scene(1, 40, 90)[0], scene(1, 200, 100)[0]],
        videos=[clip.transpose(0, 3, 1, 2) for clip in clips],
        video_metadata=[clip_metadata(range(len(clip))) for clip in clips],
        padding=True,
        padding_side=side,
    )
    token = processor.tokenizer.convert_tokens_to_ids
    ids = {f"{kind}_token_id": token(f"<|{kind}_pad|>") for kind in ("image", "video")}
    config = Qwen3VLConfig.from_dict(NEEDLE_MODEL | ids)
    shared = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    ours = from_processor(
        config, **{k: theirs[k] for k in (*shared, "pixel_values_videos", "video_grid_thw")}
    )
    positions = rope_index(theirs)
    for row, mask in enumerate(theirs["attention_mask"] > 0):
        own = ours.positions[row, : mask.sum()]
        np.testing.assert_array_equal(own, positions[:, row, mask].T)
    assert not theirs["attention_mask"][1].all()


def test_vision_marks_around_each_pair_alone(processors, folders, rope_index):
    """`video_marks=each` is what processors before 5.10 wrote: they put the pairs in the place of
    the template's marks as well. Later ones do the same for a text without those marks."""
    frames, indices = scene(5, 121, 243), np.arange(5) * 11 + 3
    processor = processors["small"]
    text = as_template(processor, [{"type": "video"}])
    bare = text.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video_pad|>")
    assert bare != text
    theirs = apply(
        processor,
        [bare],
        videos=[frames.transpose(0, 3, 1, 2)],
        video_metadata=[clip_metadata(indices)],
    )
    renderer = ChatRenderer.from_folder(folders["small"], "video", marks="each")
    ours = renderer.prompt(Frames(renderer.spec.resize(frames), indices / FPS), QUESTION)

    np.testing.assert_array_equal(ours.tokens, theirs["input_ids"][0])
    np.testing.assert_array_equal(ours.positions, rope_index(theirs)[:, 0].T)
    assert renderer.decode(ours.tokens).count("<|vision_start|>") == 3


def shown_sizes(folder, frames: np.ndarray) -> tuple[list, list]:
    """Grids that the folder's own processors make of frames as a video, and of one as an image."""
    processor = AutoProcessor.from_pretrained(folder)
    indices = np.arange(len(frames)) * 11
    as_video = by_processor(processor, "video", frames, indices)["video_grid_thw"]
    as_image = by_processor(processor, "image", frames[:1], indices[:1])["image_grid_thw"]
    return as_video[:, 1:].tolist(), as_image[:, 1:].tolist()


@pytest.mark.parametrize("kept", ["apart", "together"])
def test_limited_folders_show_frames_as_the_limits_say(folders, processors, tmp_path, kept):
    """Large frames and small ones, by transformers' own processors."""
    limits, folder = (9 * 32**2, 30 * 32**2), tmp_path / "model"
    if kept == "together":
        processors["released"].save_pretrained(folder)
        assert not (folder / "preprocessor_config.json").exists()
    else:
        shutil.copytree(folders["released"], folder)
    for spec in SPECS.values():
        spec.limit_folder(str(folder), limits, {"unknown_to_transformers": "text"})
    # A pair of tiny frames is enlarged as in training; more of them cannot be told.
    for frames in (scene(8, 360, 640), scene(33, 333, 500), scene(2, 40, 50)):
        video, image = (
            SPECS[mode].from_folder(folders["released"]).limited(*limits)
            for mode in ("video", "image")
        )
        sizes = [
            [[side // 16 for side in spec.target_size(*frames.shape[1:3], len(frames))]]
            for spec in (video, image)
        ]
        assert list(shown_sizes(folder, frames)) == sizes
        assert list(shown_sizes(folders["released"], frames)) != sizes


def test_a_limited_folder_is_trained_on_as_the_base_is(folders, tmp_path):
    """Our own limits take the place of those that an export holds."""
    folder = shutil.copytree(folders["released"], tmp_path / "model")
    for spec in SPECS.values():
        spec.limit_folder(str(folder), (784, 50176))
        ours, base = (spec.from_folder(str(f)) for f in (folder, folders["released"]))
        assert ours != base
        assert ours.limited(1000, 90000) == base.limited(1000, 90000)


def test_numbers_of_frames_reach_the_processors_sampling(folders, tmp_path):
    folder = shutil.copytree(folders["released"], tmp_path / "model")
    VideoSpec.limit_folder(str(folder), (784, 50176), {"min_frames": 6, "max_frames": 6})
    sample = AutoProcessor.from_pretrained(folder).video_processor.sample_frames
    for count in (20, 3000):
        np.testing.assert_array_equal(
            sample(VideoMetadata(total_num_frames=count, fps=30.0)), overview_indices(count, 6)
        )
