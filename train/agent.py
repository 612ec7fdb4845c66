"""The agent of a run: its tools, and an engine with room for its episodes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
from jax.sharding import Mesh

from models import ModelPolicy
from paravt_jax.mesh import axes_text, constrain
from paravt_jax.records import Row
from pipelines.render import ChatRenderer
from pipelines.sizes import full_size, prompt_tokens, smallest_frames
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine, OnMesh, SlotPool
from rollout.engine.grammar import response_grammar
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Newest, Session
from rollout.limits import MAIN, AgentConfig, slot_pools
from rollout.observer import NOBODY, Observer
from rollout.tools import agent_tools
from train.data.settings import DataSettings
from train.hosts.interrupt import SIGNALS_OF_RUN
from train.hosts.share import shared_job

CALLS = "calls"
"""Name of the grammar that lets a turn hold valid calls only."""
LONG_WINDOW = (1.23456e-05, 1.23457e-05)
"""Seconds: bounds that take as many characters as any."""


@dataclasses.dataclass(frozen=True)
class CropSize:
    """How large the crops of an agent get."""

    frames: int
    """Most frames."""
    quota: int | None
    """Most vision tokens that they share; None where pixels alone decide."""
    tokens: int
    """Most tokens: of a sub-agent's prompt, or of the frames in a tool response."""


def crop_size(agent: AgentConfig, most_frames: int, renderer: ChatRenderer) -> CropSize:
    """How large crops of at most so many frames get."""
    spec, quota = renderer.spec, max(agent.clip_tokens, default=None)
    frames = min(most_frames, spec.frames_within(quota)) if quota else most_frames
    shown, (start, end) = smallest_frames(spec, frames), LONG_WINDOW
    if agent.evidence == "text":
        prompt = renderer.subagent_prompt(shown, start, end)
        return CropSize(frames, quota, full_size(prompt, spec, quota))
    response = renderer.frames_turn([renderer.clip(shown, start, end)])
    around = len(renderer.tool_turn([""]))
    return CropSize(frames, quota, full_size(response, spec, quota) - around)


@dataclasses.dataclass(frozen=True)
class AgentMaker:
    """Opens agents, and engines that have room for their episodes."""

    rules: AgentConfig
    data: DataSettings
    """How videos are shown."""
    policy: ModelPolicy
    renderer: ChatRenderer
    reader: VideoReader
    layout: Callable[[dict[str, SlotPool]], Mesh | None] = lambda pools: None
    """The mesh of an engine with these slots; None for the one that is active."""
    tell: Callable[[str], None] = lambda line: None
    """Told what the cache of an engine takes."""

    @functools.cached_property
    def crop(self) -> CropSize:
        """How large crops get."""
        return crop_size(self.rules, self.data.crop_frames, self.renderer)

    def agent(
        self,
        engine: Engine,
        rules: AgentConfig | None = None,
        observer: Observer | None = None,
        kind: type[Agent] = Agent,
        before_step: Callable[[], None] = SIGNALS_OF_RUN.check,
        newest: Newest | None = None,
    ) -> Agent:
        """The agent on an engine of `engine`; with other rules on request, which need no more
        tokens. An observer hears of all that its rollouts do. What `before_step`, called before
        each step of the engine, raises ends rollouts; with `newest` they go on under other weights
        while they are under way."""
        tools = agent_tools(self.rules)
        wrote = None if observer is None else observer.wrote
        return kind(
            functools.partial(Session, engine, wrote=wrote, newest=newest),
            *(self.renderer, self.reader, tools, rules or self.rules, self.crop.tokens),
            share=shared_job,
            before_step=before_step,
            observer=observer or NOBODY,
            after_run=engine.caches.release,
        )

    def engine(
        self,
        pools: dict[str, SlotPool],
        *,
        grammar_room: int = 0,
        routing: bool = False,
        **more: int,
    ) -> Engine:
        """An engine with these slots, with room for grammars of single requests, that notes routing
        if asked, and with more settings of `Engine`. Its caches are allocated when it is first
        used."""
        mesh, vocab = self.layout(pools), self.policy.vocab_size
        engine = Engine(
            self.policy,
            pools,
            mesh=mesh,
            automata=open_automata(self.rules, self.renderer, vocab, mesh, grammar_room),
            pad_id=self.renderer.pad_id,
            frame_patches=self.renderer.spec.max_patches,
            penalties=any(sampling.repetition_penalty != 1 for sampling in _samplings(self.rules)),
            routing=routing,
            **more,
        )
        main, (least, most) = pools[MAIN], (engine.cache_bytes(rung) / 2**20 for rung in (0, -1))
        where = "" if mesh is None else f", on mesh {axes_text(mesh)}"
        cache = f"cache {least:,.0f} to {most:,.0f} MiB"
        self.tell(f"engine: {main.prompts} prompts x {main.copies}, {cache}{where}")
        return engine

    def pools(
        self, rows: Iterable[Row], frames: int, *, prompts: int, copies: int, hints: int = 0
    ) -> dict[str, SlotPool]:
        """Slots for `prompts` prompts about any of the questions, each of `frames` frames and
        `hints` tokens more at most, with `copies` rollouts of each, and for their crops."""
        longest = prompt_tokens(self.renderer, rows, frames, self.data.overview_tokens)
        return slot_pools(
            self.rules,
            self.renderer,
            prompts=prompts,
            copies=copies,
            prompt_tokens=longest + hints,
            crop_tokens=self.crop.tokens,
        )


def open_automata(
    rules: AgentConfig,
    renderer: ChatRenderer,
    vocab: int,
    mesh: Mesh | None = None,
    room: int = 0,
) -> TokenAutomata:
    """What ends a turn, the grammar of calls where the rules ask for it, and room for grammars of
    single requests; on a mesh, or on the one that is active."""
    constrained = any(sampling.constrain for sampling in _samplings(rules))
    place = jax.jit(lambda table: constrain(table, None, None))
    schemas = [tool.schema for tool in agent_tools(rules).values()]
    return TokenAutomata(
        renderer.token_contents(vocab),
        renderer.eos_ids,
        {CALLS: response_grammar(schemas, rules.call_syntax)} if constrained else None,
        room=room,
        place=place if mesh is None else OnMesh(place, mesh),
    )


def _samplings(rules: AgentConfig) -> tuple[SamplingConfig, SamplingConfig]:
    return rules.sampling, rules.subagent_sampling
