"""What a client sends becomes the prompt that the agent was trained on, to the token, and turns of
a tool loop become those of a rollout: on the released tokenizers and templates."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate.serving.errors import ApiError
from evaluate.serving.limits import Limits
from evaluate.serving.prompts import RequestPrompts
from evaluate.serving.schemas import parse
from paravt_jax.protocol import CROP_VIDEO_TOOL
from paravt_jax.records import Prompt
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from tests.support.needle import questions

FRAMES = 3


@pytest.fixture(scope="module")
def row():
    return questions("oe")[0].row


@pytest.fixture(scope="module", params=["image", "video"])
def maker(request, instruct_folder, row):
    return made(instruct_folder, request.param, row)


def made(folder, mode: str, row) -> RequestPrompts:
    pixels = 32 * 32, 64 * 64
    renderer = ChatRenderer.from_folder(str(folder), mode, pixels=pixels, tools=[CROP_VIDEO_TOOL])
    reader = VideoReader(spec=renderer.spec)
    limits = Limits(prompt_tokens=4096, media_root=Path(row.video.path).parent)
    maker = RequestPrompts(renderer, reader, FRAMES, limits)
    maker.renderer, maker.reader = renderer, reader
    return maker


def prompt(maker: RequestPrompts, messages: list, **more) -> Prompt:
    return maker(parse(json.dumps({"messages": messages, **more}).encode())).prompt


def showing(url: str, text: str) -> dict:
    kind = "image_url" if url.startswith("data:image") else "video_url"
    parts = [{"type": kind, kind: {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def same(one: Prompt, other: Prompt) -> None:
    for name in ("tokens", "positions", "vision_index"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.patches.values, other.patches.values)
    np.testing.assert_array_equal(one.patches.grids, other.patches.grids)


def check_trained(maker, row) -> None:
    trained = maker.renderer.main_prompt(row, maker.reader.overview(row.video, FRAMES), tools=True)
    system = {"role": "system", "content": maker.renderer.system_text(tools=True)}
    content = base64.b64encode(Path(row.video.path).read_bytes()).decode()
    for url in (f"file://{row.video.path}", f"data:video/mp4;base64,{content}"):
        messages = [system, showing(url, row.question)]
        same(prompt(maker, messages, tools=[CROP_VIDEO_TOOL]), trained)


def test_a_video_a_question_and_tools_are_the_prompt_of_training(maker, row):
    check_trained(maker, row)


def test_thinking_models_open_their_turns_and_a_call_closes_the_thought(thinking_folder, row):
    maker = made(thinking_folder, "image", row)
    check_trained(maker, row)
    body = {"messages": [{"role": "user", "content": "?"}], "tools": [CROP_VIDEO_TOOL]}
    decode = maker.renderer.decode
    asked = maker(parse(json.dumps(body).encode()))
    assert decode(asked.head) == "<think>\n" and not asked.said
    asked = maker(parse(json.dumps(body | {"tool_choice": "required"}).encode()))
    assert decode(asked.head) == f"<think>\n\n</think>\n\n{asked.said}"
    assert asked.said == "<tool_call>\n"


def test_a_tool_loop_is_written_as_a_rollout_writes_it(maker, row):
    """Calls and responses once more, from the messages that a client keeps of them."""
    renderer = maker.renderer
    call = '{"name": "crop_video", "arguments": {"start_time": 0, "end_time": 8}}'
    said = f"I look.\n<tool_call>\n{call}\n</tool_call>"
    sent = {"type": "function", "function": {"name": "crop_video", "arguments": call[36:-1]}}
    assert json.loads(sent["function"]["arguments"])
    asked = [showing(f"file://{row.video.path}", "?")]
    turns = [
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "tool_calls": [sent]},
        {"role": "tool", "name": "crop_video", "content": "a red square"},
    ]
    before = prompt(maker, asked)
    rollout = [*renderer.encode(f"{said}<|im_end|>"), *renderer.tool_turn(["a red square"])]
    after = prompt(maker, [*asked, *turns])
    assert after.tokens.tolist() == [*before.tokens.tolist(), *rollout]


def test_images_and_videos_side_by_side_each_in_their_place(maker, row):
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 32, 3), np.uint8)).save(file, "JPEG")
    jpeg = base64.b64encode(file.getvalue()).decode()
    image = f"data:image/jpeg;base64,{jpeg}"
    messages = [showing(image, "one"), showing(f"file://{row.video.path}", "two")]
    found = prompt(maker, messages)
    text, merged = maker.renderer.decode(found.tokens), found.patches.grids.prod(1) // 4
    assert text.count("<|image_pad|>") + text.count("<|video_pad|>") == merged.sum()
    assert found.patches.grids[0].tolist() == [4, 2]
    np.testing.assert_array_equal(
        np.sort(found.vision_index[found.vision_index >= 0]),
        np.concatenate(
            [np.arange(n) + i * found.patches.values.shape[1] // 4 for i, n in enumerate(merged)]
        ),
    )
    listed = prompt(maker, [showing(f"data:video/jpeg;base64,{jpeg},{jpeg}", "two")])
    assert maker.renderer.decode(listed.tokens).count("<|vision_start|>") == 2


def test_what_a_request_says_about_frames_and_pixels(maker, row):
    asked = [showing(f"file://{row.video.path}", "?")]

    def frames(**more) -> int:
        found = prompt(maker, asked, **more).patches.grids
        return len(found) * (
            maker.renderer.spec.temporal_patch_size if maker.renderer.mode == "video" else 1
        )

    assert frames(media_io_kwargs={"video": {"num_frames": 6}}) == 6
    seconds = row.video.duration
    assert abs(frames(media_io_kwargs={"video": {"fps": 0.25}}) - seconds / 4) <= 1
    assert abs(frames(mm_processor_kwargs={"fps": 0.25}) - seconds / 4) <= 1
    assert frames(media_io_kwargs={"video": {"fps": 1e308}}) == maker.reader.info(row.video).frames
    with pytest.raises(ApiError, match="max_pixels: at most"):
        frames(mm_processor_kwargs={"max_pixels": 10**6})
    with pytest.raises(ApiError, match="num_frames: at most 64"):
        frames(media_io_kwargs={"video": {"num_frames": 65}})
    small = prompt(maker, asked, mm_processor_kwargs={"max_pixels": 32 * 32})
    assert small.patches.grids[0].prod() == 4 <= prompt(maker, asked).patches.grids[0].prod()
