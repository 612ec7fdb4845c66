"""Puts the rooms together: the parts of a run, from its configuration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console

from evaluate.before_after import BeforeAfter
from evaluate.held_out import HeldOut
from models import ModelPolicy, open_policy
from models.common.adapter import ADAPTER, load_adapter, write_adapter_config
from models.common.folder import copy_model_files
from models.common.weights import load_params
from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.lora import adapter_table
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from paravt_jax.protocol import call_syntax
from paravt_jax.records import Conversation, Row
from paravt_jax.structure import TagTable, tag_table
from pipelines.loader import PromptStream, prompt_stream
from pipelines.needle.traces import GROUNDING_TEXTS, NEEDLE_TEXTS
from pipelines.preprocess import FrameSpec
from pipelines.render import VIDEO_O3_TEXTS, ChatRenderer, PromptTexts
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.engine.engine import Engine
from rollout.limits import MAIN, subagent_budget, token_budget
from rollout.tools import agent_tools
from train.agent import AgentMaker, crop_size
from train.compile.cache import Compilations
from train.config import Config, Stage
from train.data import questions
from train.data.needle import needle_folder, needle_sources, world_folder
from train.data.questions import Check, PromptRoom, Questions, strata
from train.data.settings import DataSettings
from train.methods.difficulty import Difficulty, hint_room
from train.methods.dynamic_sampling import DynamicSampling
from train.methods.length_penalty import LengthPenalty
from train.methods.teacher import TaughtLearner
from train.model import ModelSettings
from train.recipes.needle import NEEDLE_MODEL
from train.report.steps import StepReport
from train.rl.anchor import Anchor, OwnAnchor
from train.rl.batches import BatchShapes, RolloutBatches
from train.rl.learner import Learner, rl_step
from train.rl.loop import (
    MetricsSource,
    Resumable,
    RlRun,
    Rollouts,
    RolloutSource,
    Sample,
    ScoredRollouts,
)
from train.rl.scoring import Scorer
from train.rl.subagents import possible_rows
from train.rl.token_advantages import TokenAdvantages
from train.sft.batches import PackedData, TaskData
from train.sft.conversations import ConversationPacker, open_conversations, system_note
from train.sft.masking import TaskMasking
from train.state import FlatParams
from train.step import RlStep
from train.workdir.config_file import flat_settings
from train.workdir.processors import frames_sampled, write_processors
from train.workdir.saving import Saver


def open_mesh(config: Config) -> Mesh:
    """The device mesh of `--mesh`.

    Raises:
      ValueError: it does not fit the devices of this run.
    """
    return make_mesh(parse_mesh(config.mesh, jax.device_count()))


def prompt_texts(config: Config) -> PromptTexts:
    """The words of prompts: `data.instructions`, about the tools of the agent."""
    agent, terse = config.agent, config.data.instructions == "terse"
    if agent.call_syntax == "grounding":
        return GROUNDING_TEXTS if terse else VIDEO_O3_TEXTS
    if terse:
        return NEEDLE_TEXTS
    texts = PromptTexts().about(list(agent_tools(agent)), parallel=agent.dispatch == "parallel")
    return texts.with_times() if config.data.instructions == "timed" else texts


def open_renderer(config: Config, folder: str) -> ChatRenderer:
    """What makes the prompts of every stage, in the chat template of a model folder.

    Raises:
      ValueError: the folder lacks a tokenizer, a chat template or a processor.
    """
    data = config.data
    schemas = [dict(tool.schema) for tool in agent_tools(config.agent).values()]
    texts, pixels = prompt_texts(config), (data.min_pixels, data.max_pixels)
    return ChatRenderer.from_folder(
        folder, data.frames_as, texts, pixels, schemas, data.subtitles, data.video_marks
    )


@dataclasses.dataclass(frozen=True)
class Model:
    """A policy and the folder that its tokenizer and processor come from."""

    policy: ModelPolicy
    base: Path

    @classmethod
    def open(cls, config: Config) -> Model:
        """From `--model`, or the needle model, whose folder is written below the data cache."""
        folder = config.model.folder
        base = Path(folder) if folder else needle_folder(config.data, NEEDLE_MODEL)
        return cls(_policy(base, config.model), base)

    def params(self, config: Config, mesh: Mesh) -> FlatParams:
        """The weights to start from: the folder's, or fresh ones; adapters beside them."""
        key, settings = jax.random.key(config.seed), config.model
        if settings.folder is None:
            return initialise(self.policy.table, key, mesh)
        params = load_params(settings.folder, self.policy.without_lora.table, mesh)
        if settings.adapter is None:
            return params | initialise(adapter_table(self.policy.table), key, mesh)
        return params | load_adapter(settings.adapter, self.policy.table, settings.lora, mesh)

    def renderer(self, config: Config) -> ChatRenderer:
        """Prompts in the model's own chat template."""
        return open_renderer(config, str(self.base))

    def tags(self, config: Config, renderer: ChatRenderer) -> TagTable:
        """What finds structural tags in token streams of this tokenizer."""
        contents = renderer.token_contents(self.policy.vocab_size)
        return tag_table(contents, call_syntax(config.agent.call_syntax).tags)


def abstract_policy(config: Config) -> ModelPolicy:
    """The policy of a configuration, without touching the disk for the needle model."""
    return _policy(config.model.folder or NEEDLE_MODEL, config.model)


def _policy(source: str | Path | Mapping[str, Any], settings: ModelSettings) -> ModelPolicy:
    return open_policy(
        source,
        compute_dtype=settings.compute_dtype,
        remat=settings.remat,
        lora=settings.lora,
        cache_dtype=settings.cache_dtype,
    )


def describe_checkpoints(model: Model, config: Config, spec: FrameSpec, target: Path) -> None:
    """What a checkpoint needs to become a model folder again: configuration, tokenizer, processor
    files that show frames as the run does (`spec`), and which adapters it holds. No weights."""
    data, packing = config.data, config.sft.packing
    counts, fps = data.frame_budgets, None
    if config.packs_conversations:
        counts, fps = (1, packing.max_frames), packing.fps
    copy_model_files(model.base, target)
    pixels = data.min_pixels, data.max_pixels
    write_processors(spec, pixels, frames_sampled(counts, fps), target)
    if model.policy.lora.rank:
        write_adapter_config(model.policy.lora, target / ADAPTER, model.base)


def weights_named(config: Config) -> str:
    """Where the first weights come from, in words."""
    return config.model.folder or f"random (seed {config.seed})"


def data_named(data: DataSettings) -> str:
    """Where questions or conversations come from, in words."""
    world = f"the needle world in {world_folder(data)}, written if it is not there"
    return ", ".join([data.path or world, *data.mixture])


def prompt_room(config: Config, renderer: ChatRenderer, positions: int) -> PromptRoom:
    """The room for a main agent's prompt in a model of so many positions.

    Raises:
      ValueError: naming the settings, if nothing is left.
    """
    episode = 0
    if config.stage is Stage.RL:
        crop = crop_size(config.agent, config.data.crop_frames, renderer)
        episode = token_budget(config.agent, renderer, crop.tokens).suffix
        episode += hint_room(config.difficulty, renderer)
    return questions.prompt_room(config.data.max_prompt_tokens, positions, episode)


def question_check(config: Config, renderer: ChatRenderer, positions: int) -> Check:
    """What a question must pass to be used in a run, see `train.data.questions.question_check`.

    Raises:
      ValueError: naming the settings, if the model has too few positions for any prompt.
    """
    room = prompt_room(config, renderer, positions)
    return questions.question_check(config.data, config.evaluation, renderer, room)


def open_reader(config: Config, spec: FrameSpec) -> VideoReader:
    """Decodes overviews and crops; frames are kept at the size that the model sees."""
    own = config.data
    return VideoReader(
        own.crop_fps,
        own.crop_frames,
        spec=spec,
        overview_tokens=own.overview_tokens,
        decode_seconds=own.decode_seconds,
    )


def agent_maker(
    config: Config,
    policy: ModelPolicy,
    renderer: ChatRenderer,
    reader: VideoReader,
    tell: Callable[[str], None] = lambda line: None,
) -> AgentMaker:
    """What opens the agents of a configuration."""
    crop_frames, overview_tokens = config.data.crop_frames, config.data.overview_tokens
    return AgentMaker(config.agent, policy, renderer, reader, crop_frames, overview_tokens, tell)


def open_prompts(
    config: Config,
    rows: Questions | Sequence[Row],
    reader: VideoReader,
    renderer: ChatRenderer,
) -> PromptStream:
    """The endless prompts of a configuration."""
    return prompt_stream(
        rows,
        reader,
        renderer,
        config.data.frame_budgets,
        config.rl.prompts_per_step,
        config.seed,
        workers=config.data.workers,
        tools=config.agent.offers_tools,
        max_bad_rows=config.data.max_bad_rows,
    )


def open_rl_step(
    config: Config, policy: TrainablePolicy, optimizer: optax.GradientTransformation
) -> RlStep:
    """The train step of a configuration, not yet compiled: for one minibatch."""
    balance = config.model.router_balance
    return rl_step(policy, optimizer, config.rl, config.objective, config.agent, balance)


def open_learner(
    config: Config,
    policy: TrainablePolicy,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    tags: TagTable,
    shapes: BatchShapes,
    reference: FlatParams,
    table: Array | None = None,
) -> Learner:
    """The learner of a configuration.

    Args:
      tags: finds structural tags in token streams.
      shapes: static shapes of its batches, see `batch_shapes`.
      reference: the trainable weights of the policy that KL is measured from.
      table: that of the engine's automata, needed if a grammar constrains what it draws.
    """
    rl, agent = config.rl, config.agent
    anchor, weight = open_anchor(config, tags, mesh)
    return Learner(
        open_rl_step(config, policy, optimizer),
        rl,
        RolloutBatches(policy, mesh, shapes, rl, agent),
        TokenAdvantages(config.advantages, anchor, weight, rl.subagent_credit),
        reference,
        table,
    )


def open_anchor(config: Config, tags: TagTable, mesh: Mesh) -> tuple[Anchor, float | None]:
    """The format anchor, and its weight at structural tags; None where it acts elsewhere."""
    objective, syntax = config.objective, config.agent.call_syntax
    arguments = config.advantages, syntax, objective.anchor_paired_only, tags, mesh
    if objective.own_anchor:
        return OwnAnchor(str(objective.anchor), *arguments), objective.anchor_weight
    weight = config.rewards.anchor_share if objective.anchor == "position" else None
    return Anchor(*arguments), weight


def batch_shapes(
    config: Config, spec: FrameSpec, pad_id: int, longest: int = 0, subagent_longest: int = 0
) -> BatchShapes:
    """Static shapes of the learner's batches: for frames of `spec`, and streams of main agents and
    sub-agents of so many tokens at most."""
    frames, crop = max(config.data.frame_budgets), config.data.crop_frames
    return BatchShapes(spec, pad_id, frames, crop, longest, subagent_longest)


def engine_shapes(config: Config, agents: AgentMaker, engine: Engine) -> BatchShapes:
    """Static shapes of the learner's batches of what an engine rolls out."""
    renderer, main, rl = agents.renderer, engine.pools[MAIN], config.rl
    subagent_longest = 0
    if rl.trains_subagents:
        subagent_longest = agents.crop.tokens + subagent_budget(config.agent, renderer)
        rows = possible_rows(config.agent.rounds * config.agent.calls_run, rl.group_size)
        agents.tell(f"learner: sub-agents of {subagent_longest} tokens, {rows} rows per prompt")
    longest = main.prompt_tokens + main.suffix
    return batch_shapes(config, renderer.spec, renderer.pad_id, longest, subagent_longest)


def open_rollouts(
    config: Config,
    prompts: PromptStream,
    agents: AgentMaker,
    agent: Agent,
    scorer: Scorer,
    report: StepReport,
) -> tuple[RolloutSource, dict[str, Resumable], list[MetricsSource]]:
    """Where the rollouts of a run come from, with what other papers add to them where the
    configuration asks for it; and which parts of it checkpoints and metrics are about."""
    rl, own = config.rl, config.difficulty
    sample: Sample = ScoredRollouts(agent, scorer, config.steps, report.log.console)
    resumable: dict[str, Resumable] = {"prompts": prompts}
    metrics: list[MetricsSource] = [lambda: prompts.figures, lambda: agent.figures]
    metrics += [lambda: scorer.metrics, agents.reader.take_figures]
    if own.window:
        tools = config.agent.offers_tools
        sample = difficulty = Difficulty(sample, own, agents.renderer, agents.reader, tools)
        resumable["difficulty"] = difficulty
        metrics.append(lambda: difficulty.metrics)
    if rl.overlong_limit is not None:
        sample = LengthPenalty(sample, rl)
    source: RolloutSource = Rollouts(prompts, sample, rl.group_size, config.seed, report.clock)
    if rl.filter_groups is not None:
        source = DynamicSampling(source, rl)
    return source, resumable, metrics


def open_rl_run(
    config: Config,
    prompts: PromptStream,
    agents: AgentMaker,
    engine: Engine,
    scorer: Scorer,
    learner: Learner,
    saver: Saver,
    report: StepReport,
    workdir: Path,
) -> RlRun:
    """What the RL loop works with; with a teacher where the configuration asks for one."""
    rollouts, resumable, metrics = open_rollouts(
        config, prompts, agents, agents.agent(engine), scorer, report
    )
    compilations, own, tools = Compilations(), config.teacher, config.agent.offers_tools
    taught = own.strength > 0
    return RlRun(
        steps=config.steps,
        rollouts=rollouts,
        learner=TaughtLearner(learner, own, agents.renderer, tools) if taught else learner,
        resumable=resumable,
        metrics=[*metrics, lambda: compilations.metrics],
        saver=saver,
        report=report,
        rollouts_folder=workdir / "rollouts" if config.output.rollouts else None,
    )


def task_data(
    config: Config, tags: TagTable, renderer: ChatRenderer, reader: VideoReader
) -> TaskData:
    """Tasks of the needle world, with masks for a share of the rows if the run asks for it."""
    sft, sources = config.sft, open_sources(config, renderer, reader)
    masking = None
    if sft.task_masks:
        masking = TaskMasking(sft.task_masks, config.seed, tags, sft.mask_predictor)
    return TaskData(sft, sources, renderer.pad_id, masking)


def open_sources(config: Config, renderer: ChatRenderer, reader: VideoReader) -> dict[str, Any]:
    """Endless supervised examples of each task of the configuration."""
    tasks, seed = config.sft.tasks, config.seed
    return needle_sources(config.data, config.agent, tasks, seed, renderer, reader)


def packed_data(
    config: Config, renderer: ChatRenderer, reader: VideoReader, positions: int
) -> tuple[PackedData, list[str]]:
    """Packed conversations of `--data`, and what a user should know of them."""
    found = open_conversations(config.data, renderer)
    packer = ConversationPacker(
        config.sft.packing,
        config.data,
        config.seed,
        renderer,
        reader,
        tools=config.agent.offers_tools,
        prompt_tokens=prompt_room(config, renderer, positions).tokens,
        positions=positions,
    )
    return packer.packed(found.rows), [*found.report(), *system_notes(config, found.rows)]


def system_notes(config: Config, conversations: Sequence[Conversation]) -> list[str]:
    """See `train.sft.conversations.system_note`."""
    texts = prompt_texts(config)
    agents = texts.system + (texts.tools if config.agent.offers_tools else "")
    return system_note(config.sft.packing, agents, conversations)


def open_evaluation(
    config: Config,
    held_out: Sequence[Row],
    agents: AgentMaker,
    scorer: Scorer,
    workdir: Path,
    console: Console,
) -> BeforeAfter:
    """Evaluation on held-out questions, before and after."""
    own, data = config.evaluation, config.data
    by_events = functools.partial(strata, data, own.split)
    asked = HeldOut(own, held_out, agents, scorer, data.max_bad_rows, by_events, console)
    part = "test" if own.split == "test" and not data.path else "held-out"
    title = f"{len(held_out)} {part} questions, K={own.frame_budget}"
    return BeforeAfter(asked, flat_settings(config), workdir, title, console)
