"""The tools of related systems that look at a part of the video: schemas, and what a call asks for.

ParaVT's and LongVT's `crop_video` is part of the protocol (`paravt_jax.protocol`). Here are VITAL's
`get_video_clip_frame` (arXiv 2508.04416) and Video-o3's `grounding` (arXiv 2601.23224). The first
refuses what lies outside of the video, as its source does; the second is clamped to it.
"""

from __future__ import annotations

import json
from typing import Any

from paravt_jax.protocol import GROUNDING_TOOL, Window, call_times, parse_seconds, window_tool
from paravt_jax.records import ToolCall

CLIP_FRAME_TOOL = "get_video_clip_frame"
"""VITAL's tool."""

STRATEGIES = ("coarse", "medium", "fine")
"""How closely Video-o3's tool looks: each has a larger quota of vision tokens than the last."""

SHORTEST_CLIP = 1.0
"""Seconds. VITAL's tool wants more than this, Video-o3's at least this."""

GET_VIDEO_CLIP_FRAME_TOOL = window_tool(
    CLIP_FRAME_TOOL, "Get the frames of one part of the video, which is longer than 1 second."
)
"""Schema of VITAL's tool."""

GROUNDING_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": GROUNDING_TOOL,
        "description": "Watch one part of the video again, at least 1 second long.",
        "parameters": {
            "type": "object",
            "properties": {
                "temporal_segment": {
                    "type": "array",
                    "items": {"type": "number"},
                    "minItems": 2,
                    "maxItems": 2,
                    "description": "Start and end of the part, in seconds.",
                },
                "sampling_strategy": {
                    "type": "string",
                    "enum": list(STRATEGIES),
                    "description": "How closely to look.",
                },
            },
            "required": ["temporal_segment", "sampling_strategy"],
        },
    },
}
"""Schema of Video-o3's tool; its grammar is what a `<grounding>` block holds."""


def clip_frame_window(call: ToolCall, duration: float) -> Window | str:
    """Window of a `get_video_clip_frame` call: 0 <= start, end <= duration, end - start > 1.

    Args:
        call: a well-formed call.
        duration: length of the row's video in seconds.

    Returns:
        `(start, end)` in seconds, or an error text for the model.
    """
    times = call_times(call)
    if isinstance(times, str):
        return times
    start, end = times
    if start < 0 or end > duration:
        return f"the part {start:g} to {end:g} must lie within 0 and {duration:g} seconds"
    if not end - start > SHORTEST_CLIP:
        return f"end_time {end:g} must be more than {SHORTEST_CLIP:g} second after {start:g}"
    return start, end


def grounding_window(call: ToolCall, duration: float) -> Window | str:
    """Window of a `grounding` call, clamped to the video; at least 1 second must be left of it.

    Args:
        call: a well-formed call.
        duration: length of the row's video in seconds.

    Returns:
        `(start, end)` in seconds, or an error text for the model.
    """
    segment = call.arguments.get("temporal_segment")
    if not isinstance(segment, list) or len(segment) != 2:
        return '"temporal_segment" must be a list of two times in seconds'
    times = [parse_seconds(time) for time in segment]
    if None in times:
        return f'"temporal_segment" must hold two numbers of seconds, not {_shown(segment)}'
    start, end = (float(time) for time in times if time is not None)
    start, end = max(start, 0.0), min(end, duration)
    if end - start < SHORTEST_CLIP:
        return (
            f'"temporal_segment" must hold at least {SHORTEST_CLIP:g} second of a video of '
            f"{duration:g} seconds"
        )
    return start, end


def grounding_strategy(call: ToolCall) -> int | str:
    """Which of `STRATEGIES` a `grounding` call names, as its index, or an error text."""
    strategy = call.arguments.get("sampling_strategy")
    if strategy not in STRATEGIES:
        names = ", ".join(STRATEGIES)
        return f'"sampling_strategy" must be one of {names}, not {_shown(strategy)}'
    return STRATEGIES.index(strategy)


def _shown(value: Any) -> str:
    """A value from the model, short and printable."""
    try:
        return json.dumps(value)[:40]
    except (TypeError, ValueError, RecursionError):
        return "that"
