"""Names and signatures that scripts outside this project rely on."""

import inspect

from models import qwen3_vl
from paravt_jax.protocol import parse_tool_calls
from paravt_jax.rewards import RewardBreakdown, RewardRules, score


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_from_pretrained():
    assert parameters(qwen3_vl.from_pretrained) == ["folder", "dtype", "mesh"]
    assert parameters(qwen3_vl.Pretrained.logits)[1:] == [
        "input_ids",
        "attention_mask",
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
    ]
    assert hasattr(qwen3_vl.Pretrained, "save_pretrained")


def test_score():
    assert parameters(score)[:4] == ["completion", "answer", "question_type", "rules"]
    breakdown = score("<think>I see it clearly.</think><answer>red</answer>", "red")
    assert isinstance(breakdown, RewardBreakdown)
    assert (breakdown.accuracy, breakdown.format, breakdown.tool) == (1.0, 1.0, 0.0)
    rules = RewardRules(compat="reference", answer_suffix=True, anchor_weight=0.5, mode="f1")
    assert score("<answer>B</answer>", "B", "mcq", rules).accuracy == 1.0


def test_parse_tool_calls():
    text = '<tool_call>{"name": "crop_video", "arguments": {"start_time": 1}}</tool_call>'
    (call,) = parse_tool_calls(text)
    assert (call.name, call.arguments, call.error) == ("crop_video", {"start_time": 1}, None)
    assert parse_tool_calls(text, compat="reference").tools_called
