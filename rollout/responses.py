"""Results of tool calls, and tool responses as tokens: free of markup, never too long.

A bad call is an answer, not a crash: whatever goes wrong becomes words for the model.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import traceback
from collections.abc import Sequence

from paravt_jax.interfaces import Renderer
from paravt_jax.markup import without_tags
from paravt_jax.records import CallResult, Clip, Prompt, ToolCall, Trajectory
from rollout.tools import ToolError

_LOG = logging.getLogger(__name__)

Response = str | Clip
"""Words, or frames to be shown."""

_MARKUP = re.compile(
    r"<\|[^<>|]*\|>|</?(?:tool_call|tool_code|tool_response|think|answer|grounding)>"
)
"""Special tokens and structural tags: a tool response must not contain any."""


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What came of a call."""

    response: Response
    executed: bool = False
    """Whether the call ran to a result."""
    subagent: Trajectory | None = None
    window: tuple[float, float] | None = None
    """Start and end in seconds of what was looked at, if something was."""
    seconds: float = 0.0
    """From when the call went out until its result was there."""


@dataclasses.dataclass(frozen=True, eq=False)
class ReportRequest:
    """What a sub-agent is to report on. Two are equal only if they are one."""

    prompt: Prompt
    window: tuple[float, float]
    """Start and end of it in seconds."""


def noted(results: Sequence[ToolResult], subagents: int) -> tuple[CallResult, ...]:
    """The results of a turn as its record keeps them, after so many sub-agents of earlier turns."""
    numbers = itertools.count(subagents)
    return tuple(
        CallResult(
            text="" if isinstance(result.response, Clip) else result.response,
            executed=result.executed,
            window=result.window,
            seconds=result.seconds,
            subagent=next(numbers) if result.subagent else None,
            clip=result.response if isinstance(result.response, Clip) else None,
        )
        for result in results
    )


def result_of(output: Response, nothing: str) -> ToolResult:
    """What a tool found; the error `nothing` if that says nothing."""
    if isinstance(output, Clip):
        return ToolResult(output, executed=True, window=(output.start, output.end))
    text = strip_markup(output)
    return ToolResult(text, executed=True) if text else ToolResult(f"Error: {nothing}")


def error_result(error: Exception, call: ToolCall) -> ToolResult:
    """What the model is told about a failure. Nothing of this machine is in it."""
    words = f"{call.name} failed"
    if isinstance(error, ToolError):
        words = str(error)
    elif isinstance(error, TimeoutError):
        words = f"{call.name} took too long"
    elif not hasattr(error, "host"):  # of several hosts, the one that ran the tool says where
        place = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" at {frame.filename}:{frame.lineno}" for frame in place)
        _LOG.warning("tool %s failed%s: %r", call.name, where, error)
    return ToolResult(f"Error: {words}")


def strip_markup(text: str) -> str:
    """Text without special tokens and structural tags, which would break out of a response."""
    return without_tags(text, _MARKUP).strip()


def response_turn(
    renderer: Renderer, responses: Sequence[Response], room: int, most: int, demand: str = ""
) -> list[int] | Prompt:
    """From the end of a turn to the head of the next, in at most `room` tokens; with a `demand`,
    this is what the user says after the responses.

    First all surplus responses beyond `most` become one, then the longest words are cut. Frames
    are left as they are: they had to fit their share of the room before.
    """
    fitted = [text if isinstance(text, Clip) else strip_markup(text) for text in responses]
    limit = room
    while _length(turn := _render(renderer, fitted, demand)) > room:
        if len(fitted) > most + 1:
            fitted = [*fitted[:most], fitted[-1]]
        else:
            assert limit > 0, "responses of no words always fit"
            limit = limit * 3 // 4
            fitted = [_cut(renderer, response, limit) for response in fitted]
    return turn


def _render(renderer: Renderer, responses: Sequence[Response], demand: str) -> list[int] | Prompt:
    words, more = [response for response in responses if isinstance(response, str)], [demand]
    if len(words) == len(responses):
        return renderer.tool_turn(words, *filter(None, more))
    return renderer.frames_turn(responses, *filter(None, more))


def _length(turn: list[int] | Prompt) -> int:
    return len(turn.tokens if isinstance(turn, Prompt) else turn)


def _cut(renderer: Renderer, response: Response, limit: int) -> Response:
    if isinstance(response, Clip):
        return response
    tokens = renderer.encode(response)
    if len(tokens) <= limit:
        return response
    # A cut may fall inside a character of several bytes.
    return renderer.decode(tokens[:limit]).rstrip("\ufffd")
