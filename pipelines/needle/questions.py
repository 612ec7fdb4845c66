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

    def question(
        place: str, text: str, answer: str, vocabulary: tuple[str, ...], target: Asked
    ) -> NeedleQuestion:
        evidence = ((float(event.start), float(event.end)),)
        row = Row(f"{name}/{place}", video.video, text, answer, kind.value, evidence)
        return NeedleQuestion(row, video.events, event, vocabulary, target)

    colour, shape = f"What colour is the {event.shape}?", f"What shape is the {event.colour} thing?"
    if kind is QuestionType.OPEN:
        return [
            question("colour", colour, event.colour, tuple(COLOURS), "colour"),
            question("shape", shape, event.shape, SHAPES, "shape"),
        ]
    if kind is QuestionType.GROUNDING:
        when, answer = f"When is the {event.name} visible?", f"{event.start}, {event.end}"
        return [question("when", when, answer, (), "time")]
    options, letter = _options(f"{name}/choice", event.colour)
    return [question("choice", f"{colour}\n{options}", letter, tuple(LETTERS), "colour")]


def _options(row_id: str, colour: str) -> tuple[str, str]:
    """Four colours in an order that depends on the row alone, and the letter of the right one."""
    # Not `hash`, which Python salts anew in every process (R13).
    digest = hashlib.sha256(row_id.encode()).digest()
    rng = np.random.default_rng(list(digest))
    others = [other for other in COLOURS if other != colour]
    chosen = [colour, *rng.choice(others, len(LETTERS) - 1, replace=False)]
    order = rng.permutation(len(LETTERS))
    lines = [f"{letter}. {chosen[i]}" for letter, i in zip(LETTERS, order, strict=True)]
    return "\n".join(lines), LETTERS[int(np.flatnonzero(order == 0)[0])]
