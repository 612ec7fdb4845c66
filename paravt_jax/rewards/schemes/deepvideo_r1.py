"""DeepVideo-R1's rewards (arXiv 2506.07464), from the paper only.

    R = R_format + R_acc (+ IoU where the answer also names a window, as in NExT-GQA)

* R_format, 0 or 1: `<think>..</think><answer>..</answer>` and nothing else; no tools.
* R_acc, 0 or 1: the right letter, or for an open answer the same words.
* With `grounded=True` the term `grounding` is added: IoU of the first interval of the answer with
  the evidence.

The paper names no reward for a question that asks for a window alone; here R_acc is its IoU.
"""

from __future__ import annotations

from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.metrics import interval
from paravt_jax.rewards.overlap import overlap
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


def ranges(rules: RewardRules) -> Ranges:
    """Least and greatest value of each term."""
    parts = {"accuracy": UNIT, "format": UNIT, "tool": (0.0, 0.0)}
    return total_range(rules, parts | ({"grounding": UNIT} if rules.grounded else {}))


def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    """Reward by term."""
    return breakdown(
        rules,
        accuracy=attempt.accuracy("exact"),
        format=float(names(attempt.text) == ["think", "answer"]),
        added={"grounding": grounding_score(attempt)} if rules.grounded else {},
    )


def grounding_score(attempt: Attempt) -> float:
    """IoU of the window in the answer with the evidence; 0 where the answer is the window."""
    window = interval(attempt.prediction)
    if window is None or attempt.question_type == "tvg":
        return 0.0
    return overlap([window], attempt.evidence).iou


SCHEME = Scheme(score, ranges, reads=("grounded",))
