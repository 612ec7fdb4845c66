"""How right an answer is: words, option letters, time intervals. No text makes these raise."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator

from paravt_jax.protocol import parse_seconds

_LONGEST_ANSWER = 4000
"""Characters of an answer that are read; bounds the time of every search below."""


def normalise(text: str) -> str:
    """Words in one case and form, without articles and punctuation, one space between them.

    Points and colons inside numbers stay ("3.5" is not "35"), hyphens separate words, and a text
    that is nothing but articles stays as it is (the option "A" is not the word "the").
    """
    text = unicodedata.normalize("NFKC", text[:_LONGEST_ANSWER]).casefold()
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    text = re.sub(r"(?!(?<=\d)[.:]\d)[^\w\s]|_", " ", text)
    words = text.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the two multisets of normalised words (SQuAD, arXiv 1606.05250)."""
    return f1(*_word_counts(prediction, answer))


def precise_f1(prediction: str, answer: str) -> float:
    """`token_f1` times the share of predicted words that are right.

    Of k answers without common words, one of them right, F1 gives 2 / (k + 1): more than the 1 / k
    that guessing one of them earns on average. This gives 2 / (k (k + 1)).
    """
    common, predicted, expected = _word_counts(prediction, answer)
    return f1(common, predicted, expected) * common / max(predicted, 1)


def _word_counts(prediction: str, answer: str) -> tuple[int, int, int]:
    """Words that two texts have in common, and those of each, repeated ones counted."""
    predicted, expected = Counter(normalise(prediction).split()), Counter(normalise(answer).split())
    return (predicted & expected).total(), predicted.total(), expected.total()


def choice_letter(text: str) -> str | None:
    """Option letter A-J that a text settles on, in upper case; None if it settles on none.

    In order: the text is a letter; the last "answer is X" or "option X"; a letter with a
    delimiter at the head ("B. the door"); the only capital letter that stands alone. An "A" or
    "I" followed by a word is an article or a pronoun, not a letter. A letter that the text denies
    ("not B", "neither A nor B", "C is wrong") is not there.
    """
    text = _DENIED.sub(" ", text.strip()[:_LONGEST_ANSWER]).strip()
    for pattern in (_BARE_LETTER, _STATED_LETTER, _LEADING_LETTER):
        letters = pattern.findall(text)
        if letters:
            return letters[-1].upper()
    alone = set(_LONE_LETTER.findall(text))
    return alone.pop() if len(alone) == 1 else None


def choice_accuracy(prediction: str, answer: str) -> float:
    """1 if the prediction settles on the answer's letter.

    An answer without a letter is compared by its normalised words.
    """
    expected = choice_letter(answer)
    if expected is None:
        return float(bool(normalise(answer)) and normalise(prediction) == normalise(answer))
    return float(choice_letter(prediction) == expected)


def interval(text: str) -> tuple[float, float] | None:
    """First interval that a text names, or None; see `intervals`."""
    return next(intervals(text), None)


def intervals(text: str) -> Iterator[tuple[float, float]]:
    """The intervals `(start, end)` in seconds with start < end that a text names, in its order.

    Times are numbers or clock times, with or without a unit of seconds or minutes; between them
    stands a comma, a dash, a tilde, "to", "and", "until" or "through".
    """
    for match in _INTERVAL.finditer(_MINUTES_SECONDS.sub(_as_seconds, text[:_LONGEST_ANSWER])):
        shared = match["unit_b"] if match["unit_a"] is None else match["unit_a"]
        start, end = _seconds(match["a"], shared), _seconds(match["b"], match["unit_b"])
        if start is not None and end is not None and start < end:
            yield start, end


def temporal_iou(prediction: str, answer: str) -> float:
    """Intersection over union of the intervals that two texts name; 0 if one names none."""
    predicted, expected = interval(prediction), interval(answer)
    return interval_iou(predicted, expected) if predicted and expected else 0.0


_FREE_LETTER = r"(?![\w'’])(?!(?<=[AaI])\s+[a-z])"
"""After a letter: no longer word, and after A or I no word in lower case either."""
_BARE_LETTER = re.compile(r"\A[(\[]?([A-Ja-j])[)\].:,]*\Z")
_STATED_LETTER = re.compile(
    r"\b(?i:answer(?:\s+is)?|option|choice)\s{0,3}:?\s{0,3}[(\[]?"
    rf"([A-J]{_FREE_LETTER}|[a-j](?=\s{{0,3}}[).:,;\]]|\s*\Z))"
)
_LEADING_LETTER = re.compile(r"\A[(\[]?([A-Ja-j])[).:\]]")
_OPTION = (
    r"[(\[]?(?-i:[A-J])(?![\w'’])"
    r"(?!(?<=[AI])\s+(?!(?:or|nor|and|is|was|cannot|can)\b)(?-i:[a-z]))[)\]]?"
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|except|excluding)|n['’]t)\s{1,3}"
    r"(?:(?:be|the|answer|option|choice|letter|is)\s{1,3}){0,4}"
    rf"{_OPTION}(?:\s{{1,3}}(?:or|nor|and)\s{{1,3}}{_OPTION}){{0,9}}"
    rf"|(?<![\w'’]){_OPTION}\s{{1,3}}(?:(?:is|was)(?:n['’]t|\s{{1,3}}(?:not|wrong|incorrect|false))"
    r"|can(?:not|['’]t)\s{1,3}be)\b",
    re.IGNORECASE,
)
_LONE_LETTER = re.compile(rf"(?<![\w'’])([A-J]){_FREE_LETTER}")

_MINUTES_SECONDS = re.compile(
    r"(?<![\w.:])(\d{1,9})\s?(?:minutes?|mins?|m)\s?(?:and\s)?"
    r"(\d{1,9})\s?(?:seconds?|secs?|s)\b",
    re.IGNORECASE,
)
_CLOCK = r"(?:\d{1,4}:){1,2}\d{1,2}(?:\.\d{1,6})?|\d{1,9}(?:\.\d{1,6})?"
_UNIT = r"(?:seconds|second|secs|sec|s|minutes|minute|mins|min|m)\b"
_INTERVAL = re.compile(
    rf"(?<![\w.:])(?P<a>-?(?:{_CLOCK}))(?![\d.:]*\d)\s?(?P<unit_a>{_UNIT})?"
    r"\s{0,3}(?:,|-|–|—|~|\b(?:to|and|until|till|through)\b)\s{0,3}"
    rf"(?P<b>-?(?:{_CLOCK}))(?![\d.:]*\d)\s?(?P<unit_b>{_UNIT})?",
    re.IGNORECASE,
)


def _as_seconds(match: re.Match[str]) -> str:
    """ "1 min 30 s" as "90 s"."""
    return f"{60 * int(match.group(1)) + int(match.group(2))} s"


def _seconds(time: str, unit: str | None) -> float | None:
    seconds = parse_seconds(time)
    minutes = unit is not None and unit.lower().startswith("m") and ":" not in time
    return seconds * 60 if minutes and seconds is not None else seconds


def f1(common: int, predicted: int, expected: int) -> float:
    """Harmonic mean of `common / predicted` and `common / expected`; 0 without common words."""
    if not common:
        return 0.0
    precision, recall = common / predicted, common / expected
    return 2 * precision * recall / (precision + recall)


def interval_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two intervals; 0 if one of them is empty or reversed."""
    if a[1] <= a[0] or b[1] <= b[0]:
        return 0.0
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return intersection / ((a[1] - a[0]) + (b[1] - b[0]) - intersection)
