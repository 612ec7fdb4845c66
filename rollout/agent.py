"""Episodes: think, call tools side by side, answer from what came back.

An agent turns prompts into rollouts over one session of the engine. Every rollout is a program of
its own (`Agent.episode`), and so is every tool call of it; one scheduler (`rollout.tasks`) drives
all of them, so that the crops of one are decoded and reported on while others still think. Streams
grow by concatenation only: no token is ever rendered or tokenised twice.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
import weakref
from collections.abc import Callable, Generator, Iterator, MutableMapping, Sequence
from operator import itemgetter
from typing import Any

from paravt_jax.blocks import join_blocks, text_block
from paravt_jax.interfaces import FrameReader, Params, Renderer
from paravt_jax.protocol import parse_tool_calls, reported
from paravt_jax.records import (
    Clip,
    Frames,
    Prompt,
    RolloutGroup,
    Row,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
)
from rollout.engine.slots import Generated, StreamId
from rollout.limits import CROP, MAIN, AgentConfig, subagent_limit, token_budget, turn_head
from rollout.observer import NOBODY, Observer
from rollout.record import TrajectoryBuilder, derive_seed, generated_turn
from rollout.responses import (
    ReportRequest,
    ToolResult,
    error_result,
    noted,
    response_turn,
    result_of,
)
from rollout.tasks import (
    EngineSession,
    Generate,
    Given,
    Need,
    Parallel,
    Program,
    Scheduler,
    Shared,
)
from rollout.tools import TOOLS, FoundFrames, Tool, ToolContext, ToolError, Tools, find
from rollout.workers import Job, Share, Workers, done_here

KEPT_JOBS = 256
"""Crops that a stream of prompts remembers, for others that ask for the same."""
Item = tuple[Row, int, Prompt]
"""A question, the number of frames that its prompt shows, and the prompt."""


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What the rollouts of one call of `Agent.run` share."""

    session: EngineSession
    workers: Workers
    policy_version: int
    reports: MutableMapping[ReportRequest, Shared] = dataclasses.field(
        default_factory=weakref.WeakKeyDictionary
    )
    """Of sub-agents that draw nothing at random, as long as the workers remember the crop."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One attempt at a question."""

    run: RunContext
    row: Row
    frame_budget: int
    prompt: Prompt
    seed: int
    stream: StreamId
    place: tuple[int, int] = (0, 1)
    """The number of this rollout in its run, from 0, and how many there are."""


@dataclasses.dataclass(frozen=True)
class ToolRequest:
    """One call of a rollout."""

    rollout: Rollout
    call: ToolCall
    number: int
    """Place of the call in its turn, from 0."""
    seed: int
    """Every call is its own sample, also where two look at the same window, unless nothing is drawn
    at random."""


class Agent:
    """Runs episodes of a policy."""

    def __init__(
        self,
        open_session: Callable[[Params], EngineSession],
        renderer: Renderer,
        reader: FrameReader,
        tools: Tools = TOOLS,
        config: AgentConfig = AgentConfig(),
        crop_tokens: int | None = None,
        share: Share = done_here,
        before_step: Callable[[], None] = lambda: None,
        observer: Observer = NOBODY,
        after_run: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            open_session: a session under these weights, of an engine with the slot pools that
                `rollout.limits.slot_pools` computes.
            tools: what calls may name; prompts must offer their schemas.
            crop_tokens: most tokens of a crop: of a sub-agent's prompt, or of its frames in a tool
                response. A larger one is answered with an error. Needed where frames are shown.
            share: which of several hosts, all of which run the same rollouts, runs a tool.
            before_step: called before each step of the engine; what it raises ends `run`.
            observer: told of turns and calls while they happen; of tokens by the session, if that
                was given its `wrote`.
            after_run: called when `run` or `stream` ends, or is left: the memory of rollouts is
                free for others.

        Raises:
            ValueError: frames are the evidence and `crop_tokens` is missing, or `episode_tokens`
                is too small.
        """
        if config.evidence == "frames" and crop_tokens is None:
            raise ValueError("evidence='frames' needs crop_tokens: the room that a crop takes")
        self._open_session, self._renderer, self._reader = open_session, renderer, reader
        self._tools, self._config, self._crop_tokens = tools, config, crop_tokens
        self._share, self._before_step = share, before_step
        self._observer = observer
        self._after_run = after_run
        self._budget = token_budget(config, renderer, crop_tokens or 0)
        self._prefix = turn_head(config, renderer)
        self._subagent_prefix = renderer.encode(renderer.opening)
        self._subagent_tokens = subagent_limit(config, renderer)
        self._response_markup = len(renderer.tool_turn([""]))
        self.metrics: dict[str, float] = {}
        """What the last run cost on the host, for `metrics.jsonl`."""
        self.on_episode_end: Callable[[], object] = lambda: None
        """Called whenever an episode has ended: how far a run is."""

    def run(
        self,
        params: Params,
        items: Sequence[Item],
        copies: int,
        seed: int,
        policy_version: int = 0,
    ) -> list[RolloutGroup]:
        """Roll out every prompt `copies` times.

        A rollout depends on `seed`, its row id and its number, not on the rest of the batch.
        """
        session = self._open_session(params)
        with Workers(self._config.decode_threads, share=self._share) as workers:
            run = RunContext(session, workers, policy_version)
            scheduler = Scheduler(session, self._before_step)
            rollouts = _open_rollouts(run, items, copies, seed)
            try:
                done = scheduler.run([self._episode_and_notice(rollout) for rollout in rollouts])
            finally:
                self._after_run()
        self.metrics = _metrics(done, scheduler, workers)
        return [
            RolloutGroup(row, budget, tuple(done[at * copies : (at + 1) * copies]))
            for at, (row, budget, _) in enumerate(items)
        ]

    def stream(
        self,
        params: Params,
        feed: Callable[[bool], Item | None],
        most: int,
        seed: int,
    ) -> Iterator[tuple[Row, Trajectory, float]]:
        """Roll out prompts as they come, each once: its row, its rollout and how many seconds that
        took, in the order in which they end. As one ends, the next begins beside the others.

        A rollout depends on `seed` and its row id alone. `metrics` are there at the end.

        Args:
            feed: the next prompt, of a row id of its own. Told to wait, it gives None when there
                is no more; otherwise also when none is ready yet.
            most: prompts under way at a time; the engine has slots for as many.
        """
        session = self._open_session(params)
        with Workers(self._config.decode_threads, KEPT_JOBS, self._share) as workers:
            run = RunContext(session, workers, policy_version=0)
            scheduler = Scheduler(session, self._before_step)

            def program(wait: bool) -> Program | None:
                if (item := feed(wait)) is None:
                    return None
                (rollout,) = _open_rollouts(run, [item], 1, seed)
                return self._timed(rollout)

            try:
                yield from scheduler.stream(program, most)
            finally:
                self._after_run()
        self.metrics = {"time/tool_wait": scheduler.wait_seconds}

    def _timed(self, rollout: Rollout) -> Program:
        began = time.perf_counter()
        trajectory = yield from self.episode(rollout)
        return rollout.row, trajectory, time.perf_counter() - began

    def _episode_and_notice(self, rollout: Rollout) -> Program:
        trajectory = yield from self.episode(rollout)
        self.on_episode_end()
        return trajectory

    def episode(self, rollout: Rollout) -> Generator[Need, Any, Trajectory]:
        """The program of one rollout, from top to bottom as the protocol goes: think, call, read,
        answer. It ends with its record."""
        config, record = self._config, TrajectoryBuilder(rollout.prompt)
        record.add_given(self._prefix)
        given: Given = self._prefix
        for number in itertools.count():
            final = number == config.rounds or not self._another_round_fits(record)
            limit = config.answer_tokens if final else config.turn_tokens
            self._observer.turn_begins(rollout.stream, self._prefix)
            generated = yield Generate(rollout.stream, given, config.sampling, limit)
            record.add_routing(generated.routing)
            turn = self.read_turn(generated)
            if final or not turn.calls:
                record.add_turn(turn)
                break
            requests = _tool_requests(rollout, turn, number + 1)
            results = yield Parallel([self._observed(request) for request in requests])
            recorded = noted(results, len(record.subagents))
            record.add_turn(dataclasses.replace(turn, results=recorded))
            demand = config.demand if number + 1 == config.rounds else ""
            given = self._respond(record, turn, results, demand)
        rollout.run.session.close(rollout.stream)
        done = record.finish(self._renderer, rollout.run.policy_version)
        return dataclasses.replace(done, call_syntax=config.call_syntax)

    def _another_round_fits(self, record: TrajectoryBuilder) -> bool:
        """Whether a turn with calls, its responses and the forced answer fit what is left. The
        prefix of the turn is on the record already."""
        budget = self._budget
        return len(record) - budget.prefix + budget.turn + budget.answer <= budget.suffix

    def read_turn(self, generated: Generated) -> Turn:
        """What was generated as a turn with its calls. A subclass may read other calls from it."""
        turn = generated_turn(generated, self._prefix, self._renderer)
        if turn.stop_reason is StopReason.LENGTH:
            return turn
        calls = parse_tool_calls(turn.text, syntax=self._config.call_syntax)
        return dataclasses.replace(turn, calls=calls)

    def _respond(
        self,
        record: TrajectoryBuilder,
        ended: Turn,
        results: Sequence[ToolResult],
        demand: str,
    ) -> Given:
        """Put responses and the next turn's prefix on record; what the stream must be given.

        Responses follow the template's end of turn, whatever ended this one.
        """
        end_of_turn = self._renderer.eos_ids[0]
        end = [] if ended.tokens[-1] == end_of_turn else [end_of_turn]
        record.subagents += [result.subagent for result in results if result.subagent]
        responses = [result.response for result in results]
        most, room = self._config.calls_run, self._budget.response - len(end)
        turn = response_turn(self._renderer, responses, room, most, demand)
        if isinstance(turn, Prompt):
            record.add_given(end)
            record.add_frames(turn)
            record.add_given(self._prefix)
            return join_blocks([text_block(end), turn, text_block(self._prefix)])
        given = [*end, *turn, *self._prefix]
        record.add_given(given)
        return given

    def _observed(self, request: ToolRequest) -> Generator[Need, Any, ToolResult]:
        """The program of one tool call, as the observer hears of it."""
        call = request.rollout.stream, request.number, request.call
        self._observer.called(*call)
        began = time.perf_counter()
        result = yield from self._answer(request)
        result = dataclasses.replace(result, seconds=time.perf_counter() - began)
        self._observer.answered(*call, result)
        return result

    def _answer(self, request: ToolRequest) -> Generator[Need, Any, ToolResult]:
        """The program of one tool call. Never raises on anything that a model can write."""
        try:
            tool = self._tool_of(request)
            output = yield self._submit(tool, request)
        except Exception as error:
            return error_result(error, request.call)
        if isinstance(output, ReportRequest):
            return (yield from self._report_once(output, request))
        return result_of(output, f"{tool.name} found nothing")

    def _tool_of(self, request: ToolRequest) -> Tool:
        """The tool that is called."""
        config = self._config
        if not config.offers_tools:
            raise ToolError("tools are not available")
        if request.number >= config.calls_run:
            if config.dispatch == "sequential":
                raise ToolError("call one tool at a time: only the first call of a turn is run")
            raise ToolError(f"at most {config.max_calls_per_turn} calls per turn")
        return find(self._tools, request.call)

    def _submit(self, tool: Tool, request: ToolRequest) -> Job:
        """The tool's work. Rollouts of a group often make the same call: it is run once."""
        call, rollout = request.call, request.rollout
        video, frames = rollout.row.video, rollout.frame_budget
        arguments = sorted(call.arguments.items(), key=itemgetter(0))
        # `repr`, because arguments are lists and dicts as often as numbers, which have no hash.
        key = tool.name, video, repr(arguments), frames if tool.sees_frame_budget else None
        context = ToolContext(self._reader, video, frames)
        return rollout.run.workers.submit(
            key,
            lambda: self._execute(tool, call, context),
            self._config.tool_timeout,
            rollout.place,
        )

    def _execute(
        self, tool: Tool, call: ToolCall, context: ToolContext
    ) -> str | Clip | ReportRequest:
        """On a worker thread: run the tool, and render the frames that it found."""
        output, renderer = tool.run(call, context), self._renderer
        if isinstance(output, str):
            return output
        if isinstance(output, Frames):
            # Decoded crops have the size that the model sees; what users' tools make may have any.
            output = FoundFrames(renderer.resized(output), output.times[0], output.times[-1])
        shown = output.frames, output.start, output.end
        if self._config.evidence == "frames":
            clip = renderer.clip(*shown)
            self._check_size(len(renderer.frames_turn([clip]).tokens) - self._response_markup)
            return clip
        prompt = renderer.subagent_prompt(*shown)
        self._check_size(len(prompt.tokens))
        return ReportRequest(prompt, (output.start, output.end))

    def _check_size(self, tokens: int) -> None:
        if self._crop_tokens is not None and tokens > self._crop_tokens:
            raise ToolError("this part has too many frames to be shown; ask for a shorter one")

    def _report_once(
        self, report: ReportRequest, request: ToolRequest
    ) -> Generator[Need, Any, ToolResult]:
        """As `_report`. Equal calls get equal requests from the workers, and a sub-agent that takes
        the likeliest tokens would say the same to each of them: it is asked once."""
        if self._config.subagent_sampling.temperature:
            return (yield from self._report(report, request))
        reports = request.rollout.run.reports
        if report not in reports:
            reports[report] = Shared(self._report(report, request))
        return (yield reports[report])

    def _report(
        self, report: ReportRequest, request: ToolRequest
    ) -> Generator[Need, Any, ToolResult]:
        """Let a sub-agent look, and make what it says after its thought the response."""
        run, record = request.rollout.run, TrajectoryBuilder(report.prompt)
        (stream,) = run.session.open(CROP, report.prompt, [request.seed])
        record.add_given(self._subagent_prefix)
        sampling = self._config.subagent_sampling
        generated = yield Generate(stream, self._subagent_prefix, sampling, self._subagent_tokens)
        run.session.close(stream)
        record.add_routing(generated.routing)
        record.add_turn(generated_turn(generated, self._subagent_prefix, self._renderer))
        trajectory = record.finish(self._renderer, run.policy_version)
        result = result_of(reported(trajectory.full_text), "the sub-agent reported nothing")
        return dataclasses.replace(result, subagent=trajectory, window=report.window)


def _open_rollouts(
    run: RunContext, items: Sequence[Item], copies: int, seed: int
) -> Iterator[Rollout]:
    """Rollouts in prompt-major order. A row that comes twice in a batch is drawn twice."""
    occurrences: collections.Counter[str] = collections.Counter()
    place = itertools.count()
    for row, frame_budget, prompt in items:
        # By row id and not by place in the batch: neighbours must not change a draw.
        numbers = range(copies)
        seeds = [derive_seed(seed, row.row_id, occurrences[row.row_id], copy) for copy in numbers]
        streams = run.session.open(MAIN, prompt, seeds)
        occurrences[row.row_id] += 1
        for stream_seed, stream in zip(seeds, streams, strict=True):
            number = next(place), len(items) * copies
            yield Rollout(run, row, frame_budget, prompt, stream_seed, stream, number)


def _tool_requests(rollout: Rollout, turn: Turn, turns: int) -> list[ToolRequest]:
    """The calls of the rollout's `turns`-th turn, each with a seed of its own."""
    return [
        ToolRequest(rollout, call, number, derive_seed(rollout.seed, "subagent", turns, number))
        for number, call in enumerate(turn.calls)
    ]


def _metrics(
    rollouts: Sequence[Trajectory], scheduler: Scheduler, workers: Workers
) -> dict[str, float]:
    """Turns of an episode, and what its tools cost."""
    return {
        "episode/turns": sum(len(t.turns) for t in rollouts) / max(len(rollouts), 1),
        "episode/visits": float(scheduler.steps),
        "tool/jobs": float(workers.jobs),
        "tool/jobs_shared": float(workers.submitted - workers.jobs),
        "tool/reports_shared": float(scheduler.shared),
        "time/tool_wait": scheduler.wait_seconds,
    }
