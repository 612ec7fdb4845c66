"""Episodes: think, call tools side by side, answer from what came back.

All rollouts of a batch move in rounds. In a round every open rollout speaks one turn;
the calls of all of them are looked at by sub-agents in the same engine, as one batch;
the responses are appended to the live streams. A rollout closes when it ends a turn
without calls, runs out of tokens in a turn, or has given its forced answer.

Streams grow by concatenation only: no token is ever rendered or tokenised twice.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from paravt_jax.interfaces import FrameReader, Params, Renderer
from paravt_jax.protocol import Window, parse_tool_calls
from paravt_jax.records import (
    Prompt,
    RolloutGroup,
    Row,
    StopReason,
    ToolCall,
    Trajectory,
    Turn,
    VideoRef,
)
from rollout.engine import Engine, Generated
from rollout.sampler import SamplingConfig
from rollout.tools import TOOLS, Tool, plan

_LOG = logging.getLogger(__name__)

_MARKUP = re.compile(r"<\|[^<>|]*\|>|</?(?:tool_call|tool_code|tool_response|think|answer)>")
"""Special tokens and structural tags: a tool response must not contain any."""


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Rules and limits of an episode."""

    max_tool_rounds: int = 1
    """Rounds of tool calls; the turn after the last one is the forced answer. 0 forbids tools."""
    max_calls_per_turn: int = 5
    """Calls of one turn that are run; each one beyond gets an error response."""
    think_prefix: str = "<think>\n"
    """Text that we put at the head of every turn; part of the scored text. May be empty."""
    turn_tokens: int = 192
    """Longest turn that may call tools, in generated tokens."""
    answer_tokens: int = 96
    """Longest forced answer, in generated tokens."""
    response_tokens: int = 64
    """Room for tool responses, per allowed call; the responses of a turn share it."""
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How the main agent draws tokens."""
    subagent_tokens: int = 64
    """Longest report of a sub-agent, in generated tokens."""
    subagent_sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    """How sub-agents draw tokens."""
    subagent_batch: int = 128
    """Crops that are looked at together; fewer are padded to it, a half, quarter or eighth."""
    decode_threads: int = 4
    """Threads that decode crops."""

    def __post_init__(self) -> None:
        """Refuse impossible limits, naming field, value and remedy."""
        if self.max_tool_rounds < 0:
            raise ValueError(f"max_tool_rounds={self.max_tool_rounds}: must be >= 0 (0 = no tools)")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and field.name != "max_tool_rounds" and value < 1:
                raise ValueError(f"{field.name}={value}: must be at least 1")

    @property
    def rounds(self) -> int:
        """How often responses can be appended. Forbidden calls are answered too, once."""
        return max(self.max_tool_rounds, 1)


Item = tuple[Row, int, Prompt]
"""A question, the number of frames that its prompt shows, and the prompt."""


def derive_seed(*parts: object) -> int:
    """A uint32 that depends on all parts and on nothing else (no salted `hash`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


class _Rollout:
    """One episode as it grows."""

    def __init__(self, row: Row, prompt: Prompt, seed: int) -> None:
        self.row, self.prompt, self.seed = row, prompt, seed
        self.open = True
        self.turns: list[Turn] = []
        self.subagents: list[Trajectory] = []
        self.stream: list[tuple[np.ndarray, bool, np.ndarray]] = []

    def give(self, tokens: Sequence[int]) -> None:
        """Append tokens that the policy did not generate."""
        given = np.asarray(tokens, np.int32)
        self.stream.append((given, False, np.zeros(len(given), np.float32)))

    def speak(self, turn: Turn) -> None:
        """Append a generated turn (its prefix was given before)."""
        self.turns.append(turn)
        self.stream.append((turn.tokens, True, turn.log_probs))

    def finish(self, renderer: Renderer, policy_version: int) -> Trajectory:
        """The record of the whole episode."""
        tokens = np.concatenate([part for part, _, _ in self.stream])
        return Trajectory(
            prompt=self.prompt,
            tokens=tokens,
            generated=np.concatenate([np.full(len(part), own) for part, own, _ in self.stream]),
            log_probs=np.concatenate([log_probs for _, _, log_probs in self.stream]),
            turns=tuple(self.turns),
            scored_text="".join(turn.text for turn in self.turns),
            full_text=renderer.decode(tokens.tolist()),
            subagents=tuple(self.subagents),
            policy_version=policy_version,
        )


@dataclasses.dataclass
class _Request:
    """One tool call on its way from words to a response."""

    rollout: _Rollout
    call: ToolCall
    number: int
    """Place of the call in its turn, from 0."""
    prompt: Prompt | None = None
    """What the sub-agent reads; None if the call cannot be run."""
    response: str = ""
    executed: bool = False

    @property
    def seed(self) -> int:
        """Every call is its own sample, also where two look at the same window."""
        return derive_seed(self.rollout.seed, "subagent", len(self.rollout.turns), self.number)


class Agent:
    """Runs episodes of a policy."""

    def __init__(
        self,
        engine: Engine,
        renderer: Renderer,
        reader: FrameReader,
        tools: Mapping[str, Tool] = TOOLS,
        config: AgentConfig = AgentConfig(),
    ) -> None:
        """`tools` maps the names that the prompt advertises to what they do."""
        self.engine, self.renderer, self.reader = engine, renderer, reader
        self.tools, self.config = tools, config
        self.prefix = renderer.encode(config.think_prefix)
        self.response_room = self._measure_responses()
        """Tokens from the end of a turn to the head of the next, at most."""
        self.suffix = self._measure_suffix()
        """Tokens after the prompt, at most: decides the size of the cache."""

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
        rollouts = _open_rollouts(items, copies, seed)
        prompts = [prompt for _, _, prompt in items]
        session = self.engine.start(params, prompts, copies, self.suffix)
        seeds = [rollout.seed for rollout in rollouts]
        given_B = [self._give(rollout, []) for rollout in rollouts]
        for number in range(self.config.rounds + 1):
            session.append(given_B)
            final = number == self.config.rounds
            limit = self.config.answer_tokens if final else self.config.turn_tokens
            active = [rollout.open for rollout in rollouts]
            spoken = session.generate(active, self.config.sampling, limit, seeds)
            for rollout, generated in zip(rollouts, spoken, strict=True):
                if generated is not None:
                    self._speak(rollout, generated, final)
            if not any(rollout.open for rollout in rollouts):
                break
            given_B = self._respond(params, rollouts, policy_version)
        done = [rollout.finish(self.renderer, policy_version) for rollout in rollouts]
        return [
            RolloutGroup(row, budget, tuple(done[at * copies : (at + 1) * copies]))
            for at, (row, budget, _) in enumerate(items)
        ]

    def _give(self, rollout: _Rollout, tokens: Sequence[int]) -> list[int]:
        """Put tokens and the forced prefix on a stream; return what the cache must get."""
        given = [*tokens, *self.prefix]
        rollout.give(given)
        return given

    def _speak(self, rollout: _Rollout, generated: Generated, final: bool) -> None:
        """Record a turn; the rollout stays open if the turn waits for responses."""
        ended = generated.stop_reason is StopReason.END
        text = self.renderer.decode([*self.prefix, *generated.tokens.tolist()])
        # A turn that was cut off has no end-of-turn token for responses to follow.
        calls = parse_tool_calls(text) if ended else ()
        turn = Turn(
            prefix=np.asarray(self.prefix, np.int32),
            tokens=generated.tokens,
            log_probs=generated.log_probs,
            stop_reason=generated.stop_reason,
            text=text,
            calls=calls,
        )
        rollout.speak(turn)
        rollout.open = bool(calls) and not final

    def _respond(
        self, params: Params, rollouts: Sequence[_Rollout], policy_version: int
    ) -> list[list[int]]:
        """Answer the calls of all open rollouts; return the tokens to append to each row."""
        requests_B = [_requests(rollout) for rollout in rollouts]
        requests = [request for own in requests_B for request in own]
        self._look(requests)
        self._ask(params, [request for request in requests if request.prompt], policy_version)
        given_B: list[list[int]] = []
        for rollout, own in zip(rollouts, requests_B, strict=True):
            if rollout.open:
                executed = sum(request.executed for request in own)
                rollout.turns[-1] = dataclasses.replace(rollout.turns[-1], executed=executed)
                tokens = self._tool_turn([request.response for request in own])
                given_B.append(self._give(rollout, tokens))
            else:
                given_B.append([])
        return given_B

    def _look(self, requests: Sequence[_Request]) -> None:
        """Give each request its sub-agent prompt, or the error that answers it."""
        by_crop: dict[tuple[VideoRef, Window], list[_Request]] = {}
        for request in requests:
            window = self._window(request)
            if isinstance(window, str):
                request.response = _error(window)
            else:
                by_crop.setdefault((request.rollout.row.video, window), []).append(request)
        # Rollouts of a group often ask for the same crop: it is rendered once, sampled each time.
        with ThreadPoolExecutor(self.config.decode_threads) as pool:
            prompts = pool.map(lambda crop: self._render(*crop), by_crop)
            for asked, prompt in zip(by_crop.values(), prompts, strict=True):
                for request in asked:
                    request.prompt = prompt
                    if prompt is None:
                        request.response = _error("this window of the video could not be read")

    def _render(self, video: VideoRef, window: Window) -> Prompt | None:
        """What a sub-agent reads about a crop; None if the crop cannot be decoded."""
        try:
            frames = self.reader.clip(video, *window)
        except Exception as error:  # whatever a decoder raises on a broken file: an answer
            _LOG.warning("crop %s of %s failed: %s", window, video.path, error)
            return None
        return self.renderer.subagent_prompt(frames, *window)

    def _window(self, request: _Request) -> Window | str:
        if not self.config.max_tool_rounds:
            return "tools are not available"
        if request.number >= self.config.max_calls_per_turn:
            return f"at most {self.config.max_calls_per_turn} calls per turn"
        return plan(self.tools, request.call, request.rollout.row.video.duration)

    def _ask(self, params: Params, requests: Sequence[_Request], policy_version: int) -> None:
        """Let sub-agents report on all crops, in batches of static size."""
        limit = self.config.subagent_batch
        for at in range(0, len(requests), limit):
            chunk = requests[at : at + limit]
            batch = next(limit // d for d in (8, 4, 2, 1) if len(chunk) <= limit // d)
            self._ask_batch(params, chunk, batch, policy_version)

    def _ask_batch(
        self, params: Params, requests: Sequence[_Request], batch: int, policy_version: int
    ) -> None:
        prompts = [request.prompt for request in requests if request.prompt is not None]
        limit, sampling = self.config.subagent_tokens, self.config.subagent_sampling
        session = self.engine.start(params, prompts, 1, limit, batch)
        seeds = [request.seed for request in requests]
        spoken = session.generate([True] * len(requests), sampling, limit, seeds)
        for request, generated in zip(requests, spoken, strict=True):
            assert generated is not None
            self._report(request, generated, policy_version)

    def _report(self, request: _Request, generated: Generated, policy_version: int) -> None:
        """Record what a sub-agent said and make it the response of its call."""
        assert request.prompt is not None
        reporter = _Rollout(request.rollout.row, request.prompt, request.seed)
        reporter.speak(
            Turn(
                prefix=np.zeros(0, np.int32),
                tokens=generated.tokens,
                log_probs=generated.log_probs,
                stop_reason=generated.stop_reason,
                text=self.renderer.decode(generated.tokens.tolist()),
            )
        )
        trajectory = reporter.finish(self.renderer, policy_version)
        request.rollout.subagents.append(trajectory)
        request.response = strip_markup(trajectory.full_text)
        request.executed = bool(request.response)
        if not request.executed:
            request.response = _error("the sub-agent reported nothing")

    def _tool_turn(self, responses: Sequence[str]) -> list[int]:
        """Tokens of the responses, shortened until they fit their room.

        First all surplus calls share one response, then the longest responses are cut.
        """
        texts = [strip_markup(response) for response in responses]
        limit = self.response_room
        while len(tokens := self.renderer.tool_turn(texts)) > self.response_room:
            if len(texts) > self.config.max_calls_per_turn + 1:
                texts = [*texts[: self.config.max_calls_per_turn], texts[-1]]
            else:
                assert limit > 0, "responses of no tokens always fit"
                limit = limit * 3 // 4
                texts = [self._cut(text, limit) for text in texts]
        return tokens

    def _cut(self, text: str, limit: int) -> str:
        tokens = self.renderer.encode(text)
        if len(tokens) <= limit:
            return text
        # A cut may fall inside a character of several bytes.
        return self.renderer.decode(tokens[:limit]).rstrip("\ufffd")

    def _measure_responses(self) -> int:
        """Room for the responses of one turn: one for each allowed call, one for the surplus."""
        count = self.config.max_calls_per_turn
        markup = self.renderer.tool_turn(["x"] * (count + 1))
        return len(markup) + count * self.config.response_tokens

    def _measure_suffix(self) -> int:
        config = self.config
        turn = len(self.prefix) + config.turn_tokens
        return config.rounds * (turn + self.response_room) + len(self.prefix) + config.answer_tokens


def strip_markup(text: str) -> str:
    """Text without special tokens and structural tags, which would break out of a response."""
    while (stripped := _MARKUP.sub("", text)) != text:  # removal may join a new tag
        text = stripped
    return text.strip()


def _error(reason: str) -> str:
    return f"Error: {reason}"


def _requests(rollout: _Rollout) -> list[_Request]:
    """The calls that wait for a response."""
    calls = rollout.turns[-1].calls if rollout.open else ()
    return [_Request(rollout, call, number) for number, call in enumerate(calls)]


def _open_rollouts(items: Sequence[Item], copies: int, seed: int) -> list[_Rollout]:
    """Rollouts in prompt-major order. A row that comes twice in a batch is drawn twice."""
    seen: collections.Counter[str] = collections.Counter()
    rollouts = []
    for row, _, prompt in items:
        for copy in range(copies):
            own = derive_seed(seed, row.row_id, seen[row.row_id], copy)
            rollouts.append(_Rollout(row, prompt, own))
        seen[row.row_id] += 1
    return rollouts
