"""What the truth of a question must be, so that an agent can answer it and rewards can judge it.

One rule for each kind of question:

* open: any words.
* grounding: windows of time in seconds, "63, 71", in each of which at least half lies within the
  video. Published windows often end a moment late; one beyond the end belongs to another video.
* choice: the question spells out its options, "A. red B. blue" or "(a) red (b) blue", and the
  answer is one of them: its letter, its letter and its words, its words, or its index, which counts
  from 0 as in NExT-QA, EgoSchema and LongVideoBench. It is kept as the letter. An answer that means
  different options in different readings ("2" where the options are "A. 1 B. 2 C. 3") is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from paravt_jax.records import QuestionType, Row
from paravt_jax.rewards.metrics import intervals, normalise
from pipelines.faults import ANSWER, Unusable

LETTERS = "ABCDEFGHIJ"
"""Of options, as rewards know them."""
# Not inside a word, a number, or an abbreviation such as "U.S.A.".
_MARK = re.compile(r"(?<![\w.'’])[(\[]?(?:(?P<upper>[A-J])[.):\]]|(?P<lower>[a-j])[)\]])")
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?:?\s+)?"
    r"[(\[]?(?P<letter>[A-J])(?:[.):\]]+(?:\s+(?P<words>.+))?)?",
    re.IGNORECASE | re.DOTALL,
)
LONGEST_QUESTION = 100_000
"""Characters of a question in which options are looked for."""


def normalised_answer(row: Row) -> Row:
    """The row with its answer as rewards read it; see the head of this module.

    Raises:
        Unusable: nobody can give this answer, or evidence lies outside of the video.
    """
    for window in row.evidence:
        _check_window(window, row.video.duration, f"evidence {list(window)}")
    if row.question_type == QuestionType.GROUNDING:
        _check_grounding(row.answer, row.video.duration)
    elif row.question_type == QuestionType.CHOICE:
        return dataclasses.replace(row, answer=choice(row.question, row.answer))
    return row


def _check_grounding(answer: str, duration: float) -> None:
    windows = list(intervals(answer))
    if not windows:
        raise Unusable(ANSWER, f"answer {answer!r}: write `start, end` in seconds, start first")
    for window in windows:
        _check_window(window, duration, f"answer {answer!r}")


def _check_window(window: tuple[float, float], duration: float, name: str) -> None:
    start, end = window
    inside = min(end, duration) - max(start, 0.0)
    if inside < (end - start) / 2:
        raise Unusable(
            ANSWER, f"{name} lies outside of the video, which is {duration:g} seconds long"
        )


def choice(question: str, answer: str) -> str:
    """Letter of the option that an answer means.

    Raises:
        Unusable: the question has no options, or the answer is none of them or several.
    """
    choices = options(question)
    if len(choices) < 2:
        raise Unusable(ANSWER, "the question has no options; write them into it, `A. red B. blue`")
    readings = set(_readings(answer.strip(), choices))
    if len(readings) == 1:
        return readings.pop()
    letters = ", ".join(choices)
    if readings:
        either = " or ".join(sorted(readings))
        raise Unusable(ANSWER, f"answer {answer!r} may mean option {either}; write the letter")
    remedy = "write a letter (an index counts from 0)"
    raise Unusable(ANSWER, f"answer {answer!r} is none of the options {letters}; {remedy}")


def _readings(answer: str, choices: dict[str, str]) -> Iterator[str]:
    """Letters of the options that an answer means in any reading."""
    stated = _LETTER.fullmatch(answer)
    if stated and stated["letter"].upper() in choices:
        yield stated["letter"].upper()
    words = {normalise(answer), normalise(stated["words"]) if stated and stated["words"] else ""}
    yield from (letter for letter, text in choices.items() if normalise(text) in words - {""})
    if re.fullmatch("[0-9]", answer) and int(answer) < len(choices):
        yield LETTERS[int(answer)]


def options(question: str) -> dict[str, str]:
    """Words of each option that a question spells out, by letter; empty if there are none.

    Options are marks A, B, C ... in this order, without a gap; other marks between them are words.
    Of several such rows the longest counts, of equally long ones the last.
    """
    best: list[re.Match[str]] = []
    for form in ("upper", "lower"):
        marks = _longest_row([m for m in _MARK.finditer(question[:LONGEST_QUESTION]) if m[form]])
        best = marks if len(marks) > len(best) else best
    ends = [mark.start() for mark in best[1:]] + [len(question)]
    return {
        letter: question[mark.end() : end].strip().partition("\n")[0].strip(" ,;")
        for letter, mark, end in zip(LETTERS, best, ends, strict=False)
    }


def _longest_row(marks: Sequence[re.Match[str]]) -> list[re.Match[str]]:
    """Marks from an A on, each followed by the next letter's nearest mark."""
    rows: dict[str, list[re.Match[str]]] = {}
    best: list[re.Match[str]] = []
    for mark in reversed(marks):
        letter = mark[mark.lastgroup or 0].upper()
        after = LETTERS[LETTERS.index(letter) + 1 :][:1]
        rows[letter] = [mark, *rows.get(after, [])]
        if letter == "A" and len(rows[letter]) > len(best):
            best = rows[letter]
    return best
