"""Rewards of a rollout, by term, from what it said and did.

    R = R_accuracy + w_format * R_format + R_tool            (ParaVT, arXiv 2605.20342)

`RewardRules.scheme` chooses whose rewards: ParaVT's, those of a related system, each a module of
`schemes`, or a function of your own (`reward_terms`). `RewardRules.compat` chooses between two
readings: `"reference"` is the released code (ParaVT's at commit cf55249 to the digit), faults
included; `"fixed"`, the default, corrects them.
"""

from __future__ import annotations

from collections.abc import Sequence

from paravt_jax.protocol import parse_tool_calls
from paravt_jax.records import ToolCall
from paravt_jax.rewards.answers import split_turns
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.judge import Judge, JudgeSettings, LlmJudge, judge_message, open_judge
from paravt_jax.rewards.own import RewardFunction, reward_terms
from paravt_jax.rewards.rules import (
    Ranges,
    RewardBreakdown,
    RewardRules,
    Scheme,
    TurnAnchor,
    scheme_names,
)

__all__ = [
    "DEFAULT_RULES",
    "Attempt",
    "Judge",
    "JudgeSettings",
    "LlmJudge",
    "Ranges",
    "RewardBreakdown",
    "RewardFunction",
    "RewardRules",
    "Scheme",
    "TurnAnchor",
    "judge_message",
    "open_judge",
    "ranges",
    "reward_terms",
    "scheme_names",
    "score",
]

DEFAULT_RULES = RewardRules()
"""PARA-GRPO, corrected."""


def ranges(rules: RewardRules = DEFAULT_RULES) -> Ranges:
    """Least and greatest value that `score` can give each term, by the names of
    `RewardBreakdown.as_dict`."""
    return rules.definition.ranges(rules)


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

    With `compat="fixed"` any text is scored, and every term lies in its range, see `ranges`.

    Args:
        completion: assistant text of all turns, forced prefixes included, tool responses excluded.
        answer: ground truth: words, an option letter, or an interval in seconds.
        question_type: "oe", "mcq" or "tvg"; anything else is judged as "oe".
        rules: whose rewards, weights and switches.
        turns: the turns of `completion` one by one; None splits it, see `split_turns`. Not used by
            ParaVT's compat="reference".
        executed_calls: tool calls that ran to a result; None gives no tool credit. Not used by
            ParaVT's compat="reference", which reads tool use from the text.
        calls: the calls that ran, in order; None takes the well-formed ones of the text.
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
    turns = split_turns(completion) if turns is None else turns
    attempt = Attempt(
        turns=tuple(turns),
        completion=completion,
        answer=answer,
        question_type=str(question_type),
        question=question,
        evidence=tuple((float(start), float(end)) for start, end in evidence),
        calls=_written_calls(turns, call_syntax) if calls is None else tuple(calls),
        call_syntax=call_syntax,
        executed_calls=executed_calls or 0,
        progress=progress,
        mode=rules.mode,
        judge=judge,
    )
    return rules.definition.score(attempt, rules)


def _written_calls(turns: Sequence[str], syntax: str) -> tuple[ToolCall, ...]:
    calls = [call for turn in turns for call in parse_tool_calls(turn, syntax=syntax)]
    return tuple(call for call in calls if call.error is None)
