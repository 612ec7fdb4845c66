"""Settings of what related systems add to GRPO: a teacher, augmentation by difficulty."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from paravt_jax.rewards import JudgeSettings


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """Hindsight of a teacher on the student's tokens (VISD, arXiv 2605.06094), see
    `train.methods.teacher`.

    The defaults are those of its release, but without a teacher.
    """

    strength: float = 0.0
    """Share of the teacher in each advantage at step 0 (lambda; VISD 0.5). 0: no teacher."""
    anneal_steps: int = 600
    """The share falls linearly to 0 over these steps; the teacher is off afterwards."""
    rate: float = 0.01
    """How far the teacher's weights move to the student's after each step."""
    support: int = 16
    """Likeliest tokens of the teacher on which both policies are compared."""
    full_weight: float = 0.0
    """Share of the comparison on the whole vocabulary (`topk_gamma`); 1 leaves only that."""
    weight_low: float = 0.8
    """Least weight of a token."""
    weight_high: float = 1.2
    """Largest weight of a token."""
    judge: JudgeSettings = dataclasses.field(
        default_factory=functools.partial(JudgeSettings, max_tokens=512)
    )
    """Who tells the teacher what went right and wrong in a rollout: with a `url`, a language model
    as in VISD; without one, a sentence is made from the rewards."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that has no meaning or no effect."""
        if not self.strength:
            _refuse_changes("teacher", self, "teacher.strength=0 switches the teacher off")
        if not 0 <= self.strength <= 1 or not 0 <= self.full_weight <= 1:
            raise ValueError(
                f"teacher.strength={self.strength}, teacher.full_weight={self.full_weight}: both "
                "are shares, from 0 to 1"
            )
        if self.anneal_steps < 1 or self.support < 1 or not 0 < self.rate <= 1:
            raise ValueError(
                f"teacher.anneal_steps={self.anneal_steps}, teacher.support={self.support}, "
                f"teacher.rate={self.rate}: the first two are at least 1, the rate lies in (0, 1]"
            )
        if not 0 < self.weight_low <= 1 <= self.weight_high:
            raise ValueError(
                f"teacher.weight_low={self.weight_low}, teacher.weight_high={self.weight_high}: "
                "weights lie around 1, and above 0 so that no advantage changes its sign"
            )
        if self.judge != _default("judge", TeacherSettings):
            self.judge.check()
        if self.full_weight == 1 and self.support != TeacherSettings.support:
            raise ValueError(
                f"teacher.support={self.support} has no effect with teacher.full_weight=1, which "
                "compares on the whole vocabulary; leave one of them out"
            )


@dataclasses.dataclass(frozen=True)
class DifficultySettings:
    """Easier prompts for what is hard, harder ones for what is easy (DeepVideo-R1, arXiv
    2506.07464), see `train.methods.difficulty`."""

    window: int = 0
    """Groups whose mean rewards a group is compared with (W; DeepVideo-R1 100). 0: nothing is
    changed."""
    tolerance: float = 0.0
    """A group this close to the window's mean reward is left as it is."""
    scale: float = 1.0
    """Distance from the window's mean reward at which hints are longest and noise is strongest."""
    traces: int = 4
    """Solutions that are sampled with the answer in the prompt, for each hard question."""
    longest_hint: float = 0.5
    """Share of a solution that the longest hint gives away."""
    hint_tokens: int = 256
    """Most tokens of a hint, for which every prompt gets room."""
    noise: float = 0.2
    """Standard deviation of the strongest noise, as a share of the range of a pixel's value."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that has no meaning or no effect."""
        if not self.window:
            _refuse_changes("difficulty", self, "difficulty.window=0 changes no prompt")
        if self.window < 0 or not 0 <= self.tolerance < self.scale:
            raise ValueError(
                f"difficulty.window={self.window}, difficulty.tolerance={self.tolerance}, "
                f"difficulty.scale={self.scale}: none may be negative, and the scale must be above "
                "the tolerance"
            )
        if not 0 < self.longest_hint <= 1 or not 0 < self.noise <= 1:
            raise ValueError(
                f"difficulty.longest_hint={self.longest_hint}, difficulty.noise={self.noise}: both "
                "are shares above 0, at most 1"
            )
        if self.traces < 1 or self.hint_tokens < 1:
            raise ValueError(
                f"difficulty.traces={self.traces}, difficulty.hint_tokens={self.hint_tokens}: both "
                "must be at least 1"
            )


def _default(name: str, kind: type) -> Any:
    """What a setting of a section is, unless it is set."""
    field = kind.__dataclass_fields__[name]
    return (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )


def _refuse_changes(name: str, section: Any, reason: str) -> None:
    """Settings of a section that is switched off have no effect.

    Raises:
        ValueError: one of them is not its default.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if value != _default(field.name, type(section)):
            raise ValueError(
                f"{name}.{field.name}={value} has no effect, because {reason}; leave it out"
            )
