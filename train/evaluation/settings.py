"""Settings of the evaluation before a run, in its midst and after it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from paravt_jax.marks import Mark
from paravt_jax.ranges import at_least
from paravt_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class EvaluationSettings(Settings):
    """The before/after table."""

    rows: Annotated[int, at_least(0)] = 0
    """Held-out questions; 0 skips the evaluation."""
    split: Annotated[Literal["held_out", "test"], Mark.MAY_CHANGE] = "held_out"
    """Which videos of the needle world: `held_out` to compare settings by, `test` for figures to
    report, on which nothing is tuned. Of `--data`, questions are held out whatever this says."""
    batch: Annotated[int, at_least(1), Mark.MAY_CHANGE] = 128
    """Rollouts at once."""
    frame_budget: Annotated[int, at_least(1), Mark.MAY_CHANGE] = 4
    """K of every evaluation prompt."""
    every: Annotated[int, at_least(0)] = 0
    """Steps between evaluations in the midst of the run, whose figures stand in `metrics.jsonl` as
    `evaluation/MODE/NAME`; 0: only before and after."""
    best: str = "greedy/accuracy"
    """The figure, MODE/NAME, by which `best/` is the best of the weights that were evaluated in the
    midst of the run."""
