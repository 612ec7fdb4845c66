"""Random episodes through the real agent and the real engine, and what both must agree on.

Small models rarely call tools, so what a turn calls is drawn from its text: the same text always
calls the same, and nothing else in the path knows about it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from paravt_jax.interfaces import FrameReader
from paravt_jax.protocol import TOOL_NAME
from paravt_jax.records import (
    Clip,
    Frames,
    LearnerBatch,
    Patches,
    Prompt,
    RolloutGroup,
    Row,
    ToolCall,
    VideoRef,
)
from paravt_jax.routing import RoutingShape
from paravt_jax.shared_rows import Bounds
from rollout.agent import Agent, Item
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine
from rollout.engine.precompile import InputSizes, SizeRange
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.limits import AgentConfig, slot_pools
from tests.support.rollout_fakes import (
    IM_END,
    MERGE,
    PAD,
    VOCAB,
    ToyPolicy,
    ToyRenderer,
    image_prompt,
    text_prompt,
)
from tests.support.shared_rows import visible_in
from train.batch import LearnerStream, learner_batch, shared_batch, streams_of_groups
from train.step import batch_log_probs

ENDS = (IM_END, PAD, *range(48, 58))
"""Digits end a turn too, so that most turns of a random model end before their limit."""
BROKEN_FROM = 48.0
"""Seconds from which the videos cannot be decoded."""
PROMPT_TOKENS = 96
CROP_TOKENS = {"text": 64, "frames": 8}
"""Room for a sub-agent's prompt, or for frames in a response."""
FRAME_PATCHES = 8
FRAMES = 24
"""At least what any stream shows: 4 in the prompt, 4 in each crop, 2 crops in each of 2 rounds."""
CONFIG = AgentConfig(
    max_tool_rounds=2,
    max_calls_per_turn=2,
    turn_tokens=20,
    answer_tokens=9,
    response_tokens=12,
    subagent_tokens=10,
    subagent_thought_tokens=5,
    think_prefix="<t>\n",
    sampling=SamplingConfig(temperature=0.8),
    subagent_sampling=SamplingConfig(temperature=1.2),
)


def _crop(start: float, end: float) -> ToolCall:
    return ToolCall(TOOL_NAME, {"start_time": start, "end_time": end})


MENU = [
    *(_crop(0, 8), _crop(4, 30), _crop(16, 64)),  # 3, 3 and 4 frames
    _crop(9, 3),
    _crop(50, 60),
    ToolCall("zoom", {}),
    ToolCall("", {}, error="this is no JSON"),
]


def calls_of(text: str, syntax: str = "tool_call") -> tuple[ToolCall, ...]:
    """What a turn calls, in place of `parse_tool_calls`: nothing in one of six turns."""
    dice = random.Random(text)
    return tuple(
        dice.choices(MENU, weights=[4, 4, 4, 1, 1, 1, 1], k=dice.choice([0, 1, 1, 2, 2, 4]))
    )


class Learnable(ToyPolicy):
    """The toy policy as the trainer sees it."""

    experts_per_token = 0

    def hidden_and_router(
        self,
        params,
        tokens,
        positions,
        vision_index,
        features=None,
        segments=None,
        hidden_keys=None,
        shared=None,
        routing=None,
    ):
        seen = None if shared is None else visible_in(shared, tokens.shape[1])
        return self.prefill(params, tokens, positions, vision_index, features, seen)[0], None

    def head(self, params):
        return functools.partial(self.logits, params)


class TerseRenderer(ToyRenderer):
    """Little markup around responses, and frames for sub-agents too."""

    def __init__(self, values: int) -> None:
        self.values = values

    def subagent_prompt(self, frames: Frames, start: float, end: float) -> Prompt:
        seed = int(start * 100 + end)
        return image_prompt(f"{start:g} {end:g}", len(frames.times), 8, seed, self.values)

    def tool_turn(self, responses: Sequence[str]) -> list[int]:
        return self.encode("\n".join(["", *(f"[{text}]" for text in responses), "go\n"]))

    def clip(self, frames: Frames, start: float, end: float) -> Clip:
        shape = len(frames.times), MERGE, self.values
        pixels = np.random.default_rng(int(start * 100 + end)).normal(size=shape)
        grids = np.full((shape[0], 2), 2, np.int32)
        return Clip(start, end, frames.times, Patches(pixels.astype(np.float32), grids))


class WindowReader(FrameReader):
    """Three frames, or four of a long window."""

    def overview(self, video: VideoRef, count: int) -> Frames:
        return Frames(np.zeros((count, 4, 4, 3), np.uint8), np.arange(float(count)))

    def clip(self, video: VideoRef, start: float, end: float, tokens: int | None = None) -> Frames:
        if start >= BROKEN_FROM:
            raise OSError(f"cannot decode {video.path}")
        return self.overview(video, 3 + (end - start > 32))


class Tape(Session):
    """A session that keeps what it was told and what it said: per stream tokens, which of them
    it generated, and their log-probabilities."""

    def __init__(self, engine, params) -> None:
        super().__init__(engine, params)
        self.heard = {}
        self.pools = {}

    def open(self, pool, prompt, seeds):
        streams = super().open(pool, prompt, seeds)
        for stream in streams:
            self.heard[stream] = [_columns(prompt.tokens)]
            self.pools.setdefault(pool, []).append(stream)
        return streams

    def generate(self, stream, given, sampling, max_tokens):
        super().generate(stream, given, sampling, max_tokens)
        self.heard[stream].append(_columns(given.tokens if isinstance(given, Prompt) else given))

    def step(self):
        turns = super().step()
        for stream, turn in turns:
            self.heard[stream].append(_columns(turn.tokens, turn.log_probs))
        return turns

    def rows(self, pool: str) -> list[bytes]:
        """Streams of a pool in the order in which they were opened."""
        return [
            np.concatenate(self.heard[stream], axis=1).tobytes()
            for stream in self.pools.get(pool, [])
        ]


class TapedEngine(Engine):
    """An engine that keeps the tape of its last session, and what it was compiled for."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.shapes: list[tuple] = []
        for name in ("encode", "prefill", "append", "decode"):
            setattr(self, name, self._noting(name, getattr(self, name)))

    def session(self, params):
        self.tape = Tape(self, params)
        return self.tape

    def _noting(self, name, function):
        def call(*arguments):
            before = self.compilations
            result = function(*arguments)
            if self.compilations > before:
                self.shapes.append((name, *jax.tree.map(np.shape, arguments[2:])))
            return result

        return call


def _columns(tokens, log_probs=None) -> np.ndarray:
    """float32 `[3, t]`: tokens, whether they were generated, log-probabilities."""
    told = log_probs is None
    values = np.zeros(len(tokens)) if told else log_probs
    return np.array([tokens, np.full(len(tokens), not told), values], np.float32)


@dataclasses.dataclass
class Shape:
    """What must not change a sample."""

    prompts: int = 64
    """Prompt slots of main agents."""
    crops: int = 64
    """Slots of sub-agents."""
    steps_per_call: int = 16


class World:
    """A policy, its weights, and an agent around it."""

    def __init__(self, policy, params, values: int, evidence: str, copies: int) -> None:
        self.policy, self.params, self.values, self.copies = policy, params, values, copies
        self.config = dataclasses.replace(CONFIG, evidence=evidence)
        self.renderer = TerseRenderer(values)
        self.routing: RoutingShape | None = None
        """With one, the engine notes routing and batches hold it."""
        self.log_probs = jax.jit(
            lambda params, batch, temperature: batch_log_probs(
                policy, params, batch, temperature=temperature, budget=64
            )[0],
            static_argnums=2,
        )

    def engine(self, shape: Shape) -> TapedEngine:
        """An engine with room for this agent."""
        config = dataclasses.replace(self.config, subagent_batch=shape.crops)
        pools = slot_pools(
            config,
            self.renderer,
            prompts=shape.prompts,
            copies=self.copies,
            prompt_tokens=PROMPT_TOKENS,
            crop_tokens=CROP_TOKENS[self.config.evidence],
        )
        # Several pages for most rows, so that caches grow.
        pools = {name: dataclasses.replace(pool, page=8) for name, pool in pools.items()}
        contents = [bytes([index]) if index < 128 else b"" for index in range(VOCAB)]
        return TapedEngine(
            self.policy,
            pools,
            automata=TokenAutomata(contents, ENDS),
            pad_id=PAD,
            frame_patches=FRAME_PATCHES,
            steps_per_call=shape.steps_per_call,
            routing=self.routing is not None,
            grows_from=0,
        )

    def items(self, count: int, seed: int = 0, longest: int = 20) -> list[Item]:
        """Questions of at most `longest` characters, over 0 to 4 frames of two sizes."""
        dice, items = random.Random(seed), []
        for number in range(count):
            question = "".join(dice.choices("what is it? ", k=dice.randrange(longest)))
            frames, patches = dice.choice([0, 3, 4]), dice.choice([4, 8])
            row = Row(f"row-{seed}-{number}", VideoRef("/v.mp4", 64.0), question, "x")
            prompt = text_prompt(question)
            if frames:
                prompt = image_prompt(question, frames, patches, number, self.values)
            items.append((row, frames, prompt))
        return items

    def roll_out(self, engine: TapedEngine, items: Sequence[Item], seed=0, params=None):
        """Groups of rollouts, one for each item."""
        agent = Agent(
            engine.session,
            self.renderer,
            WindowReader(),
            config=self.config,
            crop_tokens=CROP_TOKENS[self.config.evidence],
        )
        return agent.run(self.params if params is None else params, items, self.copies, seed)

    def check_log_probs(self, batch: LearnerBatch, temperature: float) -> float:
        """Largest distance between the sampler's log-probabilities and the learner's."""
        learned = np.asarray(self.log_probs(self.params, batch, temperature))
        assert learned[batch.loss_weights > 0].std() > 0.1, "a model without opinions shows nothing"
        gap = np.abs(learned - batch.behaviour_log_probs)
        return float(gap[batch.loss_weights > 0].max())

    def batches(
        self, streams: Sequence[LearnerStream], rows: int, group_size: int
    ) -> Iterator[LearnerBatch]:
        """Learner batches of `rows` streams, groups with their prompts once; the last is filled up
        from the first streams."""
        sizes = {"pad_id": PAD, "group_size": group_size, "frame_patches": FRAME_PATCHES}
        sizes["routing"] = self.routing
        sizes["frames"] = FRAMES * group_size if self.config.evidence == "frames" else 4
        for start in range(0, len(streams), rows):
            own = list(itertools.islice(itertools.cycle(streams), start, start + rows))
            if group_size == 1:
                yield learner_batch(own, length=320, **sizes)
            else:
                bounds = Bounds(PROMPT_TOKENS, 288)
                slots = bounds.prompt + group_size * bounds.own
                sizes |= {"slots": slots, "bounds": bounds, "per_row": group_size}
                yield shared_batch(own, **sizes)


def crop_streams(groups: Sequence[RolloutGroup]) -> list[LearnerStream]:
    """Sub-agents as the learner would get them."""
    return [
        stream
        for group in groups
        for rollout in group.trajectories
        for stream in streams_of_groups([RolloutGroup(group.row, 0, rollout.subagents)])
    ]


def learner_rows(batches: Sequence[LearnerBatch], count: int) -> list[bytes]:
    """The first `count` streams of learner batches, as `Tape.rows` has those of the engine."""
    rows = []
    for batch in batches:
        own_tokens = np.asarray(batch.own_tokens)
        copies = len(own_tokens) // len(batch.tokens)
        for row, length in enumerate(batch.lengths):
            tokens, generated, log_probs = (
                values[row, :length]
                for values in (own_tokens, batch.loss_weights, batch.behaviour_log_probs)
            )
            told = _columns(_prompt_tokens(batch, row // copies))
            own = np.array([tokens, generated, log_probs], np.float32)
            rows.append(np.concatenate([told, own], axis=1).tobytes())
    return rows[:count]


def _prompt_tokens(batch: LearnerBatch, row: int) -> np.ndarray:
    """The tokens of a shared prompt; none where streams are whole."""
    return batch.tokens[row, : batch.prompt_lengths[row] if batch.shared else 0]


@dataclasses.dataclass
class Seen:
    """What happened in some episodes, so that a test can tell that it has seen it."""

    episodes: int
    crops: int
    errors: int
    truncated: int
    shown: int
    tool_rounds: int


def what_happened(groups: Sequence[RolloutGroup], config: AgentConfig) -> Seen:
    """Counts over all rollouts."""
    rollouts = [rollout for group in groups for rollout in group.trajectories]
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    return Seen(
        episodes=len(rollouts),
        crops=sum(rollout.executed for rollout in rollouts),
        errors=sum(rollout.calls - rollout.executed for rollout in rollouts),
        truncated=sum(turn.tokens[-1] not in ENDS for turn in turns),
        shown=sum(len(rollout.shown) for rollout in rollouts),
        tool_rounds=max(len(rollout.turns) for rollout in rollouts) - 1,
    )


def input_sizes(world: World) -> dict[str, InputSizes]:
    """What the episodes of a world can be given to read."""
    frames = world.config.evidence == "frames"
    main = InputSizes(
        prompts=(
            SizeRange(0, 1, PROMPT_TOKENS),
            SizeRange(3, 1, PROMPT_TOKENS),
            SizeRange(4, 1, 96),
        ),
        appended=tuple(SizeRange(count, 1, 64) for count in ([0, 3, 6] if frames else [0])),
        sampling=world.config.sampling,
    )
    if frames:
        return {"main": main}
    crops = InputSizes(
        (SizeRange(3, 1, 64), SizeRange(4, 1, 64)), sampling=world.config.subagent_sampling
    )
    return {"main": main, "crop": crops}
