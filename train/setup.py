"""Puts the rooms together: the parts of a run, from its configuration."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array
from rich.console import Console

from models import ModelPolicy, find_family, open_policy
from models.common.adapter import ADAPTER, load_adapter, write_adapter_config
from models.common.folder import copy_model_files
from models.common.weights import load_params
from paravt_jax.fetched import keep_fetched, local_folder
from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.lora import adapter_table
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from paravt_jax.plugins import load
from paravt_jax.protocol import call_syntax
from paravt_jax.records import Conversation, Row
from paravt_jax.structure import TagTable, tag_table
from pipelines.conversation import is_system
from pipelines.datasets import Found
from pipelines.loader import PromptStream, prompt_stream
from pipelines.needle.traces import GROUNDING_TEXTS, NEEDLE_TEXTS
from pipelines.preprocess import FrameSpec
from pipelines.render import VIDEO_O3_TEXTS, ChatRenderer, PromptTexts
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.engine.engine import Engine, SlotPool
from rollout.limits import MAIN, subagent_budget, token_budget
from rollout.tools import agent_tools
from train.agent import AgentMaker, crop_size
from train.config import Config, Stage
from train.data.needle import needle_sources, world_folder
from train.data.questions import Check, PromptRoom, Questions, question_check
from train.data.settings import DataSettings
from train.hosts.share import WORK, RowsOfHosts, work_metrics
from train.methods.difficulty import Difficulty, hint_room
from train.methods.dynamic_sampling import DynamicSampling
from train.methods.length_penalty import LengthPenalty
from train.recipes.needle import COLD_START
from train.report.rollouts import RolloutLog
from train.report.steps import Clock
from train.rl.anchor import Anchor, OwnAnchor
from train.rl.batches import BatchShapes, RolloutBatches
from train.rl.learner import Learner
from train.rl.loop import (
    MetricsSource,
    Resumable,
    Rollouts,
    RolloutSampler,
    RolloutSource,
    ScoredRollouts,
)
from train.rl.scoring import Scorer
from train.rl.sight import Sight
from train.rl.subagents import possible_rows
from train.rl.token_advantages import TokenAdvantages
from train.sft.batches import PackedData, TaskData
from train.sft.conversations import open_conversations, pack_conversations
from train.sft.masking import TaskMasking
from train.state import FlatParams
from train.step import RlStep
from train.workdir.processors import frames_sampled, write_processors


def open_mesh(config: Config) -> Mesh:
    """The device mesh of `--mesh`: of all devices but those that only roll out.

    Raises:
      ValueError: it does not fit the devices of this run, or none are left.
    """
    devices = learning_devices(config)
    return make_mesh(parse_mesh(config.mesh, len(devices)), devices)


def learning_devices(config: Config) -> list[Any]:
    """All devices but the last `--rollout-devices`, of each host as many.

    Raises:
      ValueError: none are left, or hosts cannot give as many each.
    """
    return _parted_devices(config.rollout_devices)[0]


def _parted_devices(apart: int) -> tuple[list[Any], list[Any]]:
    """Those of the learner and those of rollouts, the last of each host."""
    devices, hosts = jax.devices(), jax.process_count()
    if apart >= len(devices):
        raise ValueError(
            f"--rollout-devices {apart}: this run has {len(devices)} devices; leave one or more "
            "to the learner"
        )
    if apart % hosts:
        raise ValueError(
            f"--rollout-devices {apart}: {hosts} hosts cannot give as many each; take a multiple "
            f"of {hosts}"
        )
    parts: tuple[list[Any], list[Any]] = [], []
    for host in range(hosts):
        own = [device for device in devices if device.process_index == host]
        parts[0].extend(own[: len(own) - apart // hosts])
        parts[1].extend(own[len(own) - apart // hosts :])
    return parts


def open_rollout_devices(config: Config) -> Mesh | None:
    """The devices that only roll out, as a mesh; None where there are none."""
    if not config.rollout_devices:
        return None
    devices = _parted_devices(config.rollout_devices)[1]
    return make_mesh(parse_mesh(None, len(devices)), devices)


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
    kind = load(find_family(folder).renderer)
    return kind.from_folder(
        folder, data.frames_as, texts, pixels, schemas, data.subtitles, data.video_marks
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """The parts of a run that hold no weights, each opened when it is first asked for."""

    config: Config

    def __post_init__(self) -> None:
        data = self.config.data
        keep_fetched(Path(data.cache_dir) / "fetched", data.fetched_gb)

    @functools.cached_property
    def base(self) -> Path:
        """The model folder that tokenizer and processor come from."""
        return Path(local_folder(str(self.config.model.folder or COLD_START)))

    @functools.cached_property
    def policy(self) -> ModelPolicy:
        """The model."""
        model = self.config.model
        return open_policy(
            self.base,
            compute_dtype=model.compute_dtype,
            remat=model.remat,
            lora=model.lora,
            cache_dtype=model.cache_dtype,
            gradient_dtype=model.gradient_dtype,
            remat_keeps=model.remat_keeps,
            remat_block=model.remat_block,
            attention=model.attention,
        )

    def params(self, mesh: Mesh) -> FlatParams:
        """The weights to start from: the folder's, or fresh ones; adapters beside them."""
        key, model = jax.random.key(self.config.seed), self.config.model
        table = self.policy.table
        if model.folder is None:
            return initialise(table, key, mesh)
        params = load_params(self.base, self.policy.without_lora.table, mesh)
        if model.adapter is None:
            return params | initialise(adapter_table(table), key, mesh)
        return params | load_adapter(model.adapter, table, model.lora, mesh)

    @functools.cached_property
    def renderer(self) -> ChatRenderer:
        """Makes prompts in the model's own chat template."""
        return open_renderer(self.config, str(self.base))

    @functools.cached_property
    def reader(self) -> VideoReader:
        """Decodes overviews and crops; frames are kept at the size that the model sees."""
        data = self.config.data
        return VideoReader(
            data.crop_fps,
            data.crop_frames,
            data.cache_mb * 2**20,
            spec=self.renderer.spec,
            overview_tokens=data.overview_tokens,
            decode_seconds=data.decode_seconds,
        )

    @functools.cached_property
    def tags(self) -> TagTable:
        """Finds structural tags in token streams of this tokenizer."""
        contents = self.renderer.token_contents(self.policy.vocab_size)
        return tag_table(contents, call_syntax(self.config.agent.call_syntax).tags)

    @functools.cached_property
    def agents(self) -> AgentMaker:
        """Opens agents and their engines."""
        config = self.config
        return AgentMaker(config.agent, config.data, self.policy, self.renderer, self.reader)

    @property
    def hints(self) -> int:
        """Most tokens by which a method makes prompts longer."""
        return hint_room(self.config.difficulty, self.renderer)

    def pools(self, rows: Iterable[Row]) -> dict[str, SlotPool]:
        """The engine's slots for the rollouts of one step, whichever questions it asks."""
        rl, frames = self.config.rl, max(self.config.data.frame_budgets)
        sizes = {"prompts": rl.prompts_per_step, "copies": rl.group_size, "hints": self.hints}
        return self.agents.pools(rows, frames, **sizes)

    @property
    def room(self) -> PromptRoom:
        """The room for a main agent's prompt, see `prompt_room`."""
        return prompt_room(self.config, self.renderer, self.policy.context_length)

    @property
    def check(self) -> Check:
        """What a question must pass to be used in the run."""
        config = self.config
        return question_check(config.data, config.evaluation, self.renderer, self.room)

    def prompts(self, rows: Questions | Sequence[Row]) -> PromptStream:
        """The endless prompts of the run."""
        config = self.config
        return prompt_stream(
            rows,
            self.reader,
            self.renderer,
            config.data.frame_budgets,
            config.rl.prompts_per_step,
            config.seed,
            threads=config.data.decode_threads,
            workers=config.data.workers,
            tools=config.agent.offers_tools,
            max_bad_rows=config.data.max_bad_rows,
            steps_ahead=config.data.steps_ahead,
            share=RowsOfHosts(),
        )

    def sources(self) -> dict[str, Any]:
        """Endless supervised examples of each needle task of the run."""
        config, tasks = self.config, self.config.sft.tasks
        return needle_sources(
            config.data, config.agent, tasks, config.seed, self.renderer, self.reader
        )

    def task_data(self) -> TaskData:
        """Tasks of the needle world, with masks for a share of the rows if the run asks for it."""
        sft, masking = self.config.sft, None
        if sft.task_masks:
            masking = TaskMasking(sft.task_masks, self.config.seed, self.tags, sft.mask_predictor)
        return TaskData(sft, self.sources(), self.renderer.pad_id, masking)

    def conversations(self) -> Found[Conversation]:
        """The conversations of `--data`, read and checked."""
        return open_conversations(self.config.data, self.renderer)

    def packed_data(self, conversations: Found[Conversation]) -> tuple[PackedData, list[str]]:
        """Packed conversations, and what a user should know of them."""
        config = self.config
        data = pack_conversations(
            conversations.rows,
            config.sft.packing,
            config.data,
            config.seed,
            self.renderer,
            self.reader,
            tools=config.agent.offers_tools,
            most_tokens=(self.room.tokens, self.policy.context_length),
            share=RowsOfHosts(),
        )
        data = dataclasses.replace(data, work=lambda: work_metrics(self.reader.take_metrics()))
        return data, [*conversations.report(), *system_notes(config, conversations.rows)]

    def describe_checkpoints(self, target: Path) -> None:
        """What a checkpoint needs to become a model folder again: configuration, tokenizer,
        processor files that show frames as the run does, and which adapters it holds. No weights.
        """
        data, packing = self.config.data, self.config.sft.packing
        counts, fps = data.frame_budgets, None
        if self.config.packs_conversations:
            counts, fps = (1, packing.max_frames), packing.fps
        copy_model_files(self.base, target)
        pixels = data.min_pixels, data.max_pixels
        write_processors(self.renderer.spec, pixels, frames_sampled(counts, fps), target)
        if self.policy.lora.rank:
            write_adapter_config(self.policy.lora, self.policy.table, target / ADAPTER, self.base)


def prompt_room(config: Config, renderer: ChatRenderer, positions: int) -> PromptRoom:
    """The room for a main agent's prompt in a model of so many positions.

    Raises:
      ValueError: naming the settings, if nothing is left.
    """
    episode, limit = 0, config.data.max_prompt_tokens
    if config.stage is Stage.RL:
        crop = crop_size(config.agent, config.data.crop_frames, renderer)
        episode = token_budget(config.agent, renderer, crop.tokens).suffix
        episode += hint_room(config.difficulty, renderer)
    left = positions - episode
    if left < (limit or 1):
        raise ValueError(
            f"data.max_prompt_tokens={limit}: an episode takes {episode} tokens after its prompt, "
            f"and the model has max_position_embeddings={positions}; lower it, agent.turn_tokens, "
            "agent.response_tokens, agent.max_tool_rounds or agent.episode_tokens"
        )
    if limit is not None:
        return PromptRoom(limit, f"data.max_prompt_tokens={limit}")
    return PromptRoom(left, f"max_position_embeddings={positions} less an episode of {episode}")


def weights_named(config: Config) -> str:
    """Where the first weights come from, in words."""
    return config.model.folder or f"random (seed {config.seed})"


def data_named(data: DataSettings) -> str:
    """Where questions or conversations come from, in words."""
    world = f"the needle world in {world_folder(data)}, written if it is not there"
    return ", ".join([data.path or world, *data.mixture])


def open_rl_step(
    config: Config, policy: TrainablePolicy, optimizer: optax.GradientTransformation
) -> RlStep:
    """The train step for one minibatch of the agent's rollouts, not yet compiled."""
    rl, agent = config.rl, config.agent
    return RlStep(
        policy=policy,
        optimizer=optimizer,
        objective=config.objective,
        # Sampler, learner and reference share one temperature: only so is KL 0 at step 0 (law 3).
        temperature=agent.sampling.temperature,
        micro_batches=rl.prompts_per_step // (rl.minibatches * rl.micro_groups),
        budget=agent.generated_tokens,
        router_balance=config.model.router_balance,
        group_size=rl.group_size,
        subagent_temperature=agent.subagent_sampling.temperature,
        subagent_budget=agent.subagent_tokens,
        penalty=agent.sampling.repetition_penalty,
        subagent_penalty=agent.subagent_sampling.repetition_penalty,
        keeps_log_probs=config.output.rollouts and config.output.details_mb > 0,
    )


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
    """The learner of a configuration, see `Learner`; `tags` finds tags in token streams."""
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
    config: Config,
    spec: FrameSpec,
    pad_id: int,
    longest: tuple[int, int] = (0, 0),
    subagent_longest: int = 0,
) -> BatchShapes:
    """Static shapes of the learner's batches: for frames of `spec`, and main agents' prompts, what
    follows these, and streams of sub-agents of so many tokens at most."""
    frames, crop = max(config.data.frame_budgets), config.data.crop_frames
    return BatchShapes(spec, pad_id, frames, crop, *longest, subagent_longest)


def engine_shapes(config: Config, agents: AgentMaker, engine: Engine) -> BatchShapes:
    """Static shapes of the learner's batches of what an engine rolls out."""
    renderer, main, rl = agents.renderer, engine.pools[MAIN], config.rl
    subagent_longest = 0
    if rl.trains_subagents:
        subagent_longest = agents.crop.tokens + subagent_budget(config.agent, renderer)
        rows = possible_rows(config.agent.rounds * config.agent.calls_run, rl.group_size)
        agents.tell(f"learner: sub-agents of {subagent_longest} tokens, {rows} rows per prompt")
    longest = main.prompt_tokens, main.suffix
    return batch_shapes(config, renderer.spec, renderer.pad_id, longest, subagent_longest)


def open_sight(
    config: Config, batches: RolloutBatches, policy: TrainablePolicy, mesh: Mesh
) -> Sight | None:
    """Measures whether the policy sees, if the configuration asks for it."""
    every = config.rl.sight_every
    return Sight(policy, mesh, batches.shapes, every) if every else None


def open_rollout_log(config: Config, parts: Parts, workdir: Path) -> RolloutLog | None:
    """Writes rollouts and their details, if the configuration asks for them."""
    output, renderer = config.output, parts.renderer
    if not output.rollouts:
        return None
    contents = renderer.token_contents(parts.policy.vocab_size)
    return RolloutLog(workdir, config.steps, output.details_mb * 2**20, contents, renderer.spec)


def open_rollouts(
    config: Config,
    prompts: PromptStream,
    agents: AgentMaker,
    agent: Agent,
    scorer: Scorer,
    console: Console,
    clock: Clock,
) -> tuple[RolloutSource, dict[str, Resumable], list[MetricsSource]]:
    """Where the rollouts of a run come from, with what other papers add to them where the
    configuration asks for it; and which parts of it checkpoints and metrics are about."""
    rl, own = config.rl, config.difficulty
    sample: RolloutSampler = ScoredRollouts(agent, scorer, config.steps, console, rl.staleness)
    resumable: dict[str, Resumable] = {"prompts": prompts}
    WORK.take()  # what was done so far belongs to no step
    metrics: list[MetricsSource] = [lambda: prompts.metrics, lambda: agent.metrics]
    metrics += [lambda: scorer.metrics, lambda: work_metrics(agents.reader.take_metrics())]
    if own.window:
        tools = config.agent.offers_tools
        sample = difficulty = Difficulty(sample, own, agents.renderer, agents.reader, tools)
        resumable["difficulty"] = difficulty
        metrics.append(lambda: difficulty.metrics)
    if rl.overlong_limit and rl.overlong_margin:
        limits = rl.overlong_limit, rl.overlong_margin
        sample = LengthPenalty(sample, rl.overlong_weight, *limits)
    source: RolloutSource = Rollouts(prompts, sample, rl.group_size, config.seed, clock)
    if rl.filter_groups is not None:
        source = DynamicSampling(source, rl)
    return source, resumable, metrics


def system_notes(config: Config, conversations: Sequence[Conversation]) -> list[str]:
    """A note if the agent's system text replaces other ones."""
    texts = prompt_texts(config)
    agents = texts.system + (texts.tools if config.agent.offers_tools else "")
    others = sum(
        any(is_system(m) and m.content != (agents,) for m in row.messages) for row in conversations
    )
    if config.sft.packing.system != "agent" or not others:
        return []
    return [
        f"{others} of {len(conversations)} conversations have a system message of their own: the "
        "text and the tools of rollouts take its place (sft.packing.system=own keeps it)"
    ]
