"""The complete configuration of a run.

A recipe is a function that returns a complete `Config`. Sections that configure one
class stand beside that class (`AgentConfig`, `DataSettings`, `ObjectiveConfig`); this
module puts them together and checks what crosses sections.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Annotated, ClassVar

from paravt_jax.advantages import AdvantageConfig
from paravt_jax.marks import Mark
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.ranges import at_least
from paravt_jax.rewards import RewardRules
from paravt_jax.settings import Settings
from rollout.limits import AgentConfig
from train.data.settings import DataSettings
from train.evaluation.settings import EvaluationSettings
from train.methods.settings import DifficultySettings, TeacherSettings
from train.model import ModelSettings
from train.optimizer import OptimizerSettings
from train.rl.settings import RlSettings
from train.settings.crossing import check_crossing
from train.settings.effects import check_effects
from train.settings.override import RECIPE_ONLY, UNSET
from train.sft.settings import SftSettings
from train.workdir.settings import OutputSettings


class Stage(enum.StrEnum):
    """What a run does."""

    SFT = "sft"
    """Supervised cold start."""
    RL = "rl"
    """Reinforcement learning with rollouts."""


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """Everything that decides a run."""

    recipe: str = dataclasses.field(metadata=RECIPE_ONLY)
    """The name of the recipe."""
    stage: Stage
    """`sft`: supervised fine-tuning. `rl`: reinforcement learning with rollouts."""
    steps: Annotated[int, at_least(1), Mark.MAY_CHANGE]
    """Batches to learn from. In the rl stage each gets `rl.updates` optimiser steps."""
    needs: tuple[str, ...] = dataclasses.field(default=(), metadata=RECIPE_ONLY)
    """Flags without which the recipe cannot run."""
    seed: Annotated[int, at_least(0)] = 0
    """Decides the order of data, frame budgets, sampling, and weights that start at random."""
    mesh: Annotated[str | None, Mark.SAME_RESULTS] = None
    """`data:2,fsdp:4,tensor:2`; one axis may be -1. None puts every device on `data`."""
    rollout_mesh: Annotated[str | None, Mark.SAME_RESULTS] = None
    """The mesh of rollouts over the same devices, to which weights are handed over once a step.
    None takes the `tensor`, and `expert`, with which a token is fastest and weights and caches fit,
    and the rest on `data`; where a device does not tell its memory, as on CPU, the learner's
    mesh."""
    rollout_devices: Annotated[int, at_least(0), Mark.SAME_RESULTS] = 0
    """Devices that roll out and do not learn, of all hosts together: the last ones of each; the
    others learn. `rollout_mesh` is then over these. 0: all devices do both."""
    model: Annotated[ModelSettings, Mark.EVALUATED] = ModelSettings()
    data: Annotated[DataSettings, Mark.EVALUATED] = DataSettings()
    agent: Annotated[AgentConfig, Mark.EVALUATED] = AgentConfig()
    rewards: Annotated[RewardRules, Mark.EVALUATED] = RewardRules()
    advantages: AdvantageConfig = AdvantageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerSettings = OptimizerSettings()
    rl: RlSettings = RlSettings()
    teacher: TeacherSettings = TeacherSettings()
    difficulty: DifficultySettings = DifficultySettings()
    sft: SftSettings = SftSettings()
    evaluation: Annotated[EvaluationSettings, Mark.EVALUATED] = EvaluationSettings()
    output: Annotated[OutputSettings, Mark.SAME_RESULTS] = OutputSettings()
    given: tuple[str, ...] | None = dataclasses.field(
        default=None, metadata=UNSET, repr=False, compare=False
    )
    """Names of the settings that were given, so that they must act (`train.settings.effects`)."""

    place: ClassVar[str] = ""

    @property
    def packs_conversations(self) -> bool:
        """Whether the run learns packed conversations of `--data`."""
        return self.stage is Stage.SFT and not self.sft.phases

    @property
    def uses_reference(self) -> bool:
        """Whether the divergence from the reference policy has a weight."""
        return bool(self.objective.kl_weight or self.advantages.kl_weight)

    @property
    def ratio_moves(self) -> bool:
        """Whether the ratio that a surrogate is given can differ from 1."""
        return self.rl.updates > 1 or self.objective.correction.bypass

    def check_together(self) -> None:
        """Refuse settings that do not fit one another, and those without effect."""
        check_effects(self)
        check_crossing(self)

    @property
    def optimizer_steps(self) -> int:
        """Optimiser steps of the whole run, which the learning rate's schedule counts."""
        return self.steps * (self.rl.updates if self.stage is Stage.RL else 1)
