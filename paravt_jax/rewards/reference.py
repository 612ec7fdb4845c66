"""The rewards of the ParaVT release (commit cf55249), faults included.

For comparison and for reproducing its curves; `paravt_jax.rewards.schemes.paravt` corrects them.
Tags are case-sensitive and matched without greed, over lines.
"""

from __future__ import annotations

import json
import re

from paravt_jax import protocol
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.judge import Judge, judge_message
from paravt_jax.rewards.metrics import f1, interval_iou
from paravt_jax.rewards.rules import (
    ANCHOR,
    THINK_MIN_CHARS,
    UNIT,
    Ranges,
    RewardBreakdown,
    RewardRules,
    total_range,
    turn_anchor,
)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_CALL_BODY = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
_CODE_BODY = re.compile(r"<tool_code>(.*?)(?:</tool_code>|$)", re.DOTALL)
_THINK_CLOSED = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_THINK_OPEN = re.compile(r"<think>(.*?)(?:<tool_|<answer>|<\|im_end\|>|$)", re.DOTALL)
_PAIR = re.compile(r"\[?\s*([\d.]+)\s*,\s*([\d.]+)\s*\]?")
_CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        r"^\(?([A-D])\)?$",
        r"[Tt]he answer is\s*\(?([A-D])\)?",
        r"[Oo]ption\s*\(?([A-D])\)?",
        r"^([A-D])[.):]",
        r"\b([A-D])\b",
    )
)
_PAIRED_TAGS = ("think", "tool_call", "tool_code", "answer")


def ranges(rules: RewardRules) -> Ranges:
    """Least and greatest value of each term. The format can be negative, and a response that the
    policy made up itself lifts the tool term from 0.6 to 0.8."""
    lowest = -0.3 * max(rules.anchor_weight, 0.0)
    parts = {"accuracy": UNIT, "format": (lowest, 1.0), "tool": (0.0, 0.8)}
    bare = total_range(rules, {**parts, "format": UNIT})
    return total_range(rules, parts) | {"anchor": ANCHOR, "task": bare["task"]}


def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    """Accuracy + format_weight * format + tool, as released: tool use is read from the text.

    Raises:
        ValueError: an interval holds something like "1.2.3".
    """
    completion = attempt.completion
    if completion.count(protocol.TURN_START) >= 5 and len(completion) < 300:
        return RewardBreakdown(0.0, 0.0, 0.0, 0.0)
    prediction = extract_answer(completion)
    accuracy = _accuracy(prediction, attempt)
    form, tool = format_score(completion, rules), tool_score(completion, accuracy)
    base = format_score(completion, rules, with_anchor=False)
    return RewardBreakdown(
        total=accuracy + rules.format_weight * form + tool,
        accuracy=accuracy,
        format=form,
        tool=tool,
        anchor=_anchor(completion),
        task=accuracy + rules.format_weight * base + tool,
    )


def extract_answer(completion: str) -> str:
    """First `<answer>`; else what follows the first `</think>`; else the last line of words."""
    match = _ANSWER.search(completion)
    if match:
        return match.group(1).strip()
    tail = completion.partition(protocol.THINK_CLOSE)[2]
    for tag in ("tool_call", "tool_code", "tool_response"):
        tail = re.sub(rf"<{tag}>.*?</{tag}>", "", tail, flags=re.DOTALL)
    tail = tail.replace(protocol.TURN_END, "").replace(protocol.TURN_START, "").strip()
    lines = [line.strip() for line in completion.splitlines()]
    words = [line for line in lines if line and not line.startswith(("<|im_", "<tool_"))]
    return tail or (words[-1] if words else "")


def normalize_text(text: str) -> str:
    """Lower case without articles, punctuation and repeated white space."""
    text = re.sub(r"\b(a|an|the)\b", " ", text.strip().lower())
    return " ".join(re.sub(r"[^\w\s]", "", text).split())


def compute_f1(prediction: str, answer: str) -> float:
    """F1 with the overlap counted as a set and the lengths as lists."""
    predicted, expected = normalize_text(prediction).split(), normalize_text(answer).split()
    return f1(len(set(predicted) & set(expected)), len(predicted), len(expected))


def compute_mcq_acc(prediction: str, answer: str) -> float:
    """1 if any of five patterns first matches at the letter A-D of the answer."""
    letter = answer.strip().upper()
    if letter not in ("A", "B", "C", "D"):
        return 0.0
    prediction = prediction.strip()
    matches = [pattern.search(prediction) for pattern in _CHOICES]
    letters = {prediction.upper()} | {match.group(1) for match in matches if match}
    return float(letter in letters)


def compute_temporal_iou(prediction: str, answer: str) -> float:
    """IoU of the first comma-separated pairs; 0 where there is none.

    Raises:
        ValueError: a pair holds something like "1.2.3".
    """
    pairs = [_PAIR.search(prediction), _PAIR.search(answer)]
    if None in pairs:
        return 0.0
    a, b = [(float(pair.group(1)), float(pair.group(2))) for pair in pairs if pair]
    return interval_iou(a, b)


def has_parseable_tool_call(completion: str) -> bool:
    """A JSON object with "name" in a call block, or a line with "(" in a code block."""
    return any(map(_names_a_tool, _CALL_BODY.findall(completion))) or any(
        "(" in line and not line.strip().startswith("#")
        for body in _CODE_BODY.findall(completion)
        if not body.strip().startswith(protocol.TURN_END)
        for line in body.splitlines()
    )


def has_substantive_think(completion: str) -> bool:
    """Whether the first closed, else the first open, `<think>` holds ten characters."""
    match = _THINK_CLOSED.search(completion) or _THINK_OPEN.search(completion)
    return match is not None and len(match.group(1).strip()) >= THINK_MIN_CHARS


def has_nonempty_answer(completion: str) -> bool:
    """Whether any `<answer>` pair has something in it."""
    return any(body.strip() for body in _ANSWER.findall(completion))


def think_before_tool(completion: str) -> bool:
    """Whether `<think>` occurs before the first opening tag of a call."""
    tools = [completion.find(tag) for tag in (protocol.CALL_OPEN, protocol.CODE_OPEN)]
    first = min((place for place in tools if place >= 0), default=-1)
    return 0 <= completion.find(protocol.THINK_OPEN) < first


def format_score(completion: str, rules: RewardRules, with_anchor: bool = True) -> float:
    """Format score, at most 1; can be negative. Additions in the order of the release."""
    thinks, answers = has_substantive_think(completion), has_nonempty_answer(completion)
    result = (0.2 if rules.answer_suffix else 0.3) * thinks
    for part in (0.3, 0.2) if rules.answer_suffix else (0.2, 0.1):
        result += part * answers
    if with_anchor and rules.anchor_weight > 0:
        result += rules.anchor_weight * _anchor(completion)
    if thinks and has_parseable_tool_call(completion) and think_before_tool(completion):
        result += 0.3
    if result > 0 and _balanced(completion):
        result += 0.1
    return min(result, 1.0)


def tool_score(completion: str, accuracy: float) -> float:
    """Credit for a call that parses, one that seems to have run, and any accuracy above 0."""
    if not has_parseable_tool_call(completion):
        return 0.0
    base = 0.3 if protocol.RESPONSE_OPEN in completion else 0.1
    return min(base + 0.5 * (accuracy > 0), 1.0)


def _accuracy(prediction: str, attempt: Attempt) -> float:
    answer = attempt.answer
    if not prediction or not answer:
        return 0.0
    if normalize_text(prediction) == normalize_text(answer):
        return 1.0
    if attempt.question_type == "mcq":
        return compute_mcq_acc(prediction, answer)
    if attempt.question_type == "tvg":
        return compute_temporal_iou(prediction, answer)
    if attempt.mode == "exact":
        return 0.0
    if attempt.mode == "llm" and attempt.judge is not None:
        return _judged(attempt.judge, attempt.question, prediction, answer)
    return compute_f1(prediction, answer)


def _judged(judge: Judge, question: str, prediction: str, answer: str) -> float:
    """First digits of the reply, clamped to [0, 1]; F1 on any failure."""
    try:
        match = re.search(r"[\d.]+", judge(judge_message(question, prediction, answer)).strip())
        return min(max(float(match.group()), 0.0), 1.0) if match else compute_f1(prediction, answer)
    except Exception:  # A judge is somebody else's service; its failure must not stop a run.
        return compute_f1(prediction, answer)


def _anchor(completion: str) -> float:
    return turn_anchor(
        opened=protocol.THINK_OPEN in completion,
        closed=protocol.THINK_CLOSE in completion,
        thinks=has_substantive_think(completion),
        acts=has_nonempty_answer(completion),
    ).total


def _balanced(completion: str) -> bool:
    counts = [(completion.count(f"<{t}>"), completion.count(f"</{t}>")) for t in _PAIRED_TAGS]
    return all(opened == closed for opened, closed in counts)


def _names_a_tool(body: str) -> bool:
    try:
        call = json.loads(body.strip())
    except (ValueError, RecursionError):
        return False
    return isinstance(call, dict) and "name" in call
