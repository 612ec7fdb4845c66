"""VISD's rewards (arXiv 2605.06094; code at 91bb992), those of Open-o3-Video: thinking that says
when.

    R = ans_acc + ans_tiou + thk_temporal_point + thk_temporal_segment + format

* ans_acc, the `accuracy` term: letters 0 or 1, open answers the mean of ROUGE-1, -2 and -L.
* ans_tiou: IoU of the interval in the answer ("From <t>2</t>s to <t>5</t>s") with the ground truth.
  Where the question asks for a window alone, it is the `accuracy` term. With `grounded=True`
  answers in words or options name a window too, judged by the evidence, in a term of its own.
* thk_temporal_point: mean over the times `<t>..</t>s` of the thinking of exp(-dt^2 / (2 s^2)), dt
  to the nearest evidence, s = 4 (1 - p) while p < 0.75 and 1 from there on, p the share of the
  training that is done. For questions whose answer names no window.
* thk_temporal_segment: share of these times inside the ground truth. For questions whose answer
  does.
* format: 0, or 0.5 for thinking and an answer with all tags in pairs, or 1 if the thinking also
  says when: at least twice where the answer names a window, once where there is other evidence.

The spatial terms (ans_viou, thk_spatial) compare boxes, which rows do not hold; they are not here,
and the boxes and objects that the source asks for in a full format are not asked for. Chosen here:
evidence is windows, not key frames, so dt is 0 inside one (a key frame is a window without length);
ROUGE without stemming; a time that is no number counts as far off.
"""

from __future__ import annotations

import math
import re

from paravt_jax import protocol
from paravt_jax.protocol import Window
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.metrics import interval
from paravt_jax.rewards.overlap import distance, overlap
from paravt_jax.rewards.rouge import rouge_mean
from paravt_jax.rewards.rules import (
    UNIT,
    Ranges,
    RewardBreakdown,
    RewardRules,
    Scheme,
    breakdown,
    total_range,
)

_TIME_TAG = re.compile(r"</?t>")
_STAMP = re.compile(r"<t>([\d.]{1,20})</t>s")


def ranges(rules: RewardRules) -> Ranges:
    """Least and greatest value of each term."""
    times = dict.fromkeys(("ans_tiou", "thk_temporal_point", "thk_temporal_segment"), UNIT)
    return total_range(rules, {"accuracy": UNIT, "format": UNIT, "tool": (0.0, 0.0), **times})


def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    """Reward by term."""
    alone = attempt.question_type == "tvg"
    grounded = alone or rules.grounded
    truth, stamps = _truth(attempt), times(thought(attempt.text))
    return breakdown(
        rules,
        accuracy=answer_iou(attempt.prediction, truth) if alone else accuracy_score(attempt),
        format=format_score(attempt.text, (2 if grounded else 1) if truth else 0),
        added={
            "ans_tiou": answer_iou(attempt.prediction, truth) if grounded and not alone else 0.0,
            "thk_temporal_point": 0.0 if grounded else point_score(stamps, truth, attempt.progress),
            "thk_temporal_segment": segment_score(stamps, truth) if grounded else 0.0,
        },
    )


def accuracy_score(attempt: Attempt) -> float:
    """ans_acc in [0, 1]."""
    if attempt.question_type == "mcq":
        return attempt.accuracy("exact")
    return rouge_mean(_TIME_TAG.sub("", attempt.prediction), attempt.answer)


def answer_iou(answer: str, truth: tuple[Window, ...]) -> float:
    """IoU of the first interval of an answer, with or without tags around its times."""
    window = interval(_TIME_TAG.sub("", answer))
    return overlap([window] if window else [], truth).iou


def thought(text: str) -> str:
    """What stands in the first pair of `<think>`; empty if there is none."""
    rest = text.partition(protocol.THINK_OPEN)[2]
    inside, closed, _ = rest.partition(protocol.THINK_CLOSE)
    return inside if closed else ""


def times(thinking: str) -> list[float]:
    """The stamped times in seconds; infinite for a stamp that is no number."""
    seconds = [protocol.parse_seconds(stamp) for stamp in _STAMP.findall(thinking)]
    return [math.inf if time is None else time for time in seconds]


def point_score(stamps: list[float], evidence: tuple[Window, ...], progress: float) -> float:
    """Mean closeness of times to their nearest evidence, in [0, 1]; 0 without either."""
    if not stamps or not evidence:
        return 0.0
    width = 4 * (1 - progress) if progress < 0.75 else 1.0
    offsets = [distance(time, evidence) / width for time in stamps]
    return sum(math.exp(-offset * offset / 2) for offset in offsets) / len(offsets)


def segment_score(stamps: list[float], truth: tuple[Window, ...]) -> float:
    """Share of the times inside the ground truth, in [0, 1]; 0 without either."""
    if not stamps or not truth:
        return 0.0
    return sum(distance(time, truth) == 0.0 for time in stamps) / len(stamps)


def format_score(text: str, stamps: int) -> float:
    """0, 0.5 or 1; `stamps` is how often the thinking has to say when for a 1."""
    thinking = thought(text)
    pairs = [(text, tag) for tag in ("think", "answer")]
    pairs += [(thinking, tag) for tag in ("obj", "t", "box")]
    paired = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") for text, tag in pairs)
    answered = protocol.ANSWER_CLOSE in text.partition(protocol.ANSWER_OPEN)[2]
    if not (thinking and answered and paired):
        return 0.0
    return 1.0 if thinking.count("<t>") >= stamps else 0.5


def _truth(attempt: Attempt) -> tuple[Window, ...]:
    """The windows to compare with: the answer's own where it is one, else the evidence."""
    if attempt.question_type != "tvg":
        return attempt.evidence
    window = interval(attempt.answer)
    return (window,) if window else ()


SCHEME = Scheme(score, ranges, reads=("grounded",))
