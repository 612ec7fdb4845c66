"""Rewards of a rollout, by term, from what it said and did.

    R = R_accuracy + w_format * R_format + R_tool            (ParaVT, arXiv 2605.20342)

`RewardRules.scheme` chooses whose rewards: ParaVT's, or those of a related system, each a module
of this package. `RewardRules.compat` chooses between two readings: `"reference"` is the released
code (ParaVT's at commit cf55249 to the digit), faults included; `"fixed"`, the default, corrects
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from paravt_jax.protocol import parse_tool_calls
from paravt_jax.records import ToolCall
from paravt_jax.rewards import deepvideo_r1, fixed, longvt, reference, video_o3, visd, vital
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.fixed import turn_anchors
from paravt_jax.rewards.judge import JudgeSettings, LlmJudge, open_judge
from paravt_jax.rewards.rules import SCHEMES, Ranges, RewardBreakdown, RewardRules, TurnAnchor
from paravt_jax.rewards.verdicts import Judge, judge_message

__all__ = [
    "DEFAULT_RULES",
    "SCHEMES",
    "Judge",
    "JudgeSettings",
    "LlmJudge",
    "RewardBreakdown",
    "RewardRules",
    "TurnAnchor",
    "judge_message",
    "open_judge",
    "ranges",
    "score",
    "turn_anchors",
]

DEFAULT_RULES = RewardRules()
"""PARA-GRPO, corrected."""

_MODULES = {
    "paravt": fixed,
    "longvt": longvt,
    "vital": vital,
    "deepvideo_r1": deepvideo_r1,
    "video_o3": video_o3,
    "visd": visd,
}


def ranges(rules: RewardRules = DEFAULT_RULES) -> Ranges:
    """Least and greatest value that `score` can give each term, by the names of
    `RewardBreakdown.as_dict`."""
    return _module(rules).ranges(rules)


def score(
    completion: str,
    answer: str,
    question_type: str = "oe",
    rules: RewardRules = DEFAULT_RULES,
    *,
    turns: Sequence[str] | None = None,
    executed_calls: int | None = None,
    calls: Sequence[ToolCall] | None = None,
    call_syntax: str = "tool_call",
    evidence: Sequence[tuple[float | int, float | int]] = (),
    progress: float | int = 1.0,
    question: str = "",
    judge: Judge | None = None,
) -> RewardBreakdown:
    """Reward of one rollout, by term.

    With `compat="fixed"` any text is scored without an exception, and every term lies in its
    range, see `ranges`. Corrected defects of ParaVT's release (numbers as in the project's list of
    them; `tests/unit/test_reward_defects.py` shows each one in both readings):

    * R4 forced prefixes count: `completion` holds them, and each turn is judged with its own.
    * R9, R10 tool credit needs a call that ran, counted by the workflow and not read from text;
      the bonus is proportional to the accuracy instead of all or nothing.
    * R11 nothing saturates: the format score is divided by what its rules can give, so that every
      fault costs and a perfect rollout gets exactly 1, and the total is not clipped.
    * R17 a malformed call costs its own turn; R18, R23 actions are read after the last
      `</think>`, and the last answer counts; R24 every turn's thinking is judged.
    * R19 the format term cannot be negative.
    * R20 F1 counts repeated words; R21 option letters are read as letters, "A" is no article;
      R22 intervals may be written "36 to 40 seconds", "0:36-0:40", "[36, 40]", and never raise.
    * R25 a judge's reply outside [0, 1] is no verdict.
    * A letter that the answer denies ("The answer is not B.") is no choice.

    What pays for hedging by the published rules, F1 for a list of all answers and tool credit for
    calls that look at nothing, stays as published, so that rewards can be compared with the
    papers'; `RewardRules.mode="precise"` and `fresh_seconds` are the switches beside it.

    Args:
        completion: assistant text of all turns, forced prefixes included, tool responses excluded.
        answer: ground truth: words, an option letter, or an interval in seconds.
        question_type: "oe", "mcq" or "tvg"; anything else is judged as "oe".
        rules: whose rewards, weights and switches.
        turns: the turns of `completion` one by one. None splits at `<|im_end|>` and wherever a
            new `<think>` follows a closed call. Not used by ParaVT's compat="reference".
        executed_calls: tool calls that ran to a result; None gives no tool credit. Not used by
            ParaVT's compat="reference", which reads tool use from the text.
        calls: the calls that ran, in order, for rewards that judge where a tool looked. None takes
            the well-formed ones of the text.
        call_syntax: how calls are written, a name of `protocol.SYNTAXES`. ParaVT's
            compat="reference" knows "tool_call" only.
        evidence: windows in seconds where the answer can be seen (`Row.evidence`).
        progress: share of the training that is done, in [0, 1]; scheme="visd" grows strict with it.
        question: put to the judge; only for mode="llm".
        judge: takes a user message and returns a reply; needed for mode="llm". If it raises, or
            its reply holds no number, F1 is used.

    Raises:
        ValueError: mode="llm" without a judge. With ParaVT's compat="reference" also where the
            release raises: an interval such as "1.2.3, 5".
    """
    if rules.mode == "llm" and judge is None:
        raise ValueError("mode='llm' needs a judge; pass judge=..., or use mode='f1'")
    if _module(rules) is reference:
        return reference.score(completion, answer, question_type, rules, question, judge)
    turns = fixed.split_turns(completion) if turns is None else turns
    attempt = Attempt(
        turns=tuple(turns),
        answer=answer,
        question_type=str(question_type),
        question=question,
        evidence=tuple((float(start), float(end)) for start, end in evidence),
        calls=_written_calls(turns, call_syntax) if calls is None else tuple(calls),
        call_syntax=call_syntax,
        executed_calls=executed_calls or 0,
        progress=progress,
        judge=judge,
    )
    return _module(rules).score(attempt, rules)


def _module(rules: RewardRules) -> ModuleType:
    if rules.scheme == "paravt" and rules.compat == "reference":
        return reference
    return _MODULES[rules.scheme]


def _written_calls(turns: Sequence[str], syntax: str) -> tuple[ToolCall, ...]:
    calls = [call for turn in turns for call in parse_tool_calls(turn, syntax=syntax)]
    return tuple(call for call in calls if call.error is None)
