"""Watching one rollout: its text as it is written, its calls as they go out and come back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paravt_jax.interfaces import Renderer
from paravt_jax.protocol import CALL_OPEN, GROUNDING_OPEN, TURN_END
from paravt_jax.records import ToolCall
from rollout.engine.slots import StreamId
from rollout.observer import Observer
from rollout.responses import ToolResult

UNTIL = (CALL_OPEN, GROUNDING_OPEN, TURN_END)
"""What follows is no text for people: calls are told one by one."""
BROKEN = "\ufffd"
"""What a decoder makes of the first bytes of a character."""
SHORT = 200
"""Characters of a report that are shown."""


@dataclasses.dataclass(frozen=True)
class AnsweredCall:
    """A call and what came of it."""

    turn: int
    """Which turn made it, counted from 1."""
    call: ToolCall
    result: ToolResult

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        call, result, subagent = self.call, self.result, self.result.subagent
        return {
            "turn": self.turn,
            "name": call.name,
            "arguments": call.arguments,
            "error": call.error,
            "executed": result.executed,
            "report": said(result),
            "subagent_tokens": 0 if subagent is None else int(subagent.generated.sum()),
        }


class Watcher(Observer):
    """Notes the calls of one rollout, and shows it while it goes on.

    Args:
      renderer: decodes what is written.
      show: takes pieces of text and their style: `text` as the model writes it, `call` and
        `report` a line each.
    """

    def __init__(self, renderer: Renderer, show: Callable[[str, str], None]):
        self._renderer, self._show = renderer, show
        self.answered_calls: list[AnsweredCall] = []
        """In the order in which they came back."""
        self._main: StreamId | None = None
        self._turn, self._tokens, self._shown = 0, [], 0

    def turn_begins(self, stream: StreamId, prefix: Sequence[int]) -> None:
        """Show the forced head."""
        self._main, self._tokens, self._shown = stream, list(prefix), 0
        self._turn += 1
        self._show_more()

    def wrote(self, stream: StreamId, tokens: np.ndarray) -> None:
        """Show what is new, unless a sub-agent wrote it: its report comes as a whole."""
        if stream == self._main:
            self._tokens += tokens.tolist()
            self._show_more()

    def called(self, stream: StreamId, number: int, call: ToolCall) -> None:
        """Show a call that goes out."""
        self._show(f"-> {number + 1}  {in_words(call)}", "call")

    def answered(self, stream: StreamId, number: int, call: ToolCall, result: ToolResult) -> None:
        """Show what came of it."""
        self.answered_calls.append(AnsweredCall(self._turn, call, result))
        words = " ".join(said(result).split())
        cut = words if len(words) <= SHORT else f"{words[:SHORT]}..."
        self._show(f"<- {number + 1}  {cut}", "report")

    def _show_more(self) -> None:
        text = readable(self._renderer.decode(self._tokens))
        if len(text) > self._shown:
            self._show(text[self._shown :], "text")
            self._shown = len(text)


def readable(text: str) -> str:
    """The beginning of a turn that is there for good and meant for people: up to its calls, and
    without a tag or a character that is not yet whole."""
    ends = [at for tag in UNTIL if (at := text.find(tag)) >= 0]
    if ends:
        return text[: min(ends)].rstrip()
    text = text.rstrip(BROKEN)
    begun = text.rfind("<")
    if begun >= 0 and any(tag.startswith(text[begun:]) for tag in UNTIL):
        text = text[:begun]
    return text


def in_words(call: ToolCall) -> str:
    """A call as one would write it: `crop_video(start_time=0, end_time=8)`."""
    if call.error is not None:
        return f"{call.name or 'no call'}: {call.error}"
    arguments = (f"{name}={json.dumps(value)}" for name, value in call.arguments.items())
    return f"{call.name}({', '.join(arguments)})"


def said(result: ToolResult) -> str:
    """What the main agent is told, or how many frames it is shown."""
    if isinstance(result.response, str):
        return result.response
    clip = result.response
    return f"{len(clip.times)} frames from {clip.start:g} to {clip.end:g} seconds"
