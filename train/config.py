"""The complete configuration of a run.

A recipe is a function that returns a complete `Config`. Sections that configure one
class stand beside that class (`AgentConfig`, `DataSettings`, `ObjectiveConfig`); this
module puts them together and checks what crosses sections.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, Any

from evaluate.settings import EvaluationSettings
from paravt_jax.advantages import AdvantageConfig
from paravt_jax.flags import check_given
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.ranges import at_least, check_ranges
from paravt_jax.records import QuestionType
from paravt_jax.rewards import RewardRules
from pipelines.preprocess import MARKS, OUTER
from rollout.limits import AgentConfig
from rollout.tools import agent_tools
from train.data.settings import DataSettings
from train.methods.settings import DifficultySettings, TeacherSettings
from train.model import ModelSettings
from train.optimizer import OptimizerSettings
from train.rl.settings import (
    RlSettings,
    check_choice,
    check_lengths,
    check_subagents,
    check_updates,
)
from train.settings.override import RECIPE_ONLY, named_in_full
from train.sft.settings import SftSettings
from train.workdir.settings import OutputSettings


class Stage(enum.StrEnum):
    """What a run does."""

    SFT = "sft"
    """Supervised cold start."""
    RL = "rl"
    """Reinforcement learning with rollouts."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a run."""

    recipe: str = dataclasses.field(metadata=RECIPE_ONLY)
    """The name of the recipe."""
    stage: Stage
    """`sft`: supervised fine-tuning. `rl`: reinforcement learning with rollouts."""
    steps: Annotated[int, at_least(1)]
    """Batches to learn from. In the rl stage each gets `rl.updates` optimiser steps."""
    needs: tuple[str, ...] = dataclasses.field(default=(), metadata=RECIPE_ONLY)
    """Flags without which the recipe cannot run."""
    seed: Annotated[int, at_least(0)] = 0
    """Decides the order of data, frame budgets, sampling, and weights that start at random."""
    mesh: str | None = None
    """`data:2,fsdp:4,tensor:2`; one axis may be -1. None puts every device on `data`."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    agent: AgentConfig = AgentConfig()
    rewards: RewardRules = RewardRules()
    advantages: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerSettings = OptimizerSettings()
    rl: RlSettings = RlSettings()
    teacher: TeacherSettings = TeacherSettings()
    difficulty: DifficultySettings = DifficultySettings()
    sft: SftSettings = SftSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    output: OutputSettings = OutputSettings()

    @property
    def packs_conversations(self) -> bool:
        """Whether the run learns packed conversations of `--data`."""
        return self.stage is Stage.SFT and not self.sft.phases

    def __post_init__(self) -> None:
        for check in (check_given, _check_ranges, _check_choices, _check_cross):
            check(self)

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run, which the learning rate's schedule counts."""
        return self.steps * (self.rl.updates if self.stage is Stage.RL else 1)


def generated_budget(config: Config) -> int:
    """Most tokens that one rollout can generate."""
    agent = config.agent
    return agent.rounds * agent.turn_tokens + agent.answer_tokens


def _check_ranges(config: Config) -> None:
    try:
        check_ranges(config)
    except ValueError as error:
        flag = "--" if str(error).startswith(("steps=", "seed=")) else ""
        raise ValueError(f"{flag}{error}") from error
    shared = config.data.overview_tokens
    if shared is not None and shared < max(config.data.frame_budgets, default=0):
        raise ValueError(
            f"data.overview_tokens={shared} is less than one for each of "
            f"{max(config.data.frame_budgets)} frames; raise it or lower data.frame_budgets"
        )
    if config.data.min_pixels > config.data.max_pixels:
        raise ValueError(
            f"data.min_pixels={config.data.min_pixels} is above "
            f"data.max_pixels={config.data.max_pixels}; lower it"
        )


def _check_choices(config: Config) -> None:
    choices = {
        "model.compute_dtype": (config.model.compute_dtype, ("float32", "bfloat16")),
        "model.cache_dtype": (config.model.cache_dtype, ("compute", "int8")),
        "data.frames_as": (config.data.frames_as, ("image", "video")),
        "data.video_marks": (config.data.video_marks or OUTER, tuple(MARKS)),
        "data.instructions": (config.data.instructions, ("full", "terse", "timed")),
        "evaluation.split": (config.evaluation.split, ("held_out", "test")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")


def _check_cross(config: Config) -> None:
    budgets, kinds = config.data.frame_budgets, config.data.question_types
    if not budgets:
        raise ValueError(f"data.frame_budgets must list positive frame counts, got {budgets}")
    unknown = set(kinds) - set(QuestionType)
    if unknown or not kinds:
        raise ValueError(
            f"data.question_types={','.join(kinds)}: choose from {', '.join(QuestionType)}"
        )
    if config.rewards.mode == "llm":
        try:
            config.rewards.judge.check()
        except ValueError as error:
            named = named_in_full(str(error), config.rewards, "rewards.")
            raise ValueError(named) from error
    agent_tools(config.agent)  # refuses names that no tool has
    _check_data(config.data)
    syntax, judged = config.agent.call_syntax, config.rewards.definition.call_syntax
    if judged not in (None, syntax):
        raise ValueError(
            f"rewards.scheme={config.rewards.scheme} judges calls in agent.call_syntax={judged}, "
            f"and the agent writes {syntax}; set one of them to fit"
        )
    _check_lora(config.model)
    (_check_rl if config.stage is Stage.RL else _check_sft)(config)


def _check_data(data: DataSettings) -> None:
    if data.weights and (len(data.weights) != 1 + len(data.mixture) or min(data.weights) <= 0):
        raise ValueError(
            f"data.weights={data.weights}: give one positive weight for --data (or the needle "
            f"world) and one for each of the {len(data.mixture)} data sets of data.mixture"
        )
    if data.weights and not data.mixture:
        raise ValueError("data.weights has no effect without data.mixture; leave it out")
    if data.video_marks and data.frames_as != "video":
        raise ValueError(
            f"data.video_marks={data.video_marks} has no effect with data.frames_as="
            f"{data.frames_as}; leave it out or set data.frames_as=video"
        )
    if data.video_root and not (data.path or data.mixture):
        raise ValueError("data.video_root has no effect without --data; leave it out")


def _check_lora(model: ModelSettings) -> None:
    if model.lora.rank and model.train_vision:
        raise ValueError(
            f"model.train_vision=true has no effect with model.lora.rank={model.lora.rank}, which "
            "trains adapters alone; set it to false"
        )
    if model.adapter and not model.lora.rank:
        raise ValueError(
            f"model.adapter={model.adapter} has no effect without LoRA; set model.lora.rank (and "
            "alpha and targets) to those of its adapter_config.json"
        )


def _check_sft(config: Config) -> None:
    if not config.sft.phases and config.data.path is None and "--data" not in config.needs:
        raise ValueError("the sft stage needs sft.phases; take them from a recipe")
    if config.teacher != TeacherSettings() or config.difficulty != DifficultySettings():
        raise ValueError(
            "teacher and difficulty have no effect in the sft stage, which has no rollouts; leave "
            "their settings out"
        )
    if config.data.mixture or config.data.workers:
        raise ValueError(
            "data.mixture and data.workers have no effect in the sft stage, which reads one data "
            "set by threads; leave them out"
        )
    config.sft.check()
    (_check_packs if config.packs_conversations else _check_tasks)(config)


def _check_packs(config: Config) -> None:
    """Packed conversations."""
    if config.evaluation.rows:
        raise ValueError(
            f"evaluation.rows={config.evaluation.rows} has no effect on conversations, which hold "
            "no questions to evaluate; set it to 0"
        )
    if config.model.router_balance:
        raise ValueError(
            f"model.router_balance={config.model.router_balance} balances the experts of one "
            "stream, and a packed row holds several; set it to 0"
        )


def _check_tasks(config: Config) -> None:
    """A schedule of tasks, which come from the needle world."""
    if config.data.path:
        raise ValueError(
            f"--data {config.data.path}: {config.recipe} learns tasks of the needle world and "
            "reads no conversations; take --recipe paravt_sft, or leave --data out"
        )
    if config.sft.task_masks and config.agent.call_syntax != "grounding":
        raise ValueError(
            f"sft.task_masks={config.sft.task_masks} masks the calls of "
            "agent.call_syntax=grounding and has no effect with another; set it to 0"
        )


def _check_rl(config: Config) -> None:
    rl, objective = config.rl, config.objective
    if config.agent.sampling.temperature <= 0:
        raise ValueError(
            "agent.sampling.temperature=0 samples the same rollout again and again; RL needs it "
            "above 0"
        )
    _check_anchor(config)
    if config.model.train_vision:
        raise ValueError(
            "model.train_vision=true has no effect in the rl stage, where vision features are "
            "computed once per prompt; set it to false"
        )
    check_updates(rl, objective)
    check_subagents(rl, config.agent, objective)
    check_choice(rl, config.agent)
    check_lengths(rl, generated_budget(config))
    _check_variants(config)


def _check_variants(config: Config) -> None:
    own = config.difficulty
    if own.window and own.traces > config.rl.group_size:
        raise ValueError(
            f"difficulty.traces={own.traces} is above rl.group_size={config.rl.group_size}, the "
            "rollouts of a prompt that there is room for; lower it"
        )
    if own.window and config.teacher.strength:
        raise ValueError(
            "difficulty.window and teacher.strength: a teacher reads the plain question with its "
            "own hint, not prompts that were hinted already; set one of them to 0"
        )


def _check_anchor(config: Config) -> None:
    """The readings of the anchor exclude one another, and each has a weight of its own."""
    objective, rewards = config.objective, config.rewards
    if objective.anchor == "position" and not rewards.anchor_share:
        raise ValueError(
            "objective.anchor=position has no effect with rewards.anchor_weight=0, "
            f"rewards.format_weight=0 or another scheme than paravt (rewards.scheme="
            f"{rewards.scheme}); set objective.anchor=sequence"
        )
    instead = objective.anchor == "logprob" or objective.own_anchor
    if instead != bool(objective.anchor_weight):
        raise ValueError(
            f"objective.anchor={objective.anchor} with objective.anchor_weight="
            f"{objective.anchor_weight}: anchor=logprob or one of your own, and a weight above 0, "
            "go together"
        )
    if instead and rewards.anchor_share:
        raise ValueError(
            f"objective.anchor={objective.anchor} takes the place of the anchor in the reward; set "
            f"rewards.anchor_weight={rewards.anchor_weight} to 0"
        )
    if objective.anchor not in ("position", "logprob") and objective.anchor_paired_only:
        raise ValueError(
            f"objective.anchor_paired_only has no effect with objective.anchor={objective.anchor}, "
            "which does not read it; leave it out"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    return dataclasses.asdict(config)
