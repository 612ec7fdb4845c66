"""The questions of a run: read, checked, mixed, split into training and held-out ones."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from paravt_jax.records import Row, VideoRef
from pipelines.datasets import Found, needle_questions, question_rows
from pipelines.loader import Mixture
from pipelines.subtitles import has_subtitles
from pipelines.tfds_builder import RowSource, row_source
from train.config import Config, DataSettings
from train.setup import needle_world, world_folder

Questions = RowSource[Row] | Mixture


def all_rows(questions: Questions | Sequence[Row]) -> Iterator[Row]:
    """Questions in their order."""
    return (questions[index] for index in range(len(questions)))


def identities(rows: Iterable[Row]) -> Iterator[bytes]:
    """What must be alike wherever these rows are used; where their files are need not be."""
    for row in rows:
        durations = [video.duration for video in row.videos]
        said = row.row_id, row.question, row.answer, row.question_type, row.evidence, durations
        yield repr(said).encode()


def read_questions(config: Config) -> list[Found[Row]]:
    """The questions of `--data` and of each data set that is mixed with it.

    Raises:
      ValueError: a file that cannot be read, or more unusable rows than `data.max_rejected`.
    """
    data = config.data
    budgets = set(data.frame_budgets)
    if config.evaluation.rows:
        budgets.add(config.evaluation.frame_budget)
    sets: list[Found[Row]] = []
    for number, path in enumerate(path for path in (data.path, *data.mixture) if path):
        found = question_rows(path, data.video_root, data.question_types, min(budgets))
        check_rejected(found, path, data.max_rejected)
        # Seeds are derived from ids, which are unique within one data set only.
        named = [dataclasses.replace(row, row_id=f"{number}/{row.row_id}") for row in found.rows]
        sets.append(dataclasses.replace(found, rows=named) if number else found)
    check_subtitles(data, (video for found in sets for row in found.rows for video in row.videos))
    return sets


def check_rejected(found: Found, path: str, limit: float) -> None:
    """Refuse a data set of which too much cannot be used.

    Raises:
      ValueError: the share of rejected rows is above `limit`.
    """
    if found.share_rejected > limit:
        raise ValueError(
            f"{path}: {found.summary()}. This is more than "
            f"data.max_rejected={limit:g} allows: `python pipelines/describe.py {path}` tells "
            "more; get the files, set data.video_root, or raise the limit"
        )


def check_subtitles(data: DataSettings, videos: Iterable[VideoRef]) -> None:
    """Refuse to show subtitles that nobody has.

    Raises:
      ValueError: no video has any.
    """
    if data.subtitles and not any(map(has_subtitles, videos)):
        raise ValueError(
            "data.subtitles=true, but no video has subtitles: put NAME.srt beside NAME.mp4, or "
            "set it to false"
        )


def open_rows(
    config: Config, tell: Callable[[str], None] = lambda line: None
) -> tuple[Questions, list[Row]]:
    """Questions to train on (as ArrayRecord sources) and held-out ones to evaluate on.

    Held-out questions are of `--data`, or of the needle world; no data set shows their videos in
    training.

    Args:
      tell: gets the lines of the report about rows that cannot be used.

    Raises:
      ValueError: a question or a video that cannot be read, or too few questions.
    """
    sets = read_questions(config)
    for line in (line for found in sets for line in found.report()):
        tell(line)
    parts = [found.rows for found in sets]
    if config.data.path:
        parts[0], held_out = split_rows(parts[0], config.evaluation.rows)
    else:
        held_out = _needle_rows(config, "held_out")
        parts.insert(0, _needle_rows(config, "train"))
    held_out = held_out[: config.evaluation.rows]
    parts = [without_videos(rows, held_out) for rows in parts]
    cache = str(Path(config.data.cache_dir).absolute() / "rows")
    sources = tuple(row_source(rows, cache) for rows in parts)
    if len(sources) == 1:
        return sources[0], held_out
    return Mixture(sources, config.data.weights or tuple(map(len, sources))), held_out


def _needle_rows(config: Config, split: str) -> list[Row]:
    questions = needle_questions(
        needle_world(config), world_folder(config), split, config.data.question_types
    )
    rows = [question.row for question in questions]
    return one_per_video(rows) if split == "held_out" else rows


def one_per_video(rows: Sequence[Row]) -> list[Row]:
    """One question about each video, chosen by a hash, so that all kinds of question occur."""
    chosen: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: _hash(row.row_id)):
        chosen.setdefault(row.video.path, row)
    return sorted(chosen.values(), key=lambda row: row.row_id)


def split_rows(rows: Sequence[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Hold out whole videos, those whose names hash lowest, until `held_out` questions are out.

    Raises:
      ValueError: nothing would be left to train on.
    """
    order = sorted(rows, key=lambda row: _hash(os.path.basename(row.video.path)))
    training = without_videos(rows, order[:held_out])
    if not training:
        raise ValueError(
            f"evaluation.rows={held_out} holds out every video of the {len(rows)} questions and "
            "leaves none to train on; lower it"
        )
    return training, order[:held_out]


def without_videos(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """The rows that show no video of any of the other rows."""
    out = {video.path for row in others for video in row.videos}
    return [row for row in rows if not any(video.path in out for video in row.videos)]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
