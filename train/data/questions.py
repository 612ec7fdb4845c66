"""The questions of a run: read, checked, mixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from paravt_jax.plugins import load
from paravt_jax.records import Row, VideoRef
from pipelines.datasets import Found, question_rows
from pipelines.loader import Mixture
from pipelines.render import ChatRenderer
from pipelines.sizes import PromptLimit
from pipelines.subtitles import has_subtitles
from pipelines.tfds_builder import RowSource, row_source
from rollout.agent import Item
from train.data.needle import questions_of_world
from train.data.settings import DataSettings
from train.data.split import QuestionSplit, apart, one_per_video, split
from train.evaluation.settings import EvaluationSettings

Questions = RowSource[Row] | Mixture


def all_rows(questions: Questions | Sequence[Row]) -> Iterator[Row]:
    """Questions in their order."""
    return (questions[index] for index in range(len(questions)))


def identities(rows: Iterable[Row]) -> Iterator[bytes]:
    """What identifies each row, wherever its files are: hosts must agree on it."""
    for row in rows:
        durations = [video.duration for video in row.videos]
        values = row.row_id, row.question, row.answer, row.question_type, row.evidence, durations
        yield repr(values).encode()


def prompt_contents(prompts: Sequence[Item]) -> Iterator[bytes | memoryview]:
    """What every host must hold alike of a batch of prompts. Pixels are not compared: one host has
    decoded them for all."""
    for row, budget, prompt in prompts:
        yield f"{row.row_id} {budget}".encode()
        yield prompt.tokens.tobytes()


Check = Callable[[Row], object]
"""Raises a `ValueError` for a row that the run cannot use, though its files are there."""


def frames_shown(data: DataSettings, evaluation: EvaluationSettings) -> set[int]:
    """All numbers of frames that a prompt of the run may show."""
    return {*data.frame_budgets, *([evaluation.frame_budget] if evaluation.rows else [])}


class PromptRoom(NamedTuple):
    """How long prompts may be."""

    tokens: int
    """Of the longest."""
    reason: str
    """What the number comes from."""


def question_check(
    data: DataSettings, evaluation: EvaluationSettings, renderer: ChatRenderer, room: PromptRoom
) -> Check:
    """What a question must pass: words without control tokens, and a prompt that there is room
    for."""
    most = max(frames_shown(data, evaluation))
    limit = PromptLimit(renderer, most, data.overview_tokens, room.tokens, room.reason)

    def check(row: Row) -> None:
        renderer.check_question(row)
        limit(row)

    return check


def read_questions(
    data: DataSettings, evaluation: EvaluationSettings, check: Check = lambda row: None
) -> list[Found[Row]]:
    """The questions of `--data` and of each data set that is mixed with it.

    Args:
      check: what else a row must pass (`question_check`).

    Raises:
      ValueError: a file that cannot be read, or more unusable rows than `data.max_rejected`.
    """
    fewest = min(frames_shown(data, evaluation))
    reader = load(str(data.reader)) if data.reader else None
    sets: list[Found[Row]] = []
    for number, path in enumerate(path for path in (data.path, *data.mixture) if path):
        own = reader if path == data.path else None
        questions = question_rows(path, data.video_root, data.question_types, fewest, check, own)
        check_rejected(questions, path, data.max_rejected)
        # Seeds are derived from ids, which are unique within one data set only.
        renamed = [
            dataclasses.replace(row, row_id=f"{number}/{row.row_id}") for row in questions.rows
        ]
        sets.append(dataclasses.replace(questions, rows=renamed) if number else questions)
    rows = (row for questions in sets for row in questions.rows)
    check_subtitles(data, (video for row in rows for video in row.videos))
    return sets


def check_rejected(data: Found, path: str, limit: float) -> None:
    """Refuse a data set of which too much cannot be used."""
    if data.share_rejected > limit:
        raise ValueError(
            f"{path}: {data.summary()}. This is more than "
            f"data.max_rejected={limit:g} allows: `python pipelines/describe.py {path}` tells "
            "more; mend the rows, get the files, set data.video_root, or raise the limit"
        )


def check_subtitles(data: DataSettings, videos: Iterable[VideoRef]) -> None:
    """Refuse to show subtitles that nobody has."""
    if data.subtitles and not any(map(has_subtitles, videos)):
        raise ValueError(
            "data.subtitles=true, but no video has subtitles: put NAME.srt beside NAME.mp4, or "
            "set it to false"
        )


def open_rows(
    data: DataSettings,
    evaluation: EvaluationSettings,
    tell: Callable[[str], None] = lambda line: None,
    check: Check = lambda row: None,
) -> tuple[Questions, list[Row]]:
    """Questions to train on (as ArrayRecord sources) and held-out ones to evaluate on.

    Held-out questions are of `--data`, or of the needle world; no data set shows their videos in
    training.

    Args:
      tell: gets the lines of the report about rows that cannot be used and about the split.
      check: what else a row must pass (`read_questions`).

    Raises:
      ValueError: a question or a video that cannot be read, or too few questions.
    """
    sets = read_questions(data, evaluation, check)
    for line in (line for questions in sets for line in questions.report()):
        tell(line)
    parts = split_sets(data, evaluation, sets)
    tell(parts.report())
    cache = str(Path(data.cache_dir).absolute() / "rows")
    sources = tuple(row_source(rows, cache) for rows in parts.training)
    if len(sources) == 1:
        return sources[0], parts.held_out
    weights = data.weights or tuple(map(len, sources))
    return Mixture(sources, weights), parts.held_out


def split_sets(
    data: DataSettings, evaluation: EvaluationSettings, sets: Sequence[Found[Row]]
) -> QuestionSplit:
    """Training and held-out questions of what `read_questions` gave. Without `--data` they are
    about the needle world, whose videos are written if need be.

    Raises:
      ValueError: nothing would be left to train on.
    """
    rows = [questions.rows for questions in sets]
    if data.path:
        return split(rows, evaluation.rows)
    splits = (questions_of_world(data, split) for split in ("train", evaluation.split))
    training, held_out = ([question.row for question in questions] for questions in splits)
    return apart([training, *rows], one_per_video(held_out)[: evaluation.rows])


def strata(data: DataSettings, split: str) -> dict[str, str]:
    """What evaluations are told apart by, of each row id: how many events the video has. Questions
    of `--data` have nothing of the kind."""
    if data.path:
        return {}
    questions = questions_of_world(data, split)
    return {q.row.row_id: f"{len(q.events)} event{'s' * (len(q.events) > 1)}" for q in questions}
