"""The tools that an agent may call: each a schema for the prompt and a function.

    def video_length(call: ToolCall, video: OwnVideo) -> str:
        return f"{video.duration:g} seconds"

    tools = registry(crop_video(config), Tool(schema, video_length))

A function runs on a worker thread. It returns words, or a `View`: frames that a sub-agent
reports on, or that are shown to the main agent, as the agent's `evidence` says. What is
wrong with a call it raises as a `ToolError`, in words for the model; whatever else it raises
becomes an error response too. The only file it is handed is the row's own video, whatever
path a call names. Where several hosts run together each of them calls it, and must find the same.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from paravt_jax.interfaces import FrameReader
from paravt_jax.protocol import CROP_VIDEO_TOOL, Window, crop_window
from paravt_jax.records import Frames, ToolCall, VideoRef
from paravt_jax.windows import (
    GET_VIDEO_CLIP_FRAME_TOOL,
    GROUNDING_SCHEMA,
    clip_frame_window,
    grounding_strategy,
    grounding_window,
)
from rollout.limits import AgentConfig

_LOG = logging.getLogger(__name__)


class ToolError(Exception):
    """Why a call has no result, in words for the model."""


@dataclasses.dataclass(frozen=True)
class View:
    """Frames of a window that a tool found."""

    frames: Frames
    start: float
    """Start of the window in seconds."""
    end: float
    """End of the window in seconds."""


class OwnVideo:
    """The row's own video, as a tool may see it."""

    def __init__(self, reader: FrameReader, video: VideoRef) -> None:
        self._reader, self._video = reader, video

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self._video.duration

    def clip(self, start: float, end: float, tokens: int | None = None) -> View:
        """Frames of the window [start, end) seconds, which share `tokens` vision tokens if given.

        Raises:
            ToolError: they cannot be decoded.
        """
        try:
            return View(self._reader.clip(self._video, start, end, tokens), start, end)
        except Exception as error:  # whatever a decoder raises on a broken file
            _LOG.warning("crop %g-%g of %s failed: %s", start, end, self._video.path, error)
            raise ToolError("this window of the video could not be read") from error


ToolFunction = Callable[[ToolCall, OwnVideo], str | View]


@dataclasses.dataclass(frozen=True)
class Tool:
    """What the model reads about a tool, and what happens when it is called."""

    schema: Mapping[str, Any]
    """In the form that chat templates take: `{"type": "function", "function": {...}}`."""
    run: ToolFunction
    timeout: float | None = None
    """Seconds that a call may take; None: the agent's `tool_timeout`."""

    @property
    def name(self) -> str:
        """The name that calls use."""
        return self.schema["function"]["name"]


Tools = Mapping[str, Tool]
"""Tools by name."""


def registry(*tools: Tool) -> Tools:
    """Tools by name.

    Raises:
        ValueError: two have the same name.
    """
    named = {tool.name: tool for tool in tools}
    if len(named) < len(tools):
        raise ValueError(f"tools {', '.join(tool.name for tool in tools)}: a name occurs twice")
    return named


def crop_video(config: AgentConfig) -> Tool:
    """The tool of ParaVT and LongVT; its description says whether a call gives words or frames."""
    schema = CROP_VIDEO_TOOL
    if config.evidence == "frames":
        words = "Watch one part of the video closely: get more frames of it."
        schema = {**schema, "function": {**schema["function"], "description": words}}
    return Tool(schema, lambda call, video: video.clip(*_found(crop_window(call, video.duration))))


def get_video_clip_frame(config: AgentConfig) -> Tool:
    """VITAL's tool. It refuses windows that leave the video or last a second or less."""

    def run(call: ToolCall, video: OwnVideo) -> View:
        return video.clip(*_found(clip_frame_window(call, video.duration)))

    return Tool(GET_VIDEO_CLIP_FRAME_TOOL, run)


def grounding(config: AgentConfig) -> Tool:
    """Video-o3's tool: the strategy that a call names decides the clip's vision tokens."""

    def run(call: ToolCall, video: OwnVideo) -> View:
        window = _found(grounding_window(call, video.duration))
        strategy = grounding_strategy(call)
        if isinstance(strategy, str):
            raise ToolError(strategy)
        return video.clip(*window, config.clip_tokens[strategy])

    return Tool(GROUNDING_SCHEMA, run)


def _found(window: Window | str) -> Window:
    if isinstance(window, str):
        raise ToolError(window)
    return window


MAKERS: dict[str, Callable[[AgentConfig], Tool]] = {
    maker.__name__: maker for maker in (crop_video, get_video_clip_frame, grounding)
}
"""How each tool that `agent.tools` may name is made."""


def agent_tools(config: AgentConfig) -> Tools:
    """The tools of an agent. Add yours to `MAKERS`: schema and function reach prompts, grammar and
    episodes.

    Raises:
        ValueError: a name that no tool has, or one that occurs twice.
    """
    if unknown := sorted(set(config.tools) - set(MAKERS)):
        known = ", ".join(MAKERS)
        raise ValueError(f"agent.tools={','.join(config.tools)}: {unknown} unknown; known: {known}")
    return registry(*(MAKERS[name](config) for name in config.tools))


TOOLS: Tools = agent_tools(AgentConfig())
"""What an agent has unless it is told otherwise."""


def find(tools: Tools, call: ToolCall) -> Tool:
    """The tool that a call names.

    Raises:
        ToolError: the call is malformed, or no tool has this name.
    """
    if call.error is not None:
        raise ToolError(call.error)
    if call.name not in tools:
        raise ToolError(f"unknown tool {call.name[:40]!a}; available: {', '.join(tools)}")
    return tools[call.name]
