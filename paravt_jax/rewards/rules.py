"""What both readings of the rewards share: their rules, their result, the judge's message."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

Judge = Callable[[str], str]
"""Takes a user message, returns the reply of a language model."""

THINK_MIN_CHARS = 10
"""Shortest stripped thought that counts as one."""


@dataclasses.dataclass(frozen=True)
class RewardRules:
    """Weights and switches of the reward. The defaults are the PARA-GRPO recipe, corrected."""

    compat: str = "fixed"
    """The corrected rewards, "fixed", or those of the release, "reference"."""
    answer_suffix: bool = True
    """Whether the answer carries more of the format score than the thinking."""
    anchor_weight: float | int = 0.5
    """Weight of the anchor (lambda) inside the format score; 0 is vanilla GRPO."""
    format_weight: float | int = 1.0
    """Weight of the format score in the total."""
    mode: str = "f1"
    """How an open answer that differs from the ground truth is judged: "f1", "exact" or "llm"."""
    tool_base: float | int = 0.1
    """Credit for at least one executed call. Only for compat="fixed"."""
    tool_bonus: float | int = 0.5
    """Further credit, times accuracy, if a call was executed. Only for compat="fixed"."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that has no meaning."""
        if self.compat not in ("fixed", "reference"):
            raise ValueError(f"compat={self.compat!r} is unknown; use 'fixed' or 'reference'")
        if self.mode not in ("f1", "exact", "llm"):
            raise ValueError(f"mode={self.mode!r} is unknown; use 'f1', 'exact' or 'llm'")
        for name in ("anchor_weight", "format_weight", "tool_base", "tool_bonus"):
            self._check_weight(name)

    def _check_weight(self, name: str) -> None:
        value = getattr(self, name)
        lowest = 0.0 if self.compat == "fixed" else -math.inf
        if not (math.isfinite(value) and value >= lowest):
            raise ValueError(f"{name}={value} must be finite and not negative; 0 switches it off")


@dataclasses.dataclass(frozen=True)
class RewardBreakdown:
    """Reward of one rollout by term."""

    total: float
    """accuracy + format_weight * format + tool."""
    accuracy: float
    """How right the answer is, in [0, 1]."""
    format: float
    """How well the text keeps to the tags, the anchor included; in [0, 1] if "fixed"."""
    tool: float
    """Credit for using the tool."""
    anchor: float = 0.0
    """The anchor alone, before its weight, in [-0.3, 0.7]; mean over turns if "fixed"."""
    task: float = 0.0
    """The total with the anchor left out of the format term. Where the anchor is applied at
    structural positions only, this is what all the other tokens are given."""


def anchor_term(opened: bool, closed: bool, thinks: bool, acts: bool) -> float:
    """R_anchor = 0.4 [closed, thinks] + 0.3 [closed, thinks, acts] - 0.3 [opened, not closed].

    Coefficients alpha, beta, gamma of ParaVT's selective anchoring. In [-0.3, 0.7].
    """
    rise = 0.4 * (closed and thinks) + 0.3 * (closed and thinks and acts)
    return rise - 0.3 * (opened and not closed)


def judge_message(question: str, prediction: str, answer: str) -> str:
    """The user message with which a language model is asked for a verdict."""
    return (
        f"Question: {question}\n"
        f"Ground truth answer: {answer}\n"
        f"Model prediction: {prediction}\n\n"
        "Is the prediction semantically equivalent to the ground truth? "
        "Reply with a single number: 1.0 if correct, 0.5 if partially correct, 0.0 if wrong."
    )


def f1(common: int, predicted: int, expected: int) -> float:
    """Harmonic mean of `common / predicted` and `common / expected`; 0 without common words."""
    if not common:
        return 0.0
    precision, recall = common / predicted, common / expected
    return 2 * precision * recall / (precision + recall)


def interval_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two intervals; 0 if one of them is empty or reversed."""
    if a[1] <= a[0] or b[1] <= b[0]:
        return 0.0
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return intersection / ((a[1] - a[0]) + (b[1] - b[0]) - intersection)
