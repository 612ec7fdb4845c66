"""Tiny random Qwen3-VL models of transformers, and inputs for them."""

import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

IMAGE, VIDEO, START, END = 120, 121, 122, 123
TEXT = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "mrope_section": [3, 3, 2]},
}
VISION = {
    "depth": 3,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_heads": 3,
    "patch_size": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}


def torch_model(
    text: dict | None = None, vision: dict | None = None, tie: bool = False
) -> Qwen3VLForConditionalGeneration:
    """A random model; every parameter, norms and biases too, differs from its usual start."""
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        text_config={**TEXT, **(text or {})},
        vision_config={**VISION, **(vision or {})},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tie,
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def torch_logits(model: Qwen3VLForConditionalGeneration, inputs: dict) -> np.ndarray:
    """Float32 logits `[b, t, vocab]` of processor outputs given as numpy."""
    ids = inputs["input_ids"]
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    arguments = {name: torch.tensor(value) for name, value in inputs.items()}
    with torch.no_grad():
        return model(**arguments, mm_token_type_ids=torch.tensor(kinds)).logits.numpy()


def gap(ours, theirs) -> float:
    """Largest difference as a share of the largest value."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def image_tokens(grid: tuple[int, int], token: int = IMAGE) -> list[int]:
    """Tokens of one image or one video frame between its markers (merge blocks of 2 x 2)."""
    return [START, *[token] * (grid[0] * grid[1] // 4), END]


def video_tokens(grid: tuple[int, int, int]) -> list[int]:
    """Tokens of a video: each frame after a timestamp of two text tokens."""
    return [token for time in range(grid[0]) for token in [time, 7, *image_tokens(grid[1:], VIDEO)]]


def random_pixels(grids: np.ndarray, seed: int) -> np.ndarray:
    """Patch values `[sum of patches, 96]` (patches of 2 x 3 x 4 x 4 values)."""
    count = int(np.prod(grids, axis=1).sum())
    return np.random.default_rng(seed).normal(size=(count, 96)).astype(np.float32)


def pad(rows: list[list[int]], side: str) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask` of rows padded on one side."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 99), np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where], mask[i, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def text_inputs() -> dict[str, np.ndarray]:
    """Two rows of text, unpadded."""
    return {"input_ids": np.random.default_rng(0).integers(0, 119, (2, 23))}


def image_inputs(side: str = "left") -> dict[str, np.ndarray]:
    """Two images of different sizes in one row, none in the other."""
    grids = np.array([[1, 4, 6], [1, 2, 2]])
    rows = [[1, *image_tokens((4, 6)), 3, *image_tokens((2, 2)), 5, 6], [8, 9, 10]]
    return pad(rows, side) | {"pixel_values": random_pixels(grids, 1), "image_grid_thw": grids}


def video_inputs(side: str = "right") -> dict[str, np.ndarray]:
    """A row with two videos, a row with one."""
    grids = np.array([[3, 4, 4], [2, 6, 2], [1, 8, 8]])
    rows = [
        [1, *video_tokens((3, 4, 4)), 4, *video_tokens((2, 6, 2)), 5],
        [2, *video_tokens((1, 8, 8)), 5, 5],
    ]
    pixels = random_pixels(grids, 2)
    return pad(rows, side) | {"pixel_values_videos": pixels, "video_grid_thw": grids}


def mixed_inputs(side: str = "left") -> dict[str, np.ndarray]:
    """Images and videos in both rows, in different orders."""
    images, videos = np.array([[1, 4, 6], [1, 2, 4]]), np.array([[3, 4, 4], [2, 6, 2]])
    rows = [
        [1, *image_tokens((4, 6)), 3, *video_tokens((3, 4, 4)), 5],
        [2, *video_tokens((2, 6, 2)), 4, *image_tokens((2, 4)), 6, 6, 6],
    ]
    return pad(rows, side) | {
        "pixel_values": random_pixels(images, 3),
        "image_grid_thw": images,
        "pixel_values_videos": random_pixels(videos, 4),
        "video_grid_thw": videos,
    }
