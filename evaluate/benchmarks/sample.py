"""What an evaluation asks, whatever data set it comes from, and what came of it."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Mapping
from typing import Any

_LETTER = re.compile(r"^[A-J][.)]\s+")
_INLINE = re.compile(r"\n(?:\(A\)|A[.)])\s")

Window = tuple[float, float]
"""Start and end in seconds."""


MANY = " | "
"""Stands between values of a group where a question has several."""


class Kind(enum.StrEnum):
    """How an answer is scored."""

    CHOICE = "mcq"
    OPEN = "open"
    GROUNDING = "grounding"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question about one video, from one row of a data set."""

    task: str
    """Name of the task, that of lmms-eval; the stem of the file for one's own."""
    sample_id: str
    """Unique within the task."""
    doc_id: int
    """Number of the row in its split, from 0: the order of the report."""
    doc: Mapping[str, Any]
    """The row as published."""
    kind: Kind
    video: str
    """Where the file must lie, absolute. Nobody looked whether it is there."""
    question: str
    """As published: LVBench and MLVU have the options in it."""
    gold: str | Window
    """The right letter, the right words, or the window."""
    cluster: str
    """What questions that are not independent have in common: the video."""
    options: tuple[str, ...] = ()
    """As published: with letters in Video-MME, without in the others."""
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What figures are broken down by: `duration`, `category`, ... Of several values, with `MANY`
    between them, the question counts for each."""
    subtitles: str = ""
    """Where the subtitles must lie; empty where the data set has none."""

    def choice(self, letter: str) -> str:
        """The text of an option, without its letter."""
        return _LETTER.sub("", self.options[self.letters.index(letter)])

    @property
    def stem(self) -> str:
        """The question without the options that LVBench and MLVU have in it."""
        return _INLINE.split(self.question)[0] if self.options else self.question

    @property
    def letters(self) -> str:
        """The letters of the options, `ABCD`."""
        return "".join(chr(ord("A") + number) for number in range(len(self.options)))


OK, ERROR = "ok", "error"


@dataclasses.dataclass(frozen=True)
class SampleResult:
    """What came of one sample: a line of the runner's JSONL, and all that reports are made from."""

    task: str
    sample_id: str
    doc_id: int
    cluster: str
    kind: str
    groups: Mapping[str, str]
    target: str | list[float]
    annotation: str = ""
    """Video, question and truth, as lmms-eval keys its Charades results."""
    status: str = OK
    """`ok`, or `error`: no readable video, no room in the context, a judge that failed. An error is
    never scored."""
    error: str = ""
    """What happened, in one line."""
    response: str = ""
    """The last turn as generated."""
    filtered: str = ""
    """What of it was scored."""
    prediction: str | list[float] | None = None
    """What was read from it; None if nothing could be."""
    score: float | None = None
    """Between 0 and 1; None for an error."""
    method: str = ""
    """What decided: `rule`, `judge`, `drawn` (a seeded draw where the protocol draws)."""
    prompt: str = ""
    """The words of the prompt, the video left out."""
    frames: int = 0
    pixels: int = 0
    """Of one frame as the model saw it."""
    turns: int = 0
    calls: int = 0
    """Tool calls, malformed ones included."""
    failed_calls: int = 0
    """Those that could not be parsed or did not run."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    """From the prompt's prefill to the end of the answer."""
    commit: str = ""
    """Of this project, when it was answered."""
    blind: float | None = None
    """Mean log-probability of what was said of the frames, grey ones shown in their place ..."""
    seeing: float | None = None
    """... and as they were: of the first report on a crop, else of the last turn. None where it was
    not measured."""

    @classmethod
    def of(cls, sample: Sample, **came: Any) -> SampleResult:
        """The result of a sample."""
        target = list(sample.gold) if isinstance(sample.gold, tuple) else sample.gold
        return cls(
            sample.task,
            sample.sample_id,
            sample.doc_id,
            sample.cluster,
            str(sample.kind),
            dict(sample.groups),
            target,
            f"{sample.cluster}>>>{sample.question}>>>{target}",
            **came,
        )

    @classmethod
    def failed(cls, sample: Sample, reason: str, **came: Any) -> SampleResult:
        """The result of a sample that could not be put to the model, or not be judged."""
        return cls.of(sample, status=ERROR, error=reason, **came)
