"""What answers a tool call: words, the report of a sub-agent, frames, or an error.

A bad call is an answer, not a crash: whatever goes wrong becomes words for the model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Generator
from operator import itemgetter
from typing import Any

from paravt_jax.interfaces import FrameReader, Renderer
from paravt_jax.protocol import reported
from paravt_jax.records import Clip, Prompt, ToolCall, Trajectory, VideoRef
from rollout.limits import CROP, AgentConfig, TokenBudget, subagent_limit
from rollout.record import TrajectoryBuilder, generated_turn
from rollout.responses import Response, strip_markup
from rollout.tasks import EngineSession, Generate, Need
from rollout.tools import OwnVideo, Tool, ToolError, Tools, find
from rollout.workers import Job, Workers

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Kit:
    """What an agent is made of, besides the engine."""

    renderer: Renderer
    reader: FrameReader
    tools: Tools
    config: AgentConfig
    room: TokenBudget
    crop_tokens: int | None
    """Most tokens of a crop: of a sub-agent's prompt, or of its frames in a tool response."""


@dataclasses.dataclass(frozen=True)
class ToolRequest:
    """One call of a rollout, as whoever answers it needs to know it."""

    call: ToolCall
    number: int
    """Place of the call in its turn, from 0."""
    video: VideoRef
    """The row's own video."""
    seed: int
    """Every call is its own sample, also where two look at the same window."""


@dataclasses.dataclass(frozen=True)
class ToolResult:
    """What came of a call."""

    response: Response
    executed: bool = False
    """Whether the call ran to a result."""
    subagent: Trajectory | None = None


class Toolbox:
    """Answers calls: host work on worker threads, sub-agents in the session of the main agents."""

    def __init__(
        self, kit: Kit, session: EngineSession, workers: Workers, policy_version: int
    ) -> None:
        self._kit, self._session, self._workers = kit, session, workers
        self._policy_version = policy_version
        self._markup = len(kit.renderer.tool_turn([""]))
        self._head = kit.renderer.encode(kit.renderer.opening)
        self._limit = subagent_limit(kit.config, kit.renderer)

    def answer(self, request: ToolRequest) -> Generator[Need, Any, ToolResult]:
        """The program that answers one call. Never raises on anything that a model can write."""
        try:
            tool = self._allowed(request)
            found = yield self._job(tool, request)
        except Exception as error:
            return ToolResult(f"Error: {_words(error, request.call)}")
        if isinstance(found, Prompt):
            return (yield from self._report(found, request.seed))
        return _result(found, f"{tool.name} found nothing")

    def _allowed(self, request: ToolRequest) -> Tool:
        """The tool that is called.

        Raises:
            ToolError: the rules forbid the call, or no tool has this name.
        """
        config = self._kit.config
        if not config.offers_tools:
            raise ToolError("tools are not available")
        if request.number >= config.calls_run:
            if config.dispatch == "sequential":
                raise ToolError("call one tool at a time: only the first call of a turn is run")
            raise ToolError(f"at most {config.max_calls_per_turn} calls per turn")
        return find(self._kit.tools, request.call)

    def _job(self, tool: Tool, request: ToolRequest) -> Job:
        """The tool's work. Rollouts of a group often make the same call: it is run once."""
        arguments = sorted(request.call.arguments.items(), key=itemgetter(0))
        limit = self._kit.config.tool_timeout if tool.timeout is None else tool.timeout
        return self._workers.submit(
            (tool.name, request.video, repr(arguments)),
            lambda: self._run(tool, request.call, request.video),
            limit,
        )

    def _run(self, tool: Tool, call: ToolCall, video: VideoRef) -> str | Clip | Prompt:
        """On a worker thread: run the tool, and render the frames that it found.

        Raises:
            ToolError: the call is at fault, or its frames take more room than a crop has.
        """
        view = tool.run(call, OwnVideo(self._kit.reader, video))
        if isinstance(view, str):
            return view
        renderer, shown = self._kit.renderer, (view.frames, view.start, view.end)
        if self._kit.config.evidence == "frames":
            clip = renderer.clip(*shown)
            self._check_size(len(renderer.frames_turn([clip]).tokens) - self._markup)
            return clip
        prompt = renderer.subagent_prompt(*shown)
        self._check_size(len(prompt.tokens))
        return prompt

    def _check_size(self, tokens: int) -> None:
        most = self._kit.crop_tokens
        if most is not None and tokens > most:
            raise ToolError("this part has too many frames to be shown; ask for a shorter one")

    def _report(self, prompt: Prompt, seed: int) -> Generator[Need, Any, ToolResult]:
        """Let a sub-agent look, and make what it says after its thought the response."""
        kit = self._kit
        record, sampling = TrajectoryBuilder(prompt), kit.config.subagent_sampling
        (stream,) = self._session.open(CROP, prompt, [seed])
        record.add_given(self._head)
        generated = yield Generate(stream, self._head, sampling, self._limit)
        self._session.close(stream)
        record.add_turn(generated_turn(generated, self._head, kit.renderer))
        trajectory = record.finish(kit.renderer, self._policy_version)
        answer = _result(reported(trajectory.full_text), "the sub-agent reported nothing")
        return dataclasses.replace(answer, subagent=trajectory)


def _result(found: Response, nothing: str) -> ToolResult:
    """A result as a response; an error if it says nothing."""
    if isinstance(found, Clip):
        return ToolResult(found, executed=True)
    text = strip_markup(found)
    return ToolResult(text, executed=True) if text else ToolResult(f"Error: {nothing}")


def _words(error: Exception, call: ToolCall) -> str:
    """What the model is told about a failure. Nothing of this machine is in it."""
    if isinstance(error, ToolError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"{call.name} took too long"
    _LOG.warning("tool %s failed: %r", call.name, error)
    return f"{call.name} failed"
