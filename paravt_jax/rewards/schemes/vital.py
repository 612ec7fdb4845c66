"""VITAL's rewards (arXiv 2508.04416 and its code), whose DGRPO weighs advantages by difficulty.

    R = S(R_acc) + R_format + R_tool

* R_acc: letters 0 or 1; open answers the mean of ROUGE-1, -2 and -L; windows the IoU, scaled
  S(IoU) = clamp((IoU - a) / (b - a), 0, 1) with (a, b) = `iou_scale`: (0.2, 0.8) for Charades,
  ActivityNet and grounded questions, (0, 0.5) for VidChapters. The last interval of the answer
  counts.
* R_format, 0 or 1: the rollout is blocks of think, tool_call and answer with white space between
  them, the first a think, the last an answer, no two equal ones side by side.
* R_tool = 0.5 * min(calls that ran, 2); with `fresh_seconds`, those that looked at anything new.
* With `grounded=True` an answer in words or options also names the window: the term `grounding`,
  S(IoU with the evidence), is added. The source computes both and returns only the IoU, which
  `compat="reference"` repeats.

Chosen here: IoU without the source's 1e-4 in the denominator (reference keeps it), ROUGE without
stemming (see `rouge`), a window over several of evidence is compared with their union.
"""

from __future__ import annotations

import itertools

from paravt_jax.protocol import Window
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.metrics import interval, intervals
from paravt_jax.rewards.overlap import length, overlap
from paravt_jax.rewards.rouge import rouge_mean
from paravt_jax.rewards.rules import (
    UNIT,
    Ranges,
    RewardBreakdown,
    RewardRules,
    Scheme,
    breakdown,
    total_range,
)
from paravt_jax.rewards.tag_blocks import names

_IOU_EPS = 1e-4
_MOST_CALLS = 2


def ranges(rules: RewardRules) -> Ranges:
    """Least and greatest value of each term."""
    parts = {"accuracy": UNIT, "format": UNIT, "tool": UNIT}
    return total_range(rules, parts | ({"grounding": UNIT} if rules.grounded else {}))


def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    """Reward by term."""
    accuracy, added = accuracy_score(attempt, rules), {}
    if rules.grounded:
        has_answer = attempt.question_type != "tvg"
        added["grounding"] = window_score(attempt, attempt.evidence, rules) if has_answer else 0.0
        if rules.compat == "reference" and has_answer:
            accuracy = 0.0
    return breakdown(
        rules,
        accuracy=accuracy,
        format=format_score(attempt.text),
        tool=0.5 * min(attempt.counted_calls(rules.fresh_seconds), _MOST_CALLS),
        added=added,
    )


def accuracy_score(attempt: Attempt, rules: RewardRules) -> float:
    """R_acc in [0, 1], scaled where it is an IoU."""
    if attempt.question_type == "tvg":
        expected = interval(attempt.answer)
        return window_score(attempt, (expected,) if expected else (), rules)
    if attempt.question_type == "mcq":
        return attempt.accuracy("exact")
    return rouge_mean(attempt.prediction, attempt.answer)


def window_score(attempt: Attempt, expected: tuple[Window, ...], rules: RewardRules) -> float:
    """Scaled IoU of the last interval that the answer names."""
    predicted = list(intervals(attempt.prediction))[-1:]
    iou = overlap(predicted, expected).iou
    if rules.compat == "reference":
        union = length([*predicted, *expected])
        iou *= union / (union + _IOU_EPS)
    return scaled(iou, rules.iou_scale)


def scaled(iou: float, scale: tuple[float, float]) -> float:
    """clamp((iou - a) / (b - a), 0, 1)."""
    low, high = scale
    return min(max((iou - low) / (high - low), 0.0), 1.0)


def format_score(text: str) -> float:
    """1 for a whole rollout in VITAL's form, else 0."""
    order = names(text)
    only_tags = set(order) <= {"think", "tool_call", "answer"}
    framed = order[:1] == ["think"] and order[-1:] == ["answer"]
    changing = all(a != b for a, b in itertools.pairwise(order))
    return float(only_tags and framed and changing)


SCHEME = Scheme(
    score,
    ranges,
    reads=("compat", "fresh_seconds", "iou_scale", "grounded"),
    call_syntax="tool_call",
)
