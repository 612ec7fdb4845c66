"""From an answer to a score, as a protocol says."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

from evaluate.benchmarks import extraction
from evaluate.benchmarks.protocol import Rules
from evaluate.benchmarks.sample import Kind, Sample, Window
from paravt_jax.protocol import reported
from paravt_jax.rewards.answers import answer_bodies, extract_answer
from paravt_jax.rewards.judge import Judge, judge_message, verdict
from paravt_jax.rewards.metrics import choice_letter, interval, normalise

RULE, JUDGE, DRAWN = "rule", "judge", "drawn"
ALL = "ABCDEFGHIJ"
UNKNOWN = "?"
"""ParaVT's gold where it finds none."""


class JudgeFailed(ValueError):
    """A judge gave no verdict. The sample is an error: it is not scored by something else."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an answer is worth."""

    score: float
    """Between 0 and 1."""
    prediction: str | list[float] | None
    """What was read from it; None if nothing."""
    filtered: str
    """What of it was read."""
    method: str = RULE
    """What decided: `rule`, `judge`, or `drawn` where the harness draws."""


def score(rules: Rules, sample: Sample, response: str, judge: Judge | None = None) -> Verdict:
    """The verdict on an answer.

    Args:
        response: the last turn as generated.
        judge: asked where the protocol asks one; without it, the rules decide alone.

    Raises:
        JudgeFailed: the judge raised, or its reply holds no verdict.
    """
    text = extraction.strip_reasoning(response, rules.scoring.strip)
    configured = judge if rules.scoring.judge else None
    kind = Kind.CHOICE if rules.scoring.letters_only and sample.kind is Kind.OPEN else sample.kind
    result = _BY_KIND[kind](rules, sample, text)
    if result.score == 0.0 and configured is not None and _worth_a_judge(rules, kind, result):
        return _judged(configured, rules, sample, result)
    return result


def _worth_a_judge(rules: Rules, kind: Kind, result: Verdict) -> bool:
    """Open answers, and choices of which nothing could be read; MMVU's choices are never judged."""
    unread = kind is Kind.CHOICE and result.prediction in (None, "")
    return kind is Kind.OPEN or (unread and rules.scoring.extract != "mmvu")


# --- Choices --------------------------------------------------------------------------------------


def _choice(rules: Rules, sample: Sample, text: str) -> Verdict:
    gold, choices = gold_letter(rules, sample), rules.scoring.choices or sample.letters or ALL
    if rules.scoring.extract == "mmvu":
        choices_of = sample.doc.get("choices") or dict(
            zip(sample.letters, map(sample.choice, sample.letters), strict=True)
        )
        right = extraction.mmvu_choice(text, gold, choices_of)
        return Verdict(float(right), extraction.mcq(text, choices) or None, text)
    if rules.scoring.extract == "longvideobench":
        letter = extraction.longvideobench(text)
        drawn = letter is None
        letter = drawn_letter(rules, sample) if letter is None else letter
        return Verdict(float(letter == gold), letter, text, DRAWN if drawn else RULE)
    letter = _LETTERS[rules.scoring.extract](text, choices)
    return Verdict(float(letter == gold), letter or None, text)


def answered(turn: str) -> str:
    """What a turn answers; nothing where its thought is never closed, as where it was cut off."""
    return extract_answer([turn]) if answer_bodies(turn) or reported(turn) else ""


def _answered_letter(text: str, choices: str) -> str:
    letter = choice_letter(answered(text)) or ""
    return letter if letter in choices else ""


_LETTERS: dict[str, Callable[[str, str], str]] = {
    "mcq": extraction.mcq,
    "vlmevalkit": extraction.vlmevalkit,
    "paravt": lambda said, choices: extraction.paravt_letter(said),
    "answer": _answered_letter,
    "charades": extraction.mcq,
    "timelens": extraction.mcq,
}


def gold_letter(rules: Rules, sample: Sample) -> str:
    """The letter that is right to the protocol."""
    if rules.scoring.gold == "published":
        return str(sample.gold)
    answer = str(sample.doc["answer"]).strip()
    texts = [option.strip() for option in sample.options]
    return sample.letters[texts.index(answer)] if answer in texts else UNKNOWN


def drawn_letter(rules: Rules, sample: Sample) -> str:
    """A choice at random, the same at every evaluation with one seed."""
    seed = f"{rules.decoding.seed}/{sample.task}/{sample.sample_id}"
    letters = sample.letters or ALL
    return letters[zlib.crc32(seed.encode()) % len(letters)]


# --- Words ----------------------------------------------------------------------------------------


def _open(rules: Rules, sample: Sample, text: str) -> Verdict:
    gold = str(sample.gold)
    if rules.scoring.extract == "answer":
        words = answered(text)
        right = bool(normalise(words)) and normalise(words) == normalise(gold)
        return Verdict(float(right), words or None, text)
    return Verdict(float(extraction.mmvu_open(text, gold)), text or None, text)


def _judged(judge: Judge, rules: Rules, sample: Sample, result: Verdict) -> Verdict:
    options = "".join(f"\n{letter}. {sample.choice(letter)}" for letter in sample.letters)
    prediction = result.prediction if isinstance(result.prediction, str) else result.filtered
    message = judge_message(f"{sample.stem}{options}", prediction, str(sample.gold))
    try:
        decided = verdict(judge(message))
    except Exception as error:  # somebody else's service
        raise JudgeFailed(f"the judge failed: {error}") from error
    if decided is None:
        raise JudgeFailed("the judge's reply holds no number between 0 and 1")
    return dataclasses.replace(result, score=decided, method=JUDGE)


# --- Windows of time ------------------------------------------------------------------------------


def _grounding(rules: Rules, sample: Sample, text: str) -> Verdict:
    assert not isinstance(sample.gold, str), "the gold of a grounding question is a window"
    window = _WINDOWS.get(rules.scoring.extract, _answered_window)(text)
    if window is None:
        return Verdict(0.0, None, text)
    return Verdict(extraction.hull_iou(window, sample.gold), list(window), text)


def _answered_window(text: str) -> Window | None:
    return interval(answered(text))


def _first_window(text: str) -> Window | None:
    return next(iter(extraction.timelens(text)), None)


_WINDOWS: dict[str, Callable[[str], Window | None]] = {
    "charades": extraction.charades,
    "timelens": _first_window,
    "paravt": extraction.paravt_window,
    "answer": _answered_window,
}
_BY_KIND: dict[Kind, Callable[[Rules, Sample, str], Verdict]] = {
    Kind.CHOICE: _choice,
    Kind.OPEN: _open,
    Kind.GROUNDING: _grounding,
}
