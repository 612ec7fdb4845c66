"""LongVT's rewards (arXiv 2511.20785; code at 08d755b): joint answer, format and window.

    R = R_acc + R_format + R_time

* R_acc: a judge says 0, 0.5 or 1; an answer of 1000 characters or more gets 0 for accuracy and
  format. Questions that ask for a window: IoU of the answer, without R_time.
* R_format, 0 or 1: one answer, tags of thinking and calls in pairs. Without calls
  `<think>..</think><answer>..</answer>` and nothing else, with k calls the opening tags are think,
  (tool_call, think) k times, answer; so a turn makes one call.
* R_time, the `tool` term: IoU of the window that the last call asked for with the evidence, if a
  call ran. `window_term` chooses the source's other readings: "recall", the share of the evidence
  inside that window, or "tool", 1 for a call and an accuracy of 0.5 or more.

The source divides by the hull of both windows. With one window of evidence that is the IoU; with
several it is not, and `compat="reference"` keeps the hull while "fixed" divides by the union.
Left open and chosen here: without a judge (`mode="f1"`) F1 takes its place, and letters are judged
by `metrics.choice_accuracy` in every mode. The source's default of 0.8 R_acc + 0.2 R_format is,
up to a factor that advantages ignore, `format_weight=0.25` with `window_term="none"`.
"""

from __future__ import annotations

import re

from paravt_jax import protocol
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.overlap import asked_window, overlap
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

_LONGEST_ANSWER = 1000
_OPENINGS = re.compile(r"<(think|tool_call|answer)>")


def ranges(rules: RewardRules) -> Ranges:
    """Least and greatest value of each term."""
    return total_range(rules, {"accuracy": UNIT, "format": UNIT, "tool": UNIT})


def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    """Reward by term; R_time is the `tool` term."""
    if len(attempt.prediction) >= _LONGEST_ANSWER:
        accuracy, form = 0.0, 0.0
    else:
        accuracy, form = attempt.accuracy(), format_score(attempt.text)
    time = 0.0 if attempt.question_type == "tvg" else window_score(attempt, accuracy, rules)
    return breakdown(rules, accuracy=accuracy, format=form, tool=time)


def format_score(text: str) -> float:
    """1 for a whole rollout in LongVT's form, else 0."""
    text = text.strip()
    pairs = [text.count(f"<{tag}>") - text.count(f"</{tag}>") for tag in ("think", "tool_call")]
    one = text.count(protocol.ANSWER_OPEN) == text.count(protocol.ANSWER_CLOSE) == 1
    if any(pairs) or not one:
        return 0.0
    opened = _OPENINGS.findall(text)
    calls = opened.count("tool_call")
    if calls == 0:
        return float(names(text) == ["think", "answer"])
    framed = text.startswith(protocol.THINK_OPEN) and text.endswith(protocol.ANSWER_CLOSE)
    return float(framed and opened == ["think", *["tool_call", "think"] * calls, "answer"])


def window_score(attempt: Attempt, accuracy: float, rules: RewardRules) -> float:
    """R_time in [0, 1]; 0 unless a call ran."""
    if not attempt.executed_calls:
        return 0.0
    if rules.window_term == "tool":
        return float(accuracy >= 0.5)
    window = asked_window(attempt.calls[-1]) if attempt.calls else None
    overlaps = overlap([window] if window else [], attempt.evidence)
    iou = overlaps.hull_iou if rules.compat == "reference" else overlaps.iou
    return {"iou": iou, "recall": overlaps.iog, "none": 0.0}[rules.window_term]


SCHEME = Scheme(score, ranges, reads=("compat", "mode", "window_term"), call_syntax="tool_call")
