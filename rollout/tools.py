"""The tools that an agent may call.

A tool of this project looks at a window of the row's own video: it turns a parsed call
into a window, or into words about what is wrong with the call. Whatever path a call
names is never used. The schema that the model reads belongs to the renderer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from paravt_jax.protocol import TOOL_NAME, Window, crop_window
from paravt_jax.records import ToolCall

Tool = Callable[[ToolCall, float], Window | str]
"""From a call and the duration of the video in seconds to a window, or to an error text."""

TOOLS: Mapping[str, Tool] = {TOOL_NAME: crop_window}
"""The registry: every tool by name."""


def plan(tools: Mapping[str, Tool], call: ToolCall, duration: float) -> Window | str:
    """The window that a call asks for, or the error that answers it. Never raises on bad calls."""
    if call.error is not None:
        return call.error
    if call.name not in tools:
        return f"unknown tool {call.name[:40]!a}; available: {', '.join(tools)}"
    return tools[call.name](call, duration)
