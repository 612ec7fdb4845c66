"""ParaVT's rewards (arXiv 2605.20342), those that train: the released ones, corrected.

    R = R_accuracy + format_weight * R_format + R_tool

A rollout is a list of assistant turns, forced prefixes included. All but the last ought to call
tools, the last ought to answer. `compat="reference"` is the release as it is (`reference`).
Corrected are (numbers as in the project's list of defects; `tests/unit/test_reward_defects.py`
shows each one in both readings):

* R4 forced prefixes count: each turn is judged with its own.
* R9, R10 tool credit needs a call that ran, counted by the workflow and not read from text; the
  bonus is proportional to the accuracy instead of all or nothing.
* R11 nothing saturates: the format score is divided by what its rules can give, so that every
  fault costs and a perfect rollout gets exactly 1, and the total is not clipped.
* R17 a malformed call costs its own turn; R18, R23 actions are read after the last `</think>`, and
  the last answer counts; R24 every turn's thinking is judged.
* R19 the format term cannot be negative.
* R20 F1 counts repeated words; R21 option letters are read as letters, "A" is no article; R22
  intervals may be written "36 to 40 seconds", "0:36-0:40", "[36, 40]", and never raise.
* R25 a judge's reply outside [0, 1] is no verdict.
* A letter that the answer denies ("The answer is not B.") is no choice.

What pays for hedging by the published rules, F1 for a list of all answers and tool credit for
calls that look at nothing, stays as published, so that rewards can be compared with the paper's;
`mode="precise"` and `fresh_seconds` are the switches beside it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from paravt_jax import protocol
from paravt_jax.rewards import reference
from paravt_jax.rewards.answers import ANY_TAG, answer_bodies
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.rules import (
    ANCHOR,
    THINK_MIN_CHARS,
    UNIT,
    Ranges,
    RewardBreakdown,
    RewardRules,
    Scheme,
    TurnAnchor,
    total_range,
    turn_anchor,
)

_ACTION = re.compile(r"<tool_call>|<tool_code>|<grounding>|<answer>")
_PAIRED_TAGS = ("think", "tool_call", "tool_code", "grounding", "tool_response", "answer")


def ranges(rules: RewardRules) -> Ranges:
    """Least and greatest value of each term."""
    if rules.compat == "reference":
        return reference.ranges(rules)
    tool = (0.0, rules.tool_base + rules.tool_bonus)
    parts = {"accuracy": UNIT, "format": UNIT, "tool": tool}
    return total_range(rules, parts) | {"anchor": ANCHOR}


def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    """Reward by term; the format and the anchor are means over turns.

    Raises:
        ValueError: with compat="reference", where the release raises: an interval such as
            "1.2.3, 5".
    """
    if rules.compat == "reference":
        return reference.score(attempt, rules)
    accuracy = attempt.accuracy()
    forms = _turn_forms(attempt.turns, attempt.call_syntax)
    form_mean = _mean([form.score(rules) for form in forms])
    # Scored anew, not by subtraction: each turn is clamped, and its measure, what a perfect turn
    # earns, holds the anchor too.
    bare_rules = dataclasses.replace(rules, anchor_weight=0.0)
    bare = _mean([form.score(bare_rules) for form in forms])
    counted = attempt.counted_calls(rules.fresh_seconds) / max(attempt.executed_calls, 1)
    tool = (rules.tool_base + rules.tool_bonus * accuracy) * counted
    return RewardBreakdown(
        total=accuracy + rules.format_weight * form_mean + tool,
        accuracy=accuracy,
        format=form_mean,
        tool=tool,
        anchor=_mean([form.anchor.total for form in forms]),
        task=accuracy + rules.format_weight * bare + tool,
    )


def turn_anchors(turns: Sequence[str], call_syntax: str = "tool_call") -> list[TurnAnchor]:
    """The anchor of each turn by itself, in its parts: what credit at positions is made of
    (`objective.anchor=position`), whatever `RewardRules.compat` says of the total.

    Args:
        turns: assistant turns, forced prefixes included.
        call_syntax: how calls are written, a name of `protocol.SYNTAXES`.
    """
    return [form.anchor for form in _turn_forms(turns, call_syntax)]


@dataclasses.dataclass(frozen=True)
class _TurnForm:
    """What the format score sees of one turn."""

    opened: bool
    """It holds `<think>`."""
    closed: bool
    """It holds `</think>`."""
    thinks: bool
    """Its thinking has substance."""
    acts: bool
    """It does what its place asks for: valid calls, or in the last turn an answer."""
    strict: bool
    """It parses to the letter."""
    balanced: bool
    """Every tag is opened as often as it is closed."""

    @property
    def anchor(self) -> TurnAnchor:
        return turn_anchor(self.opened, self.closed, self.thinks, self.acts)

    def score(self, rules: RewardRules) -> float:
        """What the turn earns over what a perfect turn earns, clamped to [0, 1]."""
        return min(max(self.earned(rules) / _PERFECT.earned(rules), 0.0), 1.0)

    def earned(self, rules: RewardRules) -> float:
        """Weights of the release: think 0.2 (0.3 without answer suffix), act 0.5 (0.3), order 0.3,
        balance 0.1, and the anchor times its weight. Order, in the release thinking before a
        call, is here the strict parse of the turn.
        """
        think, act = (0.2, 0.5) if rules.answer_suffix else (0.3, 0.3)
        return (
            think * self.thinks
            + act * self.acts
            + 0.3 * (self.strict and self.thinks and self.acts)
            + 0.1 * (self.balanced and (self.thinks or self.acts))
            + rules.anchor_weight * self.anchor.total
        )


_PERFECT = _TurnForm(opened=True, closed=True, thinks=True, acts=True, strict=True, balanced=True)


def _turn_forms(turns: Sequence[str], syntax: str) -> list[_TurnForm]:
    last = len(turns) - 1
    return [_turn_form(turn, at == last, syntax) for at, turn in enumerate(turns)]


def _turn_form(turn: str, last: bool, syntax: str) -> _TurnForm:
    return _TurnForm(
        opened=protocol.THINK_OPEN in turn,
        closed=protocol.THINK_CLOSE in turn,
        thinks=_has_substance(turn),
        acts=any(map(str.strip, answer_bodies(turn))) if last else _calls(turn, syntax),
        strict=protocol.parses_strictly(turn, syntax=syntax),
        balanced=all(turn.count(f"<{tag}>") == turn.count(f"</{tag}>") for tag in _PAIRED_TAGS),
    )


def _has_substance(turn: str) -> bool:
    """Whether any `<think>` holds some length of text; an unclosed one ends at the first action."""
    for piece in turn.split(protocol.THINK_OPEN)[1:]:
        thought, closed, _ = piece.partition(protocol.THINK_CLOSE)
        thought = thought if closed else _ACTION.split(thought)[0]
        if len(ANY_TAG.sub("", thought).strip()) >= THINK_MIN_CHARS:
            return True
    return False


def _calls(turn: str, syntax: str) -> bool:
    calls = protocol.parse_tool_calls(turn, syntax=syntax)
    return bool(calls) and all(call.error is None for call in calls)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


SCHEME = Scheme(
    score,
    ranges,
    reads=(
        "compat",
        "answer_suffix",
        "anchor_weight",
        "mode",
        "tool_base",
        "tool_bonus",
        "fresh_seconds",
    ),
)
