"""Events of rollouts while they run, for whoever watches one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paravt_jax.records import ToolCall
from rollout.engine.slots import StreamId
from rollout.responses import ToolResult


class Observer:
    """Receives the events of rollouts while they run; this one ignores all of them.

    Called between two steps of the engine: a slow method holds up every rollout.
    """

    def turn_begins(self, stream: StreamId, prefix: Sequence[int]) -> None:
        """A main agent is about to write a turn, after a forced head of these tokens."""

    def wrote(self, stream: StreamId, tokens: np.ndarray) -> None:
        """A stream, of a main agent or of a sub-agent, has generated these tokens, int32 `[t]`."""

    def called(self, stream: StreamId, number: int, call: ToolCall) -> None:
        """A call of a main agent goes out, the one of this number in its turn, from 0."""

    def answered(self, stream: StreamId, number: int, call: ToolCall, result: ToolResult) -> None:
        """What came of it. Calls of a turn come back in any order."""


NOBODY = Observer()
"""Ignores every event."""
