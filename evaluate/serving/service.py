"""A model that is served: requests to programs, on one engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from evaluate.model import Opened
from evaluate.serving.calls import CallGrammars
from evaluate.serving.completions import Ask, Chat, Emit, Question, writings
from evaluate.serving.errors import ApiError
from evaluate.serving.limits import LONGEST_PROMPT, Limits
from evaluate.serving.prompts import RequestPrompts, called_head, tools_of
from evaluate.serving.schemas import ChatRequest
from evaluate.serving.worker import Worker
from evaluate.serving.writing import Vocabulary, Wanted
from evaluate.watch import Watcher
from paravt_jax.records import Row, VideoRef
from pipelines.conversation import special_tokens
from pipelines.loader import overviews
from pipelines.render import ChatRenderer
from rollout.engine.automaton import TokenGrammar
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.precompile import InputSizes, SizeRange, precompile
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.limits import MAIN, AgentConfig, slot_pools
from rollout.record import derive_seed
from rollout.workers import Workers
from train.compile.input_sizes import agent_input_sizes

LISTED = 20
"""Likeliest tokens of a draw that can be asked for, as in OpenAI's API."""
STEPS = 8
"""Tokens of each row between two looks at what came: a stream is told as often."""
KEPT_JOBS = 256
"""Crops that are remembered for others that ask for the same."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that can be run, and what it keeps open until it has ended."""

    request: Chat | Ask
    listed: bool
    """Whether the likeliest tokens are wanted."""
    grammar: TokenGrammar | None
    """What the answer must obey."""
    prompt_tokens: int
    prompt_ids: list[int]
    close: Callable[[], None]


class Service:
    """A model, its engine, and how requests are put to it."""

    def __init__(self, model: Opened, limits: Limits, name: str | None = None) -> None:
        """
        Raises:
          ValueError: the limits do not fit the model.
        """
        self._pools = _pools(model, limits)
        limits = dataclasses.replace(limits, prompt_tokens=self._pools[MAIN].prompt_tokens)
        self._model, self.limits = model, limits
        self.name = name or Path(model.config.model.folder or "model").resolve().name
        self.created = int(time.time())
        agents = model.agents
        frames = min(max(model.config.data.frame_budgets), limits.frames)
        self.frames = frames
        """Shown of a video unless a request says how many."""
        self.prompts = RequestPrompts(agents.renderer, agents.reader, frames, limits)
        self.engine: Engine = agents.engine(
            self._pools,
            grammar_room=limits.grammar_states,
            alternatives=LISTED,
            steps_per_call=STEPS,
        )
        self._calls = CallGrammars(self.engine.automata)
        self.worker = Worker(lambda wrote: Session(self.engine, model.params, wrote))
        self._workers = Workers(agents.rules.decode_threads, KEPT_JOBS)
        tokenizer = agents.renderer.tokenizer
        contents = agents.renderer.token_contents(agents.policy.vocab_size)
        self.vocabulary = Vocabulary(contents, frozenset(special_tokens(tokenizer)))

    @property
    def room(self) -> int:
        """Most tokens after a prompt."""
        return self._pools[MAIN].suffix

    def warm_up(self) -> int:
        """Compile all that requests can need before the first one comes; how many functions."""
        agents, limits = self._model.agents, self.limits
        anything = Row("", VideoRef("", 1.0), "?", answer="")
        inputs = agent_input_sizes(agents.rules, agents.data, agents.renderer, [anything])
        shown = range(limits.frames + 1)
        prompts = tuple(SizeRange(n, max(n, 1), limits.prompt_tokens) for n in shown)
        appended = (*inputs[MAIN].appended, SizeRange(0, 1, _longest_head(agents.renderer)))
        inputs[MAIN] = InputSizes(prompts, appended, inputs[MAIN].sampling)
        values = agents.renderer.spec.patch_values
        return precompile(self.engine, self._model.params, inputs, values)

    def close(self) -> None:
        """End the engine's thread and those of tools."""
        self.worker.close()
        with self._workers:
            pass

    def prepare(self, request: ChatRequest, emit: Emit) -> Prepared:
        """Open media and write the prompt; takes as long as decoding does.

        Raises:
          ApiError: the request cannot be run.
        """
        if request.model not in (None, self.name):
            raise ApiError(
                f"there is no model {request.model!r} here; this is {self.name!r}",
                "model",
                status=404,
                code="model_not_found",
            )
        return self._ask(request, emit) if request.agent else self._chat(request, emit)

    def _chat(self, request: ChatRequest, emit: Emit) -> Prepared:
        count = request.n or 1
        if count > self.limits.rows:
            raise ApiError(f"n: at most {self.limits.rows} here (--rows)", "n")
        limit, grammar = self._limit(request), self._calls(request)
        prompt = self.prompts(request)
        wanted = Wanted(
            tuple(request.stop or ()),
            tools_of(request) is not None,
            prompt.said,
            bool(request.logprobs),
            request.top_logprobs or 0,
        )
        # The head stands in the same part of the cache as what is generated.
        limit = min(limit, self.room - len(prompt.head))
        base = secrets.randbits(32) if request.seed is None else request.seed
        seeds = [derive_seed(base, "choice", number) for number in range(count)]
        watched = bool(request.stream or wanted.stops)
        grown = writings(self.vocabulary, wanted, count)
        chat = Chat(prompt, _sampling(request), limit, seeds, grown, watched, emit)
        ids = [*prompt.prompt.tokens.tolist(), *prompt.head]
        return Prepared(chat, bool(request.top_logprobs), grammar, len(ids), ids, lambda: None)

    def _limit(self, request: ChatRequest) -> int:
        """Most tokens of a completion."""
        name = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        tokens = request.max_completion_tokens or request.max_tokens
        if tokens is not None and tokens > self.limits.max_tokens:
            raise ApiError(f"{name}: at most {self.limits.max_tokens} here (--max-tokens)", name)
        return tokens or self.limits.max_tokens

    def _ask(self, request: ChatRequest, emit: Emit) -> Prepared:
        """A question about one video, for the agent."""
        text, url, where = _one_question(request)
        with contextlib.ExitStack() as stack:
            video = stack.enter_context(self.prompts.fetcher.video(url, where))
            count = self.prompts.frames(request, video)
            row = Row(text, video.ref, text, answer="")
            agents = self._model.agents
            try:
                frames = overviews(agents.reader, row, count)
                prompt = agents.renderer.main_prompt(row, frames, agents.rules.offers_tools)
            except ValueError as error:
                raise ApiError(f"messages[0]: {error}"[:300], "messages[0]") from error
            if len(prompt.tokens) > self.limits.prompt_tokens:
                raise ApiError(
                    f"messages: the prompt has {len(prompt.tokens)} tokens, more than "
                    f"{self.limits.prompt_tokens} (--max-prompt-tokens)",
                    "messages",
                    code="context_length_exceeded",
                )
            seed = secrets.randbits(32) if request.seed is None else request.seed
            rules = self._rules(request)
            ask = Ask(
                Question(row, count, prompt, seed),
                lambda watcher: agents.agent(self.engine, rules, watcher),
                functools.partial(Watcher, agents.renderer),
                self._workers,
                emit,
            )
            files = stack.pop_all()
        return Prepared(ask, False, None, len(prompt.tokens), [], files.close)

    def _rules(self, request: ChatRequest) -> AgentConfig:
        """The agent's, with what the request says of draws and lengths."""
        rules, drawn = self._model.agents.rules, _sampling(request)
        names = ("temperature", "top_p", "top_k", "min_p")
        drawn = {name: getattr(drawn, name) for name in names}
        limit = request.max_completion_tokens or request.max_tokens
        if limit is not None and limit > max(rules.turn_tokens, rules.answer_tokens):
            most = max(rules.turn_tokens, rules.answer_tokens)
            raise ApiError(f"max_tokens: turns of the agent have at most {most}", "max_tokens")
        limit = limit or max(rules.turn_tokens, rules.answer_tokens)
        return dataclasses.replace(
            rules,
            sampling=dataclasses.replace(rules.sampling, **drawn),
            subagent_sampling=dataclasses.replace(rules.subagent_sampling, **drawn),
            turn_tokens=min(limit, rules.turn_tokens),
            answer_tokens=min(limit, rules.answer_tokens),
        )


def _sampling(request: ChatRequest) -> SamplingConfig:
    """How a request draws; where it says nothing, as OpenAI's API does."""
    return SamplingConfig(
        temperature=1.0 if request.temperature is None else float(request.temperature),
        top_p=1.0 if request.top_p is None else float(request.top_p),
        top_k=max(request.top_k or 0, 0),
        min_p=float(request.min_p or 0.0),
    )


def _one_question(request: ChatRequest) -> tuple[str, str, str]:
    """The question and the video of a request to the agent, and the field that names this."""
    (message, *more), where = request.messages, "messages[0].content"
    parts = list(enumerate(message.content or ()))
    videos = [(at, part.video_url.url) for at, part in parts if part.video_url]
    words = [part.text for _, part in parts if part.text]
    if more or message.role != "user" or len(videos) != 1 or not words:
        raise ApiError(
            "agent: true answers one message of the user with one video_url and a question; it "
            "has its own system text",
            "messages",
        )
    if len(videos) + len(words) != len(parts):
        raise ApiError(f"{where}: the agent looks at one video and no image", where)
    ((at, url),) = videos
    return "\n".join(words), url, f"{where}[{at}].video_url.url"


def _longest_head(renderer: ChatRenderer) -> int:
    """Tokens that an answer may begin with, at most."""
    return len(renderer.encode(called_head(renderer)))


def _pools(model: Opened, limits: Limits) -> dict[str, SlotPool]:
    """Slots for so many rows, and for the crops of agents among them."""
    agents = model.agents
    rules, renderer = agents.rules, agents.renderer
    # Each has a cache: no more of them than all rows can ask for at once.
    crops = min(rules.subagent_batch, limits.rows * rules.calls_run)
    pools = slot_pools(
        dataclasses.replace(rules, subagent_batch=crops),
        renderer,
        prompts=limits.rows,
        copies=1,
        prompt_tokens=1,
        crop_tokens=agents.crop.tokens,
    )
    suffix = max(pools[MAIN].suffix, limits.max_tokens + _longest_head(renderer))
    positions = agents.policy.context_length - suffix
    prompt_tokens = limits.prompt_tokens or min(positions, LONGEST_PROMPT)
    if not 0 < prompt_tokens <= positions:
        raise ValueError(
            f"--max-prompt-tokens {limits.prompt_tokens} --max-tokens {limits.max_tokens}: up to "
            f"{suffix} tokens follow a prompt, which leaves {positions} of the model's "
            f"max_position_embeddings={agents.policy.context_length}; lower one of them"
        )
    main = dataclasses.replace(pools[MAIN], prompt_tokens=prompt_tokens, suffix=suffix)
    return {**pools, MAIN: main}
