"""The needle world as a benchmark, so that a laptop can try one."""

from __future__ import annotations

import os

from evaluate.benchmarks.sample import Kind, Sample
from evaluate.benchmarks.schemas import Loaded
from paravt_jax.records import QuestionType
from pipelines.needle.questions import NeedleQuestion
from train.data.needle import questions_of_world
from train.data.settings import DataSettings

NEEDLE_TASKS = {"needle_held_out": "held_out", "needle_test": "test"}
"""Tasks, and the split of the world whose videos they ask about."""
KINDS = {
    QuestionType.OPEN: Kind.OPEN,
    QuestionType.CHOICE: Kind.CHOICE,
    QuestionType.GROUNDING: Kind.GROUNDING,
}


def load_needle(task: str, data: DataSettings) -> Loaded:
    """The samples of a split, whose videos are written if need be."""
    asked = questions_of_world(data, NEEDLE_TASKS[task])
    return Loaded([_sample(task, number, question) for number, question in enumerate(asked)], [])


def _sample(task: str, number: int, question: NeedleQuestion) -> Sample:
    row, kind = question.row, KINDS[QuestionType(question.row.question_type)]
    target, events = question.target, len(question.events)
    gold = (float(target.start), float(target.end)) if kind is Kind.GROUNDING else row.answer
    return Sample(
        task,
        row.row_id,
        number,
        {"question": row.question, "answer": row.answer, "type": row.question_type},
        kind,
        row.video.path,
        row.question,
        gold,
        os.path.basename(row.video.path),
        groups={"events": str(events), "asked": question.asked},
    )
