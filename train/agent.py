"""The agent of a configuration: its tools, and an engine with room for its episodes."""

from __future__ import annotations

import functools

import jax

from models import ModelPolicy
from paravt_jax.mesh import constrain
from pipelines.preprocess import FrameSpec
from pipelines.render import ChatRenderer
from pipelines.sizes import full_size, smallest_frames
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine
from rollout.engine.grammar import response_grammar
from rollout.engine.session import Session
from rollout.limits import AgentConfig, slot_pools
from rollout.tools import agent_tools
from train.config import Config
from train.hosts.cluster import faults_of_all
from train.hosts.interrupt import SIGNALS_OF_RUN

CALLS = "calls"
"""Name of the grammar that lets a turn hold valid calls only."""
LONG_WINDOW = (1.23456e-05, 1.23457e-05)
"""Seconds: bounds that take as many characters as any."""


def open_agent(
    config: Config,
    engine: Engine,
    renderer: ChatRenderer,
    reader: VideoReader,
    rules: AgentConfig | None = None,
) -> Agent:
    """The agent of a configuration, on an engine with its slot pools (`open_engine`); or
    with other rules, which need no more tokens."""
    room = crop_tokens(config, renderer)
    tools = agent_tools(config.agent)
    return Agent(
        functools.partial(Session, engine),
        *(renderer, reader, tools, rules or config.agent, room),
        sync_errors=faults_of_all,
        before_step=SIGNALS_OF_RUN.check,
    )


def open_engine(
    config: Config,
    policy: ModelPolicy,
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
    shapes = slot_pools(
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
        automata=open_automata(config, renderer, policy.vocab_size),
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
    schemas = [tool.schema for tool in agent_tools(config.agent).values()]
    return TokenAutomata(
        renderer.token_contents(vocab),
        renderer.eos_ids,
        {CALLS: response_grammar(schemas, config.agent.call_syntax)} if wanted else None,
        place=jax.jit(lambda table: constrain(table, None, None)),
    )


def crop_frames(config: Config, spec: FrameSpec) -> tuple[int, int | None]:
    """Most frames of a crop, and the quota of vision tokens that they share, if there is one."""
    quota = max(config.agent.clip_tokens, default=None)
    most = spec.frames_within(quota) if quota else config.data.crop_frames
    return min(config.data.crop_frames, most), quota


def crop_tokens(config: Config, renderer: ChatRenderer) -> int:
    """Most tokens of a crop: of a sub-agent's prompt, or of its frames in a tool response."""
    spec = renderer.spec
    most, quota = crop_frames(config, spec)
    frames = smallest_frames(spec, most)
    start, end = LONG_WINDOW
    if config.agent.evidence == "text":
        prompt = renderer.subagent_prompt(frames, start, end)
        return full_size(prompt, spec, quota)
    response = renderer.frames_turn([renderer.clip(frames, start, end)])
    return full_size(response, spec, quota) - len(renderer.tool_turn([""]))
