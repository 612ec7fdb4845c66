"""The tools that an agent may call. One of your own is a plain function, in any file:

    def video_length(context: ToolContext) -> str:
        '''Tell how long the video is.'''
        return f"{context.duration:g} seconds"

    AgentConfig(tools=("crop_video", video_length))        or --set agent.tools=mine.py:video_length

What the model reads about it is taken from the function (`rollout.signature`). It runs on a worker
thread and returns words or `Frames`, of any size, which a sub-agent reports on or the main agent
is shown, as the agent's `evidence` says. What is wrong with a call it raises as a `ToolError`, in
words for the model; whatever else it raises becomes an error response too. The only file that it
is handed is the row's own video, whatever path a call names. Where several hosts run together, one
of them calls it, and the others are told what it found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from paravt_jax.interfaces import FrameReader
from paravt_jax.plugins import load
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
from rollout.signature import CONTEXT, Signature, WrongArguments

_LOG = logging.getLogger(__name__)


class ToolError(Exception):
    """Why a call has no result, in words for the model."""


@dataclasses.dataclass(frozen=True)
class FoundFrames:
    """Frames of a window that a tool found."""

    frames: Frames
    start: float
    """Start of the window in seconds."""
    end: float
    """End of the window in seconds."""


class ToolContext:
    """What a tool may see: the row's own video, and no other file."""

    def __init__(self, reader: FrameReader, video: VideoRef, frame_budget: int) -> None:
        self._reader, self._video = reader, video
        self.frame_budget = frame_budget
        """Frames that the prompt shows."""

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return self._video.duration

    def clip(self, start: float, end: float, tokens: int | None = None) -> FoundFrames:
        """Frames of the window [start, end) seconds, which share `tokens` vision tokens if given.

        Raises:
            ToolError: they cannot be decoded.
        """
        with self._reading(f"crop {start:g}-{end:g}", "this window of the video"):
            return FoundFrames(self._reader.clip(self._video, start, end, tokens), start, end)

    def overview(self, count: int | None = None) -> Frames:
        """`count` frames spread over the whole video, at the size that the model sees; as many as
        the prompt shows if not told.

        Raises:
            ToolError: they cannot be decoded.
        """
        with self._reading("overview", "the video"):
            return self._reader.overview(self._video, count or self.frame_budget)

    def frames_at(self, *seconds: float) -> Frames:
        """The frames on screen at these times, in the resolution of the file.

        Raises:
            ToolError: a time lies outside of the video, or they cannot be decoded.
        """
        for time in seconds:
            if not 0 <= time <= self.duration:
                raise ToolError(f"{time:g} seconds lie outside of the video's {self.duration:g}")
        with self._reading(f"frames at {seconds}", "this moment of the video"):
            return self._reader.frames_at(self._video, seconds)

    @contextlib.contextmanager
    def _reading(self, what: str, subject: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a decoder raises on a broken file
            _LOG.warning("%s of %s failed: %s", what, self._video.path, error)
            raise ToolError(f"{subject} could not be read") from error


ToolFunction = Callable[[ToolCall, ToolContext], str | FoundFrames | Frames]


@dataclasses.dataclass(frozen=True)
class Tool:
    """What the model reads about a tool, and what happens when it is called."""

    schema: Mapping[str, Any]
    """In the form that chat templates take: `{"type": "function", "function": {...}}`."""
    run: ToolFunction
    sees_frame_budget: bool = False
    """Whether equal calls of prompts that show other numbers of frames may find other things."""

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
    by_name = {tool.name: tool for tool in tools}
    if len(by_name) < len(tools):
        raise ValueError(f"tools {', '.join(tool.name for tool in tools)}: a name occurs twice")
    return by_name


def function_tool(function: Callable[..., Any]) -> Tool:
    """A plain function as a tool: see the top of this file.

    Raises:
        ValueError: its signature or docstring lacks what models have to be told.
    """
    signature = Signature.of(function)

    def run(call: ToolCall, context: ToolContext) -> str | FoundFrames | Frames:
        try:
            arguments = signature.arguments(call.arguments)
        except WrongArguments as error:
            raise ToolError(str(error)) from error
        if signature.takes_context:
            arguments[CONTEXT] = context
        output = function(**arguments)
        if not isinstance(output, str | Frames | FoundFrames):
            raise TypeError(f"it returned {type(output).__name__}, neither text nor Frames")
        return output

    return Tool(signature.schema, run, sees_frame_budget=signature.takes_context)


def crop_video(config: AgentConfig) -> Tool:
    """The tool of ParaVT and LongVT; its description says whether a call gives words or frames."""
    schema = CROP_VIDEO_TOOL
    if config.evidence == "frames":
        words = "Watch one part of the video closely: get more frames of it."
        schema = {**schema, "function": {**schema["function"], "description": words}}
    return Tool(schema, lambda call, video: video.clip(*_found(crop_window(call, video.duration))))


def get_video_clip_frame(config: AgentConfig) -> Tool:
    """VITAL's tool. It refuses windows that leave the video or last a second or less."""

    def run(call: ToolCall, video: ToolContext) -> FoundFrames:
        return video.clip(*_found(clip_frame_window(call, video.duration)))

    return Tool(GET_VIDEO_CLIP_FRAME_TOOL, run)


def grounding(config: AgentConfig) -> Tool:
    """Video-o3's tool: the strategy that a call names decides the clip's vision tokens."""

    def run(call: ToolCall, video: ToolContext) -> FoundFrames:
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
    """The tools of an agent, those of this file and users' own. Schemas reach prompts and grammar.

    Raises:
        ValueError: a name that no tool has, or one that occurs twice; a function that is no tool.
    """
    try:
        return registry(*(_tool(name, config) for name in config.tool_names))
    except ValueError as error:
        raise ValueError(f"agent.tools={','.join(config.tool_names)}: {error}") from error


def _tool(name: str, config: AgentConfig) -> Tool:
    if name in MAKERS:
        return MAKERS[name](config)
    function = load(name)
    if not callable(function):
        raise ValueError(f"{name} is no function")
    return function_tool(function)


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
        # A model may write anything as a name, and reads this again: little of it, and in ASCII.
        raise ToolError(f"unknown tool {call.name[:40]!a}; available: {', '.join(tools)}")
    return tools[call.name]
