"""Puts the rooms together: model, data and agent of a run, from its configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from models import ModelPolicy, open_policy
from models.common.adapter import ADAPTER, load_adapter, write_adapter_config
from models.common.folder import copy_model_files
from models.common.weights import load_params
from models.qwen3_vl import Qwen3VLConfig
from paravt_jax.interfaces import FrameReader, TrainablePolicy
from paravt_jax.lora import adapter_table
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from paravt_jax.protocol import call_syntax
from paravt_jax.structure import TagTable, tag_table
from pipelines.loader import PromptStream
from pipelines.needle.tasks import TaskKit, needle_examples
from pipelines.needle.tokenizer import write_processor_folder
from pipelines.needle.traces import GROUNDING_TEXTS, NEEDLE_TEXTS
from pipelines.preprocess import FrameSpec
from pipelines.render import VIDEO_O3_TEXTS, ChatRenderer, PromptTexts
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.limits import token_budget
from rollout.tools import agent_tools
from train.agent import crop_tokens
from train.config import Config, Stage
from train.data import questions
from train.data.needle import needle_world, questions_of_world, world_folder
from train.data.questions import Check, PromptRoom
from train.data.settings import DataSettings
from train.methods.difficulty import Difficulty, hint_room
from train.methods.dynamic_sampling import DynamicSampling
from train.methods.length_penalty import LengthPenalty
from train.model import ModelSettings
from train.recipes.needle import NEEDLE_MODEL
from train.report.steps import StepReport
from train.rl.anchor import Anchor, OwnAnchor
from train.rl.batches import BatchShapes, RolloutBatches
from train.rl.learner import Learner, rl_step
from train.rl.loop import Resumable, Rollouts, RolloutSource, Sample, ScoredRollouts, TellsMetrics
from train.rl.scoring import Scorer
from train.rl.token_advantages import TokenAdvantages
from train.state import FlatParams
from train.step import RlStep
from train.workdir.processors import write_processors


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
        base = Path(config.model.folder) if config.model.folder else needle_base(config)
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


def open_rl_step(
    config: Config, policy: TrainablePolicy, optimizer: optax.GradientTransformation
) -> RlStep:
    """The train step of a configuration, not yet compiled: for one minibatch."""
    balance = config.model.router_balance
    return rl_step(policy, optimizer, config.rl, config.objective, config.agent, balance)


def batch_shapes(
    config: Config, spec: FrameSpec, pad_id: int, longest: int = 0, subagent_longest: int = 0
) -> BatchShapes:
    """Static shapes of the learner's batches: for frames of `spec`, and streams of main agents and
    sub-agents of so many tokens at most."""
    frames, crop = max(config.data.frame_budgets), config.data.crop_frames
    return BatchShapes(spec, pad_id, frames, crop, longest, subagent_longest)


def open_rollouts(
    config: Config,
    prompts: PromptStream,
    agent: Agent,
    scorer: Scorer,
    renderer: ChatRenderer,
    reader: FrameReader,
    report: StepReport,
) -> tuple[RolloutSource, dict[str, Resumable], list[TellsMetrics]]:
    """Where the rollouts of a run come from, with what other papers add to them as the
    configuration asks for it; and which parts of it checkpoints and metrics are about."""
    rl, own = config.rl, config.difficulty
    sample: Sample = ScoredRollouts(agent, scorer, config.steps, report.log.console)
    resumable: dict[str, Resumable] = {"prompts": prompts}
    metrics: list[TellsMetrics] = [lambda: prompts.figures, lambda: agent.figures]
    metrics.append(lambda: scorer.metrics)
    if own.window:
        tools = config.agent.offers_tools
        sample = difficulty = Difficulty(sample, own, renderer, reader, tools)
        resumable["difficulty"] = difficulty
        metrics.append(lambda: difficulty.metrics)
    if rl.overlong_limit is not None:
        sample = LengthPenalty(sample, rl)
    source: RolloutSource = Rollouts(prompts, sample, rl.group_size, config.seed, report.clock)
    if rl.filter_groups is not None:
        source = DynamicSampling(source, rl)
    return source, resumable, metrics


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
    copy_model_files(model.base, target)
    write_processors(config, spec, target)
    if model.policy.lora.rank:
        write_adapter_config(model.policy.lora, target / ADAPTER, model.base)


def needle_sources(config: Config, renderer: ChatRenderer, reader: VideoReader) -> dict[str, Any]:
    """Endless supervised examples of each task of the configuration."""
    asked = questions_of_world(config.data, "train")
    agent = config.agent
    kit = TaskKit(
        needle_world(config.data),
        asked,
        reader,
        renderer,
        config.data.frame_budgets,
        tool=next(iter(agent_tools(agent))),
        syntax=agent.call_syntax,
        quota=agent.clip_tokens[1] if agent.clip_tokens else None,
        most_looks=agent.max_tool_rounds,
    )
    return {task: needle_examples(kit, task, config.seed) for task in config.sft.tasks}


def needle_base(config: Config) -> Path:
    """The needle model's folder without weights: config.json, tokenizer, processor settings."""
    cache = Path(config.data.cache_dir).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    # Other runs and hosts may read the folder: it appears whole or not at all.
    made = Path(tempfile.mkdtemp(dir=cache, prefix=".needle_model-"))
    write_processor_folder(str(made), needle_world(config.data))
    tokenizer = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    full = Qwen3VLConfig.from_dict({**NEEDLE_MODEL, **tokens}).to_dict()
    (made / "config.json").write_text(json.dumps(full, indent=2), encoding="utf-8")
    return _publish(made, cache)


def _publish(made: Path, cache: Path) -> Path:
    """Move a finished folder to a name made of its content, unless it is there already."""
    content = "".join(path.read_text(encoding="utf-8") for path in sorted(made.iterdir()))
    target = cache / f"needle_model-{_hash(content)[:12]}"
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)
    return target


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
        episode = token_budget(config.agent, renderer, crop_tokens(config, renderer)).suffix
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


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
