"""The rewards that train: those of the release with its defects corrected.

A rollout is a list of assistant turns, forced prefixes included. All but the last ought to call
tools, the last ought to answer. See `paravt_jax.rewards.score` for the list of corrections.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from paravt_jax import protocol
from paravt_jax.rewards.metrics import choice_accuracy, normalise, temporal_iou, token_f1
from paravt_jax.rewards.rules import (
    THINK_MIN_CHARS,
    Judge,
    RewardBreakdown,
    RewardRules,
    anchor_term,
    judge_message,
)

_TURN_BREAK = re.compile(r"<\|im_end\|>|(?<=</tool_call>)\s*(?=<think>)")
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_TOOL_BLOCK = re.compile(r"<(tool_call|tool_code|tool_response)>.*?(?:</\1>|\Z)", re.DOTALL)
_ANY_TAG = re.compile(r"</?(?:think|answer|tool_call|tool_code|tool_response)>|<\|im_\w+\|>")
_ACTION = re.compile(r"<tool_call>|<tool_code>|<answer>")
_PAIRED_TAGS = ("think", "tool_call", "tool_code", "tool_response", "answer")


def split_turns(completion: str) -> list[str]:
    """Assistant turns of a completion: apart at `<|im_end|>`, and where a new `<think>` follows a
    closed call. Pieces of white space are no turns."""
    return [turn for turn in _TURN_BREAK.split(completion) if turn.strip()]


def score(
    turns: Sequence[str],
    answer: str,
    question_type: str,
    rules: RewardRules,
    executed_calls: int,
    question: str,
    judge: Judge | None,
) -> RewardBreakdown:
    """Reward by term; the format and the anchor are means over turns."""
    if rules.mode == "llm" and question_type not in ("mcq", "tvg"):
        accuracy = _judged(judge, question, extract_answer(turns), answer)
    else:
        accuracy = accuracy_score(extract_answer(turns), answer, question_type, rules.mode)
    forms = [_turn_form(turn, last=i == len(turns) - 1) for i, turn in enumerate(turns)]
    form_mean = _mean([form.score(rules) for form in forms])
    bare_rules = dataclasses.replace(rules, anchor_weight=0.0)
    bare = _mean([form.score(bare_rules) for form in forms])
    tool = (rules.tool_base + rules.tool_bonus * accuracy) if executed_calls > 0 else 0.0
    return RewardBreakdown(
        total=accuracy + rules.format_weight * form_mean + tool,
        accuracy=accuracy,
        format=form_mean,
        tool=tool,
        anchor=_mean([form.anchor for form in forms]),
        task=accuracy + rules.format_weight * bare + tool,
    )


def extract_answer(turns: Sequence[str]) -> str:
    """What the last turn answers, or "".

    After the last `</think>` (in all of the turn if there is none): the last `<answer>`; else,
    without calls, all that is said after the thinking; else, without thinking, the last line.
    """
    if not turns:
        return ""
    said = protocol.after_thinking(turns[-1])
    answers = _ANSWER.findall(said)
    if answers:
        return answers[-1].strip()
    words = _ANY_TAG.sub("\n", _TOOL_BLOCK.sub("\n", said)).strip()
    if protocol.THINK_CLOSE in turns[-1] or not words:
        return words
    return words.splitlines()[-1].strip()


def accuracy_score(found: str, answer: str, question_type: str, mode: str) -> float:
    """Accuracy in [0, 1] of an extracted answer; 0 if it or the ground truth is empty."""
    if not found.strip() or not answer.strip():
        return 0.0
    if question_type == "mcq":
        return choice_accuracy(found, answer)
    if question_type == "tvg":
        return temporal_iou(found, answer)
    if found.strip() == answer.strip() or (
        normalise(found) and normalise(found) == normalise(answer)
    ):
        return 1.0
    return 0.0 if mode == "exact" else token_f1(found, answer)


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
    def anchor(self) -> float:
        return anchor_term(self.opened, self.closed, self.thinks, self.acts)

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
            + rules.anchor_weight * self.anchor
        )


_PERFECT = _TurnForm(opened=True, closed=True, thinks=True, acts=True, strict=True, balanced=True)


def _turn_form(turn: str, last: bool) -> _TurnForm:
    return _TurnForm(
        opened=protocol.THINK_OPEN in turn,
        closed=protocol.THINK_CLOSE in turn,
        thinks=_has_substance(turn),
        acts=_answers(turn) if last else _calls(turn),
        strict=protocol.parses_strictly(turn),
        balanced=all(turn.count(f"<{tag}>") == turn.count(f"</{tag}>") for tag in _PAIRED_TAGS),
    )


def _has_substance(turn: str) -> bool:
    """Whether any `<think>` holds some length of text; an unclosed one ends at the first action."""
    for piece in turn.split(protocol.THINK_OPEN)[1:]:
        thought, closed, _ = piece.partition(protocol.THINK_CLOSE)
        thought = thought if closed else _ACTION.split(thought)[0]
        if len(_ANY_TAG.sub("", thought).strip()) >= THINK_MIN_CHARS:
            return True
    return False


def _answers(turn: str) -> bool:
    return any(body.strip() for body in _ANSWER.findall(protocol.after_thinking(turn)))


def _calls(turn: str) -> bool:
    calls = protocol.parse_tool_calls(turn)
    return bool(calls) and all(call.error is None for call in calls)


def _judged(judge: Judge | None, question: str, found: str, answer: str) -> float:
    """1 for equal words, else the first number of the judge's reply, else F1.

    A number outside [0, 1] is no verdict.
    """
    fallback = accuracy_score(found, answer, "oe", "f1")
    equal = accuracy_score(found, answer, "oe", "exact") == 1.0
    if judge is None or equal or not found.strip() or not answer.strip():
        return fallback
    try:
        match = re.search(r"-?\d+(?:\.\d+)?", judge(judge_message(question, found, answer)))
    except Exception:  # A judge is somebody else's service; its failure must not stop a run.
        return fallback
    verdict = float(match.group()) if match else -1.0
    return verdict if 0.0 <= verdict <= 1.0 else fallback


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
