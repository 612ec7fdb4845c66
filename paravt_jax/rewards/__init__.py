"""Rewards of a rollout, by term, from its text: accuracy, format, tool, anchor.

    R = R_accuracy + w_format * R_format + R_tool            (ParaVT, arXiv 2605.20342)

`RewardRules.compat` chooses between two readings of the terms. `"reference"` is the ParaVT
release (commit cf55249) to the digit, faults included; `"fixed"`, the default, corrects them.
"""

from __future__ import annotations

from collections.abc import Sequence

from paravt_jax.rewards import fixed, reference
from paravt_jax.rewards.rules import Judge, RewardBreakdown, RewardRules, judge_message

__all__ = ["DEFAULT_RULES", "Judge", "RewardBreakdown", "RewardRules", "judge_message", "score"]

DEFAULT_RULES = RewardRules()
"""PARA-GRPO, corrected."""


def score(
    completion: str,
    answer: str,
    question_type: str = "oe",
    rules: RewardRules = DEFAULT_RULES,
    *,
    turns: Sequence[str] | None = None,
    executed_calls: int | None = None,
    question: str = "",
    judge: Judge | None = None,
) -> RewardBreakdown:
    """Reward of one rollout, by term.

    With `compat="fixed"` any text is scored without an exception, accuracy and format lie in
    [0, 1] and the tool term in [0, tool_base + tool_bonus]. Corrected defects of the release
    (numbers as in the project's list of them):

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

    Args:
        completion: assistant text of all turns, forced prefixes included, tool responses excluded.
        answer: ground truth: words, an option letter, or an interval in seconds.
        question_type: "oe", "mcq" or "tvg"; anything else is judged as "oe".
        rules: weights and switches.
        turns: the turns of `completion` one by one. None splits at `<|im_end|>` and wherever a
            new `<think>` follows a closed call. Not used by compat="reference".
        executed_calls: tool calls that ran to a result; None gives no tool credit. Not used by
            compat="reference", which reads tool use from the text.
        question: put to the judge; only for mode="llm".
        judge: takes a user message and returns a reply; needed for mode="llm". If it raises, or
            its reply holds no number, F1 is used.

    Raises:
        ValueError: mode="llm" without a judge. With compat="reference" also where the release
            raises: an interval such as "1.2.3, 5".
    """
    if rules.mode == "llm" and judge is None:
        raise ValueError("mode='llm' needs a judge; pass judge=..., or use mode='f1'")
    if rules.compat == "reference":
        return reference.score(completion, answer, question_type, rules, question, judge)
    turns = fixed.split_turns(completion) if turns is None else turns
    return fixed.score(turns, answer, question_type, rules, executed_calls or 0, question, judge)
