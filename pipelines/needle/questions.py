"""Questions about the needle world, and the facts that answer them."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from paravt_jax.records import QuestionType, Row
from pipelines.needle.world import COLOURS, SHAPES, Event, NeedleVideo

LETTERS = "ABCD"

Asked = Literal["colour", "shape", "time"]
ASKED: tuple[Asked, ...] = ("colour", "shape", "time")
"""What a question asks for: the colour of a shape, the shape of a coloured thing, the time of a
thing whose colour and shape it names."""


@dataclasses.dataclass(frozen=True)
class NeedleQuestion:
    """A question row with its ground truth."""

    row: Row
    events: tuple[Event, ...]
    """All events of the video."""
    target: Event
    """The event asked about."""
    vocabulary: tuple[str, ...]
    """What a guess is drawn from; empty for grounding, where a guess is a time."""
    asked: Asked


def ask(
    videos: Sequence[NeedleVideo],
    question_types: Sequence[str] = (QuestionType.OPEN, QuestionType.GROUNDING),
) -> list[NeedleQuestion]:
    """Every question of the chosen types about every event of the videos.

    Open: the colour of a shape, the shape of a coloured thing, in one word. Grounding: when a
    thing is visible, `start, end` in seconds, where end is the last visible second + 1.
    Multiple choice: the colour of a shape among four.

    Raises:
        ValueError: a question type does not exist.
    """
    kinds = [QuestionType(kind) for kind in question_types]
    return [
        question
        for video in videos
        for number, event in enumerate(video.events)
        for kind in kinds
        for question in _ask_about(video, number, event, kind)
    ]


def _ask_about(
    video: NeedleVideo, number: int, event: Event, kind: QuestionType
) -> list[NeedleQuestion]:
    name = f"{video.name}/{number}"
    if kind is QuestionType.OPEN:
        colour = f"What colour is the {event.shape}?"
        shape = f"What shape is the {event.colour} thing?"
        return [
            _question(
                video, event, f"{name}/colour", colour, event.colour, kind, tuple(COLOURS), "colour"
            ),
            _question(video, event, f"{name}/shape", shape, event.shape, kind, SHAPES, "shape"),
        ]
    if kind is QuestionType.GROUNDING:
        when = f"When is the {event.name} visible?"
        answer = f"{event.start}, {event.end}"
        return [_question(video, event, f"{name}/when", when, answer, kind, (), "time")]
    options, letter = _options(f"{name}/choice", event.colour)
    text = f"What colour is the {event.shape}?\n{options}"
    return [_question(video, event, f"{name}/choice", text, letter, kind, tuple(LETTERS), "colour")]


def _options(row_id: str, colour: str) -> tuple[str, str]:
    """Four colours in an order that depends on the row alone, and the letter of the right one."""
    digest = hashlib.sha256(row_id.encode()).digest()
    rng = np.random.default_rng(list(digest))
    others = [other for other in COLOURS if other != colour]
    chosen = [colour, *rng.choice(others, len(LETTERS) - 1, replace=False)]
    order = rng.permutation(len(LETTERS))
    lines = [f"{letter}. {chosen[i]}" for letter, i in zip(LETTERS, order, strict=True)]
    return "\n".join(lines), LETTERS[int(np.flatnonzero(order == 0)[0])]


def _question(
    video: NeedleVideo,
    event: Event,
    row_id: str,
    text: str,
    answer: str,
    kind: QuestionType,
    vocabulary: tuple[str, ...],
    asked: Asked,
) -> NeedleQuestion:
    evidence = ((float(event.start), float(event.end)),)
    row = Row(row_id, video.video, text, answer, kind.value, evidence)
    return NeedleQuestion(row, video.events, event, vocabulary, asked)
