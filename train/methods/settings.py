"""Settings of what related systems add to GRPO: a teacher, augmentation by difficulty."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

from paravt_jax.ranges import above, above_to, at_least, within
from paravt_jax.rewards import JudgeSettings
from paravt_jax.settings import Refused, Settings, placed


@dataclasses.dataclass(frozen=True)
class TeacherSettings(Settings):
    """Hindsight of a teacher on the student's tokens (VISD, arXiv 2605.06094), see
    `train.methods.teacher`.

    The defaults are those of its release, but without a teacher.
    """

    strength: Annotated[float, within(0, 1)] = 0.0
    """Share of the teacher in each advantage at step 0 (lambda; VISD 0.5). 0: no teacher."""
    anneal_steps: Annotated[int, at_least(1)] = 600
    """The share falls linearly to 0 over these steps; the teacher is off afterwards."""
    rate: Annotated[float, above_to(0, 1)] = 0.01
    """How far the teacher's weights move to the student's after each step."""
    support: Annotated[int, at_least(1)] = 16
    """Likeliest tokens of the teacher on which both policies are compared."""
    full_weight: Annotated[float, within(0, 1)] = 0.0
    """Share of the comparison on the whole vocabulary (`topk_gamma`); 1 leaves only that."""
    weight_low: Annotated[float, above_to(0, 1)] = 0.8
    """Least weight of a token."""
    weight_high: Annotated[float, at_least(1)] = 1.2
    """Largest weight of a token."""
    judge: JudgeSettings = dataclasses.field(
        default_factory=functools.partial(JudgeSettings, max_tokens=512)
    )
    """Who tells the teacher what went right and wrong in a rollout: with a `url`, a language model
    as in VISD; without one, a sentence is made from the rewards."""

    def check_together(self) -> None:
        """Refuse a judge that cannot be asked."""
        if self.judge.url:
            with placed("judge."):
                self.judge.check()


@dataclasses.dataclass(frozen=True)
class DifficultySettings(Settings):
    """Easier prompts for what is hard, harder ones for what is easy (DeepVideo-R1, arXiv
    2506.07464), see `train.methods.difficulty`."""

    window: Annotated[int, at_least(0)] = 0
    """Groups whose mean rewards a group is compared with (W; DeepVideo-R1 100). 0: nothing is
    changed."""
    tolerance: Annotated[float, at_least(0)] = 0.0
    """A group this close to the window's mean reward is left as it is."""
    scale: Annotated[float, above(0)] = 1.0
    """Distance from the window's mean reward at which hints are longest and noise is strongest."""
    traces: Annotated[int, at_least(1)] = 4
    """Solutions that are sampled with the answer in the prompt, for each hard question."""
    longest_hint: Annotated[float, above_to(0, 1)] = 0.5
    """Share of a solution that the longest hint gives away."""
    hint_tokens: Annotated[int, at_least(1)] = 256
    """Most tokens of a hint, for which every prompt gets room."""
    noise: Annotated[float, above_to(0, 1)] = 0.2
    """Standard deviation of the strongest noise, as a share of the range of a pixel's value."""

    def check_together(self) -> None:
        """Refuse a tolerance that leaves no room."""
        if self.tolerance >= self.scale:
            raise Refused(self, "{tolerance} is not below {scale}; lower it")
