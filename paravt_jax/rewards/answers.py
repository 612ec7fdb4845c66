"""What a rollout answers, and how right that is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paravt_jax import protocol
from paravt_jax.rewards.judge import Judge, judge_message, verdict
from paravt_jax.rewards.metrics import (
    choice_accuracy,
    normalise,
    precise_f1,
    temporal_iou,
    token_f1,
)

_TURN_BREAK = re.compile(r"<\|im_end\|>|(?:(?<=</tool_call>)|(?<=</grounding>))\s*(?=<think>)")
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_TOOL_BLOCK = re.compile(
    r"<(tool_call|tool_code|grounding|tool_response)>.*?(?:</\1>|\Z)", re.DOTALL
)
ANY_TAG = re.compile(
    r"</?(?:think|answer|tool_call|tool_code|grounding|tool_response)>|<\|im_\w+\|>"
)


def split_turns(completion: str) -> list[str]:
    """Assistant turns of a completion: apart at `<|im_end|>`, and where a new `<think>` follows a
    closed call. Pieces of white space are no turns."""
    return [turn for turn in _TURN_BREAK.split(completion) if turn.strip()]


def answer_bodies(turn: str) -> list[str]:
    """What stands in the `<answer>` pairs after the last `</think>` of a turn."""
    return _ANSWER.findall(protocol.after_thinking(turn))


def extract_answer(turns: Sequence[str]) -> str:
    """What the last turn answers, or "".

    After the last `</think>` (in all of the turn if there is none): the last `<answer>`; else,
    without calls, all that is said after the thinking; else, without thinking, the last line.
    """
    if not turns:
        return ""
    answers = answer_bodies(turns[-1])
    if answers:
        return answers[-1].strip()
    text = protocol.after_thinking(turns[-1])
    words = ANY_TAG.sub("\n", _TOOL_BLOCK.sub("\n", text)).strip()
    if protocol.THINK_CLOSE in turns[-1] or not words:
        return words
    return words.splitlines()[-1].strip()


def accuracy_score(prediction: str, answer: str, question_type: str, mode: str) -> float:
    """Accuracy in [0, 1] of an extracted answer; 0 if it or the ground truth is empty."""
    if not prediction.strip() or not answer.strip():
        return 0.0
    if question_type == "mcq":
        return choice_accuracy(prediction, answer)
    if question_type == "tvg":
        return temporal_iou(prediction, answer)
    if prediction.strip() == answer.strip() or (
        normalise(prediction) and normalise(prediction) == normalise(answer)
    ):
        return 1.0
    if mode == "exact":
        return 0.0
    return precise_f1(prediction, answer) if mode == "precise" else token_f1(prediction, answer)


def judged_accuracy(judge: Judge | None, question: str, prediction: str, answer: str) -> float:
    """1 for equal words, else the judge's verdict, else F1.

    F1 also decides if the judge raises, or if its reply holds no number in [0, 1].
    """
    fallback = accuracy_score(prediction, answer, "oe", "f1")
    equal = accuracy_score(prediction, answer, "oe", "exact") == 1.0
    # Equal or empty ones cost no request: a step has hundreds of answers.
    if judge is None or equal or not prediction.strip() or not answer.strip():
        return fallback
    try:
        decided = verdict(judge(judge_message(question, prediction, answer)))
    except Exception:  # A judge is somebody else's service; its failure must not stop a run.
        return fallback
    return fallback if decided is None else decided
