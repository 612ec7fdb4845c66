"""What harnesses read from an answer: letters, windows of time, right or wrong.

Each function returns what the harness of the same name returns, faults included; the fact that it
does is held by `tests/parity/test_benchmark_cases.py`. None of them raises, whatever the text.
"""

from __future__ import annotations

import functools
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evaluate.benchmarks.sample import Window


def strip_reasoning(text: str, tags: Iterable[Sequence[str]]) -> str:
    """The text without what stands between each pair of tags (lmms-eval, `api/reasoning.py`).

    Of a text with closing tags alone, as where the prompt opened the thought, what follows the last
    of them is kept. A thought that is never closed stays.
    """
    for opening, closing in tags:
        start = text.find(opening)
        while start >= 0 and (end := text.find(closing, start)) >= 0:
            text = text[:start] + text[end + len(closing) :]
            start = text.find(opening)
        if opening not in text:
            text = text.rpartition(closing)[2]
    return text.strip()


# --- Letters --------------------------------------------------------------------------------------

_THE = ("", "the ")
_PHRASES = (
    *(f"{the}{best}answer is" for the in _THE for best in ("", "correct ", "best ")),
    *(f"{the}{best}option is" for the in _THE for best in ("correct ", "best ")),
    *(f"{the}{best}choice is" for the in _THE for best in ("", "correct ")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
_MARKS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
"""How a letter may be written, and how much that counts."""
_POINTS = ",.!?;:'\""
_START, _END, _PHRASE, _ANYWHERE = 10, 9, 7, 0


def mcq(text: str, choices: str = "ABCD") -> str:
    """The letter that lmms-eval's shared extractor reads (`_task_utils/mcq_extract.py`); "" if
    none. Of all places where a letter stands, the one in the best form counts, the last of
    those."""
    padded = f" {functools.reduce(str.strip, _POINTS, text.strip())} "
    candidates = [
        (rank, padded.rfind(form.format(letter)), letter)
        for form, rank in _MARKS
        for letter in choices
    ]
    candidates += [
        (_PHRASE, padded.find(letter, place + len(phrase)), letter)
        for phrase in _PHRASES
        if (place := padded.lower().find(phrase)) >= 0
        for letter in choices
    ]
    candidates += _at_the_ends(padded.strip(), len(padded), choices)
    candidates = [candidate for candidate in candidates if candidate[1] >= 0]
    candidates = candidates or [(_ANYWHERE, padded.rfind(letter), letter) for letter in choices]
    best = max(candidates, default=(0, -1, ""))
    return best[2] if best[1] >= 0 else ""


def _at_the_ends(text: str, length: int, choices: str) -> list[tuple[int, int, str]]:
    """Letters that begin or end the text and are no part of a word."""
    candidates = []
    if text[:1] and text[0] in choices and not text[1:2].isalpha():
        candidates.append((_START, 0, text[0]))
    if text[-1:] and text[-1] in choices and not text[-2:-1].isalpha():
        candidates.append((_END, length - 1, text[-1]))
    return candidates


_LONGVIDEOBENCH_HEADS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)
# Two commas are missing upstream, which joins these into heads that nobody writes.
_VLMEVALKIT_HEADS = (
    *_LONGVIDEOBENCH_HEADS[:4],
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)


def longvideobench(text: str) -> str | None:
    """The first capital A to E after certain heads are deleted (lmms-eval,
    `parse_multi_choice_response`); None where it draws a choice at random."""
    return _first(text, _LONGVIDEOBENCH_HEADS, "ABCDE")


def vlmevalkit(text: str, choices: str = "ABCD") -> str:
    """The first capital letter after certain heads are deleted (VLMEvalKit,
    `extract_characters_regex`); "" where it asks its judge."""
    return _first(text, _VLMEVALKIT_HEADS, choices) or ""


def _first(text: str, heads: Iterable[str], choices: str) -> str | None:
    for head in heads:
        text = text.replace(head, "")
    return next((letter for letter in text if letter in choices), None)


def paravt_letter(text: str) -> str:
    """ParaVT's `extract_letter`: a letter A to J by four attempts, else the first character."""
    text = text.strip()
    answer = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    inner = answer[1].strip() if answer else ""
    attempts = (
        re.search(r"\b([A-J])\b", inner),
        re.fullmatch(r"([A-J])", text),
        re.search(r"(?:answer|Answer)\s*(?:is|:)\s*([A-J])", text),
        re.search(r"\b([A-J])\b", text),
    )
    return next((match[1] for match in attempts if match), text[:1])


# --- MMVU -----------------------------------------------------------------------------------------

_SUPERSCRIPTS = str.maketrans({power: f"^{n}" for n, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
_NUMBER = re.compile(r"\d+\.?\d*")
_COMPLEXITY = re.compile(r"o\s*\([^)]+\)", re.IGNORECASE)


def mmvu_choice(prediction: str, answer: str, choices: Mapping[str, Any]) -> bool:
    """Whether lmms-eval's rules take a prediction for the right choice: its first lone letter, the
    right letter anywhere as a word, the right option's words, or the letter and one of them."""
    spoken, letter = prediction.strip(), answer.strip()
    first = re.search(r"\b([A-E])\b", spoken, re.IGNORECASE)
    if first and first[1].upper() == letter.upper():
        return True
    if re.search(rf"\b{re.escape(letter)}\b", spoken, re.IGNORECASE):
        return True
    if letter not in choices:
        return False
    text, low = str(choices[letter] or "").strip().lower(), spoken.lower()
    keys = [word.strip(string.punctuation) for word in text.split()]
    has_letter = letter.upper() in spoken.upper()
    return text in low or (has_letter and any(key in low for key in keys if len(key) > 2))


def mmvu_open(prediction: str, answer: str) -> bool:
    """Whether lmms-eval's rules take a prediction for the right words: one holds the other (an
    empty one is held by all), equal first numbers, all longer words of a short answer, or the same
    complexity. What fails here is for its judge."""
    response, right = (
        " ".join(text.strip().lower().translate(_SUPERSCRIPTS).split())
        for text in (prediction, answer)
    )
    if right in response or response in right:
        return True
    numbers = [_NUMBER.search(text) for text in (right, response)]
    if all(numbers) and abs(float(numbers[0][0]) - float(numbers[1][0])) < 0.01:  # type: ignore[index]
        return True
    words, spoken = ([w.strip(string.punctuation) for w in x.split()] for x in (right, response))
    words = [word for word in words if word]
    if 2 <= len(words) <= 5 and all(word in spoken for word in words if len(word) > 2):
        return True
    powers = [_COMPLEXITY.search(text) for text in (right, response)]
    return all(powers) and powers[0][0] == powers[1][0]  # type: ignore[index]


# --- Windows of time ------------------------------------------------------------------------------

_CLOCK = r"\d{1,2}:\d{2}(?::\d{2})?"
_CLOCK_RANGE = re.compile(rf"\b({_CLOCK})\s*[–-]\s*({_CLOCK})\b")
_ONE_CLOCK = re.compile(rf"\b({_CLOCK})\b")
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s*[–-]\s*(\d+(?:\.\d+)?)")
_RANGE_IN_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*s?\s*[–-]\s*(\d+(?:\.\d+)?)\s*s?")
_ONE_NUMBER = re.compile(r"\b(\d+(?:\.\d+)?)\b")
_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"


def charades(text: str) -> Window | None:
    """The window that lmms-eval's `temporal_grounding_charades` reads, in ascending order."""
    text = text.lower().replace(_EXAMPLE, "").replace("to", "-")
    sentences = re.split(r"[!?\n]", text)
    relevant = [sentence for sentence in sentences if re.search("start|end|happen", sentence)]
    relevant = relevant or sentences
    clocks = [seconds(clock) for sentence in relevant for clock in _ONE_CLOCK.findall(sentence)]
    numbers = [float(match[1]) for sentence in relevant if (match := _ONE_NUMBER.search(sentence))]
    window = (
        _first_range(_CLOCK_RANGE, relevant)
        or _first_range(_RANGE, relevant)
        or tuple(clocks[:2] if len(clocks) > 1 else numbers[:2])
    )
    if len(window) < 2:
        window = _first_range(_RANGE_IN_SECONDS, relevant)
    return (min(window), max(window)) if window else None


def _first_range(pattern: re.Pattern[str], sentences: Iterable[str]) -> tuple[float, ...]:
    for sentence in sentences:
        if match := pattern.search(sentence):
            return seconds(match[1]), seconds(match[2])
    return ()


_PRECISE_CLOCK = re.compile(r"\b(\d{1,2}:\d{2}:\d{2}(?:\.\d+)?|\d{1,2}:\d{2}(?:\.\d+)?)\b")
_PLAIN_RANGES = (
    re.compile(r"(\d+\.?\d*)\s*-\s*(\d+\.?\d*)"),
    re.compile(r"(\d+\.?\d*)\s+to\s+(\d+\.?\d*)"),
)


def timelens(text: str) -> list[Window]:
    """The windows that lmms-eval's `timelens` tasks read, in the order of the text and as they
    stand; the first is scored."""
    text = text.lower()
    if windows := _pairs([seconds(clock) for clock in _PRECISE_CLOCK.findall(text)]):
        return windows
    for pattern in _PLAIN_RANGES:
        if ranges := pattern.findall(text):
            return [(float(start), float(end)) for start, end in ranges]
    return _pairs([float(number) for number in re.findall(r"\b\d+\.?\d*\b", text)])


def _pairs(numbers: Sequence[float]) -> list[Window]:
    return list(zip(numbers[::2], numbers[1::2], strict=False))


def seconds(clock: str) -> float:
    """`65`, `1:05` and `0:01:05` in seconds."""
    return sum(float(part) * 60**power for power, part in enumerate(reversed(clock.split(":"))))


_DASH = r"\s*[-–—]\s*"
_PARAVT_CLOCKS = re.compile(rf"(\d+):(\d+(?:\.\d+)?){_DASH}(\d+):(\d+(?:\.\d+)?)")
_PARAVT_RANGE = re.compile(rf"(\d+\.?\d*){_DASH}(\d+\.?\d*)")
_BEGIN, _FINISH = r"start(?:ing)?|begin(?:ning)?", r"end(?:ing)?|finish(?:ing)?"


def paravt_window(text: str) -> Window | None:
    """ParaVT's `extract_time_from_response`: a range of clocks or numbers, first in `<time>`, else
    numbers after words for start and end, else the first two numbers, in whatever order."""
    tag = re.search(r"<time>([^<]+)</time>", text)
    for target in [tag[1], text] if tag else [text]:
        if window := _paravt_range(target):
            return window
    ends = [
        re.search(rf"(?:{word})\s*(?:time)?[:\s]*(\d+\.?\d*)", text, re.IGNORECASE)
        for word in (_BEGIN, _FINISH)
    ]
    if ends[0] and ends[1]:
        return float(ends[0][1]), float(ends[1][1])
    numbers = [float(number) for number in _NUMBER.findall(text)[:2]]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def _paravt_range(text: str) -> Window | None:
    if match := _PARAVT_CLOCKS.search(text):
        start, end = (60 * int(match[n]) + float(match[n + 1]) for n in (1, 3))
        if start < end < 3600:
            return start, end
    if match := _PARAVT_RANGE.search(text):
        start, end = float(match[1]), float(match[2])
        if start < end:
            return start, end
    return None


def hull_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Overlap over the span from the first start to the last end, as all three harnesses have it; 0
    for a window whose end comes first."""
    span = max(a[1], b[1]) - min(a[0], b[0])
    return max(min(a[1], b[1]) - max(a[0], b[0]), 0.0) / span if span > 0 else 0.0
