"""The agent of a configuration: its tools, and an engine with room for its episodes."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import numpy as np

from models.qwen3_vl import Qwen3VLPolicy
from paravt_jax.mesh import constrain
from paravt_jax.records import Frames, Prompt, Row
from pipelines.preprocess import FrameSpec
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.automaton import TokenAutomata
from rollout.engine import Engine
from rollout.grammar import response_grammar
from rollout.limits import CROP, MAIN, AgentConfig, lanes, measure
from rollout.tools import Tools, crop_video, registry
from rollout.warm_up import Extent, Reads
from train.config import Config

CALLS = "calls"
"""Name of the grammar that lets a turn hold valid calls only."""
LATE = 99999.9
"""Seconds: a time that takes as many characters as the time of any frame."""
EARLY = 0.0
"""Seconds: a time that takes as few."""
LONG_WINDOW = (1.23456e-05, 1.23457e-05)
"""Seconds: bounds that take as many characters as any."""


def agent_tools(config: Config) -> Tools:
    """The tools of the agent. Add yours here: schema and function reach prompts and episodes."""
    return registry(crop_video(config.agent.evidence))


def open_agent(
    config: Config,
    engine: Engine,
    renderer: ChatRenderer,
    reader: VideoReader,
    rules: AgentConfig | None = None,
) -> Agent:
    """The agent of a configuration, on an engine that has its lanes (`open_engine`); with other
    rules, of the same room or less, on request."""
    room = crop_tokens(config, renderer)
    return Agent(engine, renderer, reader, agent_tools(config), rules or config.agent, room)


def open_engine(
    config: Config,
    policy: Qwen3VLPolicy,
    renderer: ChatRenderer,
    *,
    prompts: int,
    copies: int,
    prompt_tokens: int,
) -> Engine:
    """An engine with room for `prompts` prompts of at most `prompt_tokens`, `copies` rollouts of
    each, and their crops.

    Its `cache_bytes()` are known before anything is allocated.
    """
    shapes = lanes(
        config.agent,
        renderer,
        prompts=prompts,
        copies=copies,
        prompt_tokens=prompt_tokens,
        crop_tokens=crop_tokens(config, renderer),
    )
    sampling = config.agent.sampling, config.agent.subagent_sampling
    return Engine(
        policy,
        shapes,
        automata=open_automata(config, renderer, policy.config.text.vocab_size),
        pad_id=renderer.pad_id,
        frame_patches=renderer.spec.max_patches,
        penalties=any(own.repetition_penalty != 1 for own in sampling),
    )


def open_automata(config: Config, renderer: ChatRenderer, vocab: int) -> TokenAutomata:
    """What ends a turn, and the grammar of calls where the configuration asks for it."""
    wanted = {config.agent.sampling.constrain, config.agent.subagent_sampling.constrain} - {""}
    if wanted - {CALLS}:
        raise ValueError(
            f"agent.sampling.constrain={', '.join(sorted(wanted))}: choose {CALLS!r}, the grammar "
            "of the agent's tools, or leave it empty"
        )
    schemas = [tool.schema for tool in agent_tools(config).values()]
    return TokenAutomata(
        renderer.token_contents(vocab),
        renderer.eos_ids,
        {CALLS: response_grammar(schemas)} if wanted else None,
        place=jax.jit(lambda table: constrain(table, None, None)),
    )


def crop_tokens(config: Config, renderer: ChatRenderer) -> int:
    """Most tokens of a crop: of a sub-agent's prompt, or of its frames in a tool response."""
    frames, (start, end) = smallest_frames(renderer.spec, config.data.crop_frames), LONG_WINDOW
    if config.agent.evidence == "text":
        prompt = renderer.subagent_prompt(frames, start, end)
        return full_size(prompt, renderer.spec)
    response = renderer.frames_turn([renderer.clip(frames, start, end)])
    return full_size(response, renderer.spec) - len(renderer.tool_turn([""]))


def prompt_tokens(renderer: ChatRenderer, rows: Iterable[Row], frames: int) -> int:
    """Tokens of the longest prompt that any of the questions makes with `frames` frames."""
    longest = max(rows, key=lambda row: len(renderer.encode(row.question)))
    prompt = renderer.main_prompt(longest, smallest_frames(renderer.spec, frames), tools=True)
    return full_size(prompt, renderer.spec)


def agent_reads(
    config: Config, renderer: ChatRenderer, rows: Iterable[Row], budgets: Iterable[int]
) -> dict[str, Reads]:
    """All that the lanes of `open_engine` can be given to read, for any of the questions shown
    with any of the frame budgets. (A video of fewer frames than its budget is not foreseen.)"""
    agent, spec = config.agent, renderer.spec
    questions = sorted(rows, key=lambda row: len(renderer.encode(row.question)))
    ends = questions[0], questions[-1]

    def prompts(frames: int) -> tuple[Prompt, Prompt]:
        early, late = (smallest_frames(spec, frames, time) for time in (EARLY, LATE))
        shortest, longest = ends
        return (
            renderer.main_prompt(shortest, early, tools=True),
            renderer.main_prompt(longest, late, tools=True),
        )

    main = Reads(
        tuple(_extent(*prompts(frames), spec) for frames in sorted(set(budgets))),
        _given(config, renderer),
        agent.sampling,
    )
    if agent.evidence == "frames":
        return {MAIN: main}
    sizes = range(1, config.data.crop_frames + 1)
    crops = tuple(_extent(*_crop_prompts(renderer, frames), spec) for frames in sizes)
    return {MAIN: main, CROP: Reads(crops, sampling=agent.subagent_sampling)}


def _crop_prompts(renderer: ChatRenderer, frames: int) -> tuple[Prompt, Prompt]:
    """The shortest and the longest that a sub-agent reads about so many smallest frames."""
    early, late = (smallest_frames(renderer.spec, frames, time) for time in (EARLY, LATE))
    return renderer.subagent_prompt(early, 0.0, 1.0), renderer.subagent_prompt(late, *LONG_WINDOW)


def _given(config: Config, renderer: ChatRenderer) -> tuple[Extent, ...]:
    """What comes before a turn: its forced prefix, after responses from the second turn on."""
    room = measure(config.agent, renderer, crop_tokens(config, renderer))
    least, most = max(room.prefix, 1), room.prefix + room.response
    if config.agent.evidence == "text":
        return (Extent(0, least, most),)
    shown = range(config.agent.calls_run * config.data.crop_frames + 1)
    return tuple(Extent(frames, max(frames, least), most) for frames in shown)


def _extent(shortest: Prompt, longest: Prompt, spec: FrameSpec) -> Extent:
    frames = 0 if longest.patches is None else len(longest.patches.grids)
    return Extent(frames, len(shortest.tokens), full_size(longest, spec))


def smallest_frames(spec: FrameSpec, count: int, time: float = LATE) -> Frames:
    """Frames of one vision token each, all at one time."""
    pixels = np.zeros((count, spec.factor, spec.factor, 3), np.uint8)
    return Frames(pixels, np.full(count, time))


def full_size(prompt: Prompt, spec: FrameSpec) -> int:
    """Tokens that a prompt of smallest frames has with frames of full size."""
    seen = int((prompt.vision_index >= 0).sum())
    return len(prompt.tokens) + seen * (spec.max_patches // spec.merge_size**2 - 1)
