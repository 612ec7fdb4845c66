"""Samples of one kind as the rules of a protocol ask them, run by our own engine and scored."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from evaluate.benchmarks.protocol import Rules
from evaluate.benchmarks.sample import Sample, SampleResult
from evaluate.benchmarks.scoring import JudgeFailed, score
from evaluate.model import Opened
from evaluate.prompts import Prefetch, ReadyPrompt, SamplePrompts, Size, sizes
from evaluate.seeing import Seeing
from paravt_jax.protocol import TURN_END
from paravt_jax.records import Trajectory, Turn
from paravt_jax.rewards.judge import Judge
from paravt_jax.shapes import bucket
from pipelines.preprocess import SPECS
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from rollout.agent import Agent, Item
from rollout.engine.engine import Engine
from rollout.engine.sampler import SamplingConfig
from rollout.engine.slots import Generated
from rollout.limits import AgentConfig, slot_pools
from train.agent import AgentMaker

THREADS = min(4, os.cpu_count() or 1)
"""That decode frames."""
JUDGED = 16
"""Answers that a judge is asked about side by side."""
UNIT = 128
"""Prompts get room in multiples of so many tokens."""
MODES = {"images": "image", "video": "video"}
"""Forms of a protocol, and what renderers call them."""


class OneTurn(Agent):
    """Whatever it says is its answer: nobody replies to calls that it was not offered."""

    def read_turn(self, generated: Generated) -> Turn:
        """The turn without calls."""
        return dataclasses.replace(super().read_turn(generated), calls=())


class JudgePool:
    """Scores in threads, as a judge is somebody else's service and the device shall not wait."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads)
        self._coming: collections.deque[Future[SampleResult]] = collections.deque()

    def begin(self, score: Callable[[], SampleResult]) -> None:
        """Score an answer."""
        self._coming.append(self._pool.submit(score))

    def done(self, wait: bool) -> Iterator[SampleResult]:
        """What has been scored, in order; with `wait` all that has begun."""
        while self._coming and (wait or self._coming[0].done()):
            yield self._coming.popleft().result()

    def close(self) -> None:
        """Score no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclasses.dataclass
class Waits:
    """Where the seconds went."""

    total: float = 0.0
    idle: float = 0.0
    """In which nothing could be decoded on the device, as no prompt or crop was ready."""


@dataclasses.dataclass(frozen=True)
class Questions:
    """All questions of one kind of one task, and the rules by which they are put."""

    rules: Rules
    samples: tuple[Sample, ...]
    """Of all shards, so that caches are as large in each."""


class SampleRunner:
    """Runs the questions of one kind through the engine, and scores the answers."""

    def __init__(
        self,
        model: Opened,
        questions: Questions,
        batch: int,
        judge: Judge | None = None,
        guarded: int = 0,
    ):
        """
        Args:
          batch: prompts under way at a time.
          guarded: of so many questions, the first, it is measured whether the model sees.

        Raises:
          ValueError: the rules ask for what the engine does not do.
        """
        rules = questions.rules
        self._guarded = {sample.sample_id for sample in questions.samples[:guarded]}
        self._model, self._rules, self._batch, self._judge = model, rules, batch, judge
        self._samples = questions.samples
        self.agent_rules = agent_rules(rules, model.config.agent, batch)
        self.prompts = self._prompt_maker()
        self._agents = self._agent_maker()
        self._engines: dict[Size, Engine] = {}
        self.waits = Waits()

    def _prompt_maker(self) -> SamplePrompts:
        video, agent_renderer = self._rules.video, self._model.agents.renderer
        renderer = _renderer(self._model, video.form, (video.min_pixels, video.max_pixels))
        reader = VideoReader(spec=renderer.spec)
        words = agent_renderer.system_text(self.agent_rules.offers_tools)
        return SamplePrompts(self._rules, renderer, reader, words)

    def _agent_maker(self) -> AgentMaker:
        """Crops have frame sizes and rates of their own."""
        agent, old = self._rules.agent, self._model.agents
        sizes = agent.crop_min_pixels, agent.crop_max_pixels
        renderer = _renderer(self._model, self._rules.video.form, sizes, agent.response)
        rate = {"crop_fps": agent.crop_fps, "crop_frames": agent.crop_frames}
        reader = VideoReader(agent.crop_fps, agent.crop_frames, spec=renderer.spec)
        data = dataclasses.replace(old.data, **rate, overview_tokens=None)
        return AgentMaker(self.agent_rules, data, old.policy, renderer, reader)

    def __call__(self, chosen: Sequence[Sample]) -> Iterator[SampleResult]:
        """Results of these samples, in the order in which they end."""
        began = time.perf_counter()
        measured = dict(
            (sample.sample_id, size) for sample, size in sizes(self.prompts, self._samples, THREADS)
        )
        most = self._most_tokens()
        known = [size for size in measured.values() if isinstance(size, Size)]
        largest = [size for size in known if size.tokens <= most]
        fitting: list[Sample] = []
        for sample in chosen:
            size = measured[sample.sample_id]
            if isinstance(size, Size) and size.tokens <= most:
                fitting.append(sample)
                continue
            reason = size if isinstance(size, str) else _overflow(size.tokens, most)
            yield SampleResult.failed(sample, reason)
        if fitting:
            room = min(bucket(max(size.tokens for size in largest), UNIT), most)
            yield from self._run(fitting, Size(room, max(size.patches for size in largest)))
        self.waits.total += time.perf_counter() - began

    def _most_tokens(self) -> int:
        """Of a prompt, beside all that may follow it."""
        agents = self._agents
        pools = slot_pools(
            agents.rules,
            agents.renderer,
            prompts=1,
            copies=1,
            prompt_tokens=1,
            crop_tokens=agents.crop.tokens,
        )
        return agents.policy.context_length - pools["main"].suffix

    def _run(self, samples: Sequence[Sample], room: Size) -> Iterator[SampleResult]:
        """Run samples whose prompts are no larger than `room`."""
        agents, rules = self._agents, self.agent_rules
        kind = Agent if rules.offers_tools else OneTurn
        agent = agents.agent(self._engine(room), kind=kind)
        seeing = Seeing(self._model, agents.renderer, room.patches)
        ahead = Prefetch(self.prompts, samples, THREADS, ahead=self._batch + THREADS)
        waits = self.waits

        def feed(wait: bool) -> Item | None:
            began = time.perf_counter()
            item = ahead(wait)
            waits.idle += time.perf_counter() - began if wait else 0.0
            return item

        seed, judges = self._rules.decoding.seed, JudgePool(JUDGED)
        try:
            for row, trajectory, seconds in agent.stream(
                self._model.params, feed, self._batch, seed
            ):
                yield from _taken(ahead)
                ready = ahead.ready.pop(row.row_id)
                guarded = ready.sample.sample_id in self._guarded
                sight = seeing(trajectory) if guarded else {}
                judges.begin(functools.partial(self._scored, ready, trajectory, seconds, sight))
                yield from judges.done(wait=self._judge is None)
            yield from judges.done(wait=True)
            yield from _taken(ahead)
        finally:
            ahead.close()
            judges.close()
        waits.idle += agent.metrics["time/tool_wait"]

    def _engine(self, room: Size) -> Engine:
        """An engine with slots for prompts of this size, whose programs are compiled once."""
        if room in self._engines:
            return self._engines[room]
        agents = self._agents
        pools = slot_pools(
            agents.rules,
            agents.renderer,
            prompts=self._batch,
            copies=1,
            prompt_tokens=room.tokens,
            crop_tokens=agents.crop.tokens,
        )
        engine = self._engines[room] = agents.engine(pools)
        # All frames have one size in the tower: the largest that there is, not that there could be.
        crops = engine.frame_patches if agents.rules.offers_tools else 0
        engine.frame_patches = max(crops, room.patches)
        return engine

    def _scored(
        self, ready: ReadyPrompt, trajectory: Trajectory, seconds: float, sight: Mapping[str, float]
    ) -> SampleResult:
        """The line of a sample that was answered."""
        turns, sample = trajectory.turns, ready.sample
        response = turns[-1].text.removesuffix(TURN_END)
        came = {
            "response": response,
            "prompt": ready.words,
            "frames": ready.frames,
            "pixels": ready.pixels,
            "turns": len(turns),
            "calls": trajectory.calls,
            "failed_calls": trajectory.calls - trajectory.executed,
            "prompt_tokens": len(trajectory.prompt.tokens),
            "generated_tokens": int(trajectory.generated.sum()),
            "seconds": round(seconds, 3),
            **sight,
        }
        try:
            verdict = score(self._rules, sample, response, self._judge)
        except JudgeFailed as error:
            return SampleResult.failed(sample, str(error), **came)
        return SampleResult.of(sample, **came, **dataclasses.asdict(verdict))


def agent_rules(rules: Rules, defaults: AgentConfig, batch: int) -> AgentConfig:
    """How the agent works under the rules of a protocol; what they leave open is as in training.

    Raises:
      ValueError: the rules ask for what the sampler does not do.
    """
    drawn, agent = rules.decoding, rules.agent
    if drawn.presence_penalty:
        raise ValueError(
            f"decoding.presence_penalty={drawn.presence_penalty:g} of the protocol {rules.protocol}"
            " is not drawn here; set it to 0 in a copy of the protocol, under a name of your own"
        )
    sampling = SamplingConfig(drawn.temperature, top_p=drawn.top_p, top_k=drawn.top_k)
    answer = agent.answer_tokens if agent.rounds else drawn.max_new_tokens
    return dataclasses.replace(
        defaults,
        max_tool_rounds=agent.rounds,
        dispatch=agent.dispatch,
        max_calls_per_turn=agent.calls_per_turn,
        evidence=agent.evidence,
        think_prefix=agent.think_prefix,
        turn_tokens=drawn.max_new_tokens,
        answer_tokens=answer,
        demand=agent.demand,
        episode_tokens=0,
        sampling=sampling,
        subagent_sampling=sampling,
        subagent_batch=min(defaults.subagent_batch, batch * agent.calls_per_turn),
    )


def _renderer(
    model: Opened, form: str, pixels: tuple[int, int], clip: str | None = None
) -> ChatRenderer:
    """The model's renderer in other frame sizes; `clip` are the words with frames of a crop."""
    renderer, folder = model.agents.renderer, model.config.model.folder or ""
    spec = SPECS[MODES[form]].from_folder(folder).limited(*pixels)
    texts = renderer.texts if clip is None else dataclasses.replace(renderer.texts, clip=clip)
    return type(renderer)(renderer.tokenizer, spec, texts, renderer.eos_ids, renderer.tools)


def _overflow(tokens: int, most: int) -> str:
    if most > 0:
        return f"context overflow: a prompt of {tokens} tokens, and there is room for {most}"
    return (
        f"context overflow: what may follow a prompt takes {-most} tokens more than the model has "
        "positions; in a copy of the protocol lower decoding.max_new_tokens, agent.rounds, "
        "agent.calls_per_turn or the frames and pixels of crops"
    )


def _taken(ahead: Prefetch) -> Iterator[SampleResult]:
    while ahead.failed:
        yield ahead.failed.pop(0)
