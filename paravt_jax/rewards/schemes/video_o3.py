"""Video-o3's rewards (arXiv 2601.23224; code at 59e67cf): the trajectory guides the reward.

    R = r_a (1 + beta) + r_f,    beta = (b0 + w_g S) * gamma if r_a = r_f = 1, else 0

* r_a: a strict letter, "B", "B. .." or "(B) ..". Other questions as elsewhere: `mode`, or IoU.
* r_f: every turn but the last is `<think>..</think><grounding>..</grounding>`, the last ends with
  `<answer>..</answer>`, at most one line break between; another form gives 0. Each fault in the
  JSON of a grounding (no `temporal_segment` of two rising numbers; no `sampling_strategy` coarse,
  medium or fine) costs 1 / turns.
* b0 = w_g = 1/2; S compares all asked windows with the clues; gamma takes back 1 - d (k - 1) for
  k grounding turns, d = 0.05. By kind of question (`bonus`):

      clue_single_w_tool     (S + 1)/2 * (1 - d (k - 1))   S = (IoU + IoP + IoG + (DIoU + 1)/2) / 4
      clue_multi_w_tool      (S + 1)/2                     S = (2 IoU + IoP + IoG) / 4
      clue_single_wo_tool    3/4 * (1 - 2 d k)
      clue_multi_wo_tool     1/2                           also free form
      temporal_grounded_qa   3/4 * (1 - d (k - 1))
      temporal_grounding     0                             R = IoU + r_f

  The first two and `temporal_grounded_qa` need k > 0. S is 0 if either side is empty.

`tool` is r_a * beta; the terms `clue` (S), `iou`, `iop`, `iog`, `diou` and `bonus` (beta) are
shown. The kind is the row's question type if that is one of these names; else "tvg" is
`temporal_grounding`, and the rest goes by the evidence: one window, several, or none (free form).

Chosen here: a body that is no JSON object has both faults; the centres of DIoU are those of each
side's hull; the decay ends at 0; and groundings count only if a call ran (`executed_calls`). With
`compat="reference"` the last two are as in the source: no end, and whatever the text says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from paravt_jax.protocol import TURN_END, Window, parse_seconds
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.overlap import Overlap, overlap, proper
from paravt_jax.rewards.rules import (
    UNIT,
    Ranges,
    RewardBreakdown,
    RewardRules,
    Scheme,
    breakdown,
    total_range,
)
from paravt_jax.rewards.tag_blocks import blocks
from paravt_jax.windows import STRATEGIES

KINDS = (
    "clue_single_w_tool",
    "clue_multi_w_tool",
    "clue_single_wo_tool",
    "clue_multi_wo_tool",
    "temporal_grounded_qa",
    "temporal_grounding",
    "free_form",
)
"""Kinds of question, by the names of the source's data."""

_DECAY = 0.05
_LETTER = re.compile(r"\A(?:([A-Z])(?:\.|\Z)|\(([A-Z])\))")
_LINE_BREAK = r"\n?"


def ranges(rules: RewardRules) -> Ranges:
    """Least and greatest value of each term."""
    bonus = UNIT if rules.compat == "fixed" else (-math.inf, 1.0)
    shares = dict.fromkeys(("clue", "iou", "iop", "iog"), UNIT)
    parts = total_range(rules, {"accuracy": UNIT, "format": UNIT, "tool": bonus})
    return parts | shares | {"diou": (-1.0, 1.0), "bonus": bonus}


def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    """Reward by term."""
    kind, accuracy = kind_of(attempt), accuracy_score(attempt, rules)
    form, windows = format_score(attempt.turns)
    turns = len(attempt.turns) - 1
    # Text alone earns nothing: a model writes groundings that never ran.
    if rules.compat == "fixed" and not attempt.executed_calls:
        windows, turns = [], 0
    overlaps = overlap(windows, attempt.evidence)
    clue = clue_score(kind, overlaps) if windows and attempt.evidence else 0.0
    beta = bonus(kind, turns, clue) if accuracy == form == 1.0 else 0.0
    if rules.compat == "fixed":
        beta = max(beta, 0.0)
    return breakdown(
        rules,
        accuracy=accuracy,
        format=form,
        tool=accuracy * beta,
        shown={
            "clue": clue,
            "iou": overlaps.iou,
            "iop": overlaps.iop,
            "iog": overlaps.iog,
            "diou": overlaps.diou,
            "bonus": beta,
        },
    )


def kind_of(attempt: Attempt) -> str:
    """Which row of the table a question belongs to."""
    if attempt.question_type in KINDS:
        return attempt.question_type
    if attempt.question_type == "tvg":
        return "temporal_grounding"
    if not attempt.evidence:
        return "free_form"
    return "clue_single_w_tool" if len(attempt.evidence) == 1 else "clue_multi_w_tool"


def accuracy_score(attempt: Attempt, rules: RewardRules) -> float:
    """r_a: a strict letter; other questions as `Attempt.accuracy` judges them."""
    kind = attempt.question_type
    if kind == "temporal_grounding":
        return attempt.accuracy(question_type="tvg")
    if kind == "mcq" or kind in KINDS[:-1]:
        return float(
            bool(attempt.prediction) and _letter(attempt.prediction) == _letter(attempt.answer)
        )
    return attempt.accuracy()


def _letter(text: str) -> str:
    """The option that a text begins with; the text itself if it begins with none."""
    match = _LETTER.match(text.strip())
    return match[1] or match[2] if match else text.strip()


def format_score(turns: Sequence[str]) -> tuple[float, list[Window]]:
    """r_f in [0, 1], and the windows that the groundings ask for."""
    windows, faults = [], 0
    for number, turn in enumerate(turns, 1):
        last = "answer" if number == len(turns) else "grounding"
        parts = blocks(turn.replace(TURN_END, ""), _LINE_BREAK) or []
        if [name for name, _ in parts] != ["think", last]:
            return 0.0, []
        if last == "grounding":
            window, wrong = read_grounding(parts[-1][1])
            windows += [window] if window else []
            faults += wrong
    return (max(1.0 - faults / len(turns), 0.0), windows) if turns else (0.0, [])


def read_grounding(body: str) -> tuple[Window | None, int]:
    """The window that a grounding asks for, if any, and how many faults its JSON has (0 to 2)."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict):
        return None, 2
    window = _segment(call.get("temporal_segment"))
    return window, (window is None) + (call.get("sampling_strategy") not in STRATEGIES)


def _segment(value: Any) -> Window | None:
    if not isinstance(value, list) or len(value) != 2 or any(isinstance(x, str) for x in value):
        return None
    return proper(*map(parse_seconds, value))


def clue_score(kind: str, overlaps: Overlap) -> float:
    """S in [0, 1]; only `clue_single_w_tool` looks at the distance of the centres."""
    if kind == "clue_single_w_tool":
        return (overlaps.iou + overlaps.iop + overlaps.iog + (overlaps.diou + 1) / 2) / 4
    return (2 * overlaps.iou + overlaps.iop + overlaps.iog) / 4


def bonus(kind: str, turns: int, clue: float) -> float:
    """beta of a right and well-formed rollout with this many grounding turns."""
    decay = 1 - _DECAY * (turns - 1)
    if kind == "clue_single_wo_tool":
        return 0.75 * (1 - 2 * _DECAY * turns)
    if kind in ("clue_multi_wo_tool", "free_form"):
        return 0.5
    if kind == "temporal_grounding" or turns == 0:
        return 0.0
    if kind == "temporal_grounded_qa":
        return 0.75 * decay
    return (clue + 1) / 2 * (decay if kind == "clue_single_w_tool" else 1.0)


SCHEME = Scheme(score, ranges, reads=("compat", "mode"), call_syntax="grounding")
