"""A Qwen3-VL folder against transformers: prompts, logits, and what an export of it holds.

On the released tokenizer, template and processor settings, or on a folder of your own
(`QWEN3_VL_FOLDER=PATH pytest tests/parity/test_released_folder.py`).
"""

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from models.qwen3_vl import from_pretrained
from paravt_jax.protocol import CROP_VIDEO_TOOL
from paravt_jax.records import Frames, Row, VideoRef
from pipelines.render import ChatRenderer
from tests.support.qwen3_vl_torch import gap

pytestmark = pytest.mark.slow

LARGEST = 2 * 2**30
"""Bytes of weights that a test computes with, twice, in float32."""
TIMES = np.array([0.0, 2.5, 7.0, 12.4])
ROW = Row("r", VideoRef("/nowhere.mp4", 13.0), "What is <b>red</b>? A. π B. ночь\n\nC. 夜", "A")


def frames() -> Frames:
    pixels = np.random.default_rng(0).integers(0, 256, (len(TIMES), 96, 160, 3), dtype=np.uint8)
    return Frames(pixels, TIMES)


def by_processor(folder, mode: str, system: str, tools: list[dict]):
    """What transformers makes of the same frames and words."""
    processor = AutoProcessor.from_pretrained(folder)
    shown = frames()
    if mode == "video":
        content: list[dict] = [{"type": "video"}]
        metadata = {"fps": 10.0, "frames_indices": list(TIMES * 10), "total_num_frames": 130}
        inputs = {"videos": [shown.pixels.transpose(0, 3, 1, 2)], "video_metadata": [metadata]}
    else:
        stamps = [{"type": "text", "text": f"<{time:.1f} seconds>"} for time in TIMES]
        content = [part for stamp in stamps for part in (stamp, {"type": "image"})]
        inputs = {"images": list(shown.pixels)}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": [*content, {"type": "text", "text": ROW.question}]},
    ]
    text = processor.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )
    return processor(
        text=[text],
        return_tensors="np",
        return_mm_token_type_ids=True,
        do_sample_frames=False,
        **inputs,
    )


@pytest.mark.parametrize("mode", ["image", "video"])
def test_the_main_prompt_is_what_the_processor_makes(qwen3_vl_folder, mode):
    own = ChatRenderer.from_folder(str(qwen3_vl_folder), mode, tools=[CROP_VIDEO_TOOL])
    texts = own.texts
    theirs = by_processor(qwen3_vl_folder, mode, texts.system + texts.tools, own.tools)
    shown = Frames(own.spec.resize(frames().pixels), TIMES)
    ours = own.main_prompt(ROW, shown, tools=True)
    # What a template opens the turn with is the head of the turn, not part of the prompt.
    head = own.encode(own.opening)
    np.testing.assert_array_equal([*ours.tokens, *head], theirs["input_ids"][0])


def test_logits_are_those_of_transformers(qwen3_vl_folder):
    size = sum(path.stat().st_size for path in qwen3_vl_folder.glob("*.safetensors"))
    if not 0 < size <= LARGEST:
        pytest.skip(f"a test computes with some weights, and not with {size / 2**30:.1f} GiB")
    theirs = by_processor(qwen3_vl_folder, "image", "Be brief.", [])
    reference = Qwen3VLForConditionalGeneration.from_pretrained(qwen3_vl_folder, dtype="float32")
    with torch.no_grad():
        wanted = reference.eval()(**{k: torch.tensor(v) for k, v in theirs.items()}).logits.numpy()
    names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    found = from_pretrained(qwen3_vl_folder).logits(**{name: theirs[name] for name in names})
    assert gap(found, wanted) < 1e-5
