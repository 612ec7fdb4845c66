"""Where rows come from: a user's own questions, ParaVT-Parquet, or the needle world."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import posixpath
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from paravt_jax.records import Conversation, QuestionType, Row
from paravt_jax.remote import is_remote
from pipelines import paravt
from pipelines.answers import normalised_answer
from pipelines.faults import FIELD, REPEATED, VIDEOS, Unusable, one_line
from pipelines.media import Bucket, Media, RemoteMedia
from pipelines.needle.questions import NeedleQuestion, ask
from pipelines.needle.world import NeedleWorld, videos
from pipelines.tables import (
    Record,
    columns,
    data_files,
    is_table,
    json_value,
    local_tables,
    plain_text,
    records,
)

T = TypeVar("T")

Make = Callable[[dict[str, Any], str, Media], T]
"""A typed row from the fields of a record, its id and the files it may show."""
Paths = Callable[[dict[str, Any]], list[str]]
"""Paths of the videos of a record, as written."""

COLUMNS = ("video", "question", "answer", "question_type")
PROBED_TOGETHER = 1024
"""Records whose videos are opened side by side."""


def needle_questions(
    world: NeedleWorld, cache_dir: str, split: str, question_types: Sequence[str]
) -> list[NeedleQuestion]:
    """Questions about one split of the needle world, whose videos are written if need be.

    Raises:
        ValueError: the split or a question type does not exist.
    """
    return ask(videos(world, cache_dir, split), question_types)


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that cannot be used."""

    where: str
    """File, and line or row."""
    reason: str
    """What is wrong, in one line."""
    kind: str = FIELD
    """Name of the fault, by which it is counted."""

    @classmethod
    def of(cls, where: str, error: ValueError) -> Rejected:
        """The record at a place that an error makes unusable."""
        return cls(where, one_line(str(error)), getattr(error, "kind", FIELD))


@dataclasses.dataclass(frozen=True)
class Found(Generic[T]):
    """What reading a data set gave."""

    rows: list[T]
    rejected: tuple[Rejected, ...] = ()
    buckets: dict[str, Bucket] = dataclasses.field(default_factory=dict)
    """Media files that were looked for, by first path component below the root."""
    left_out: int = 0
    """Rows that can be used and were not asked for."""
    restated: int = 0
    """Rows whose answer was put as rewards read it: the letter of an option."""

    @property
    def total(self) -> int:
        """Rows that were read."""
        return len(self.rows) + len(self.rejected) + self.left_out

    @property
    def share_rejected(self) -> float:
        """Share of the rows that cannot be used."""
        return len(self.rejected) / max(self.total, 1)

    @property
    def faults(self) -> dict[str, list[Rejected]]:
        """Rejected rows by the name of their fault, the most frequent first."""
        by_kind: dict[str, list[Rejected]] = {}
        for rejected in self.rejected:
            by_kind.setdefault(rejected.kind, []).append(rejected)
        return dict(sorted(by_kind.items(), key=lambda item: -len(item[1])))

    def report(self) -> list[str]:
        """What cannot be used, by reason, in lines for people; none if everything can."""
        lines: list[str] = []
        if self.restated:
            lines.append(f"{self.restated} choice answers were read as the letter of an option")
        if not self.rejected:
            return lines
        lines.append(f"{len(self.rejected)} of {self.total} rows cannot be used:")
        for name, bucket in self.buckets.items():
            if bucket.missing or bucket.unreadable:
                lines.append(
                    f"  {name}: {bucket.missing} of {bucket.files} files missing, "
                    f"{bucket.unreadable} unreadable"
                )
        for kind, rows in self.faults.items():
            first = f"for example {rows[0].where}: {rows[0].reason}"
            lines.append(f"  {len(rows)} x {kind}, {first}")
        return lines

    def summary(self) -> str:
        """The report in one line."""
        return "; ".join(line.strip().rstrip(":") for line in self.report())


def contents(path: str) -> tuple[str, ...]:
    """What a data set holds: `questions`, `conversations`, or both.

    Raises:
        ValueError: there is no such data set, or it holds neither.
    """
    files = data_files(path)
    if not files[0].endswith(".parquet"):
        every = records(files[0], os.path.dirname(files[0]))
        first = next((record for record in every if not record.fault), None)
        chats = first is not None and "messages" in first.fields
        return ("conversations",) if chats else ("questions",)
    names = [set(columns(file)) for file in files]
    kinds = {"questions": paravt.RL_COLUMNS, "conversations": paravt.SFT_COLUMNS}
    present = tuple(
        kind for kind, required in kinds.items() if any(required <= header for header in names)
    )
    if not present:
        raise ValueError(f"{path}: no file has the columns of ParaVT-Parquet, {kinds}")
    return present


def question_rows(
    path: str,
    root: str | None = None,
    question_types: Sequence[str] = (),
    most_videos: int | None = None,
    check: Callable[[Row], object] = lambda row: None,
    reader: Make[Row] | None = None,
) -> Found[Row]:
    """Questions about videos on this machine.

    Args:
        path: a CSV file with a header or a JSONL file, with columns `video`, `question`,
            `answer`, `question_type` (oe, mcq or tvg; a tvg answer is `start, end` in seconds)
            and, optionally, `row_id` and `evidence` (windows in seconds, `[[start, end], ...]`);
            or a parquet file of ParaVT-Parquet's `rl` configuration; or a folder that holds
            `questions.csv`, `questions.jsonl` or such parquet files.
        root: what video paths are relative to, and may not leave; default: the folder of the
            data, which absolute paths of a CSV or JSONL file, and links beside it, may leave.
        question_types: keep only rows of these types; empty keeps all.
        most_videos: reject rows of more videos, which cannot share a frame budget of so many.
        check: raises a `ValueError` for a row that cannot be used for another reason.
        reader: makes a question of a record with columns of its own: gets the record's fields by
            name, an id and the `Media` that finds its video; raises `ValueError` for a record
            that cannot be used.

    Raises:
        ValueError: a file or a column is missing, a file is damaged, or no row can be used. The
            message names the file, a line, and the remedy.
    """
    files = data_files(path) if reader else _files(path, paravt.RL_COLUMNS)
    make, paths = paravt.rl_row, paravt.rl_videos
    if reader:
        # Which of a user's fields are paths is known when the reader asks for the video.
        make, paths = _guarded(reader), lambda fields: []
    elif not files[0].endswith(".parquet"):
        make, paths = own_row, _own_videos
    usable = _Usable(make, most_videos, check)
    data = _read(path, files, root, usable, paths)
    rows = [r for r in data.rows if not question_types or r.question_type in question_types]
    if not rows:
        types = ", ".join(question_types) or "any type"
        why = data.summary() or "add rows or allow other types"
        raise ValueError(f"{path}: no questions ({types}); {why}")
    left_out = len(data.rows) - len(rows)
    return dataclasses.replace(data, rows=rows, left_out=left_out, restated=usable.restated)


class _Usable:
    """Makes questions of records, and refuses those that a run could not use."""

    def __init__(
        self, make: Make[Row], most_videos: int | None, check: Callable[[Row], object]
    ) -> None:
        self._make, self._most, self._check = make, most_videos, check
        self._ids: set[str] = set()
        self.restated = 0
        """Answers that were put in another way so far."""

    def __call__(self, fields: dict[str, Any], row_id: str, media: Media) -> Row:
        """The question of a record.

        Raises:
            ValueError: it cannot be used.
        """
        written = self._make(fields, row_id, media)
        row = normalised_answer(written)
        if self._most is not None and len(row.videos) > self._most:
            raise Unusable(
                VIDEOS,
                f"{len(row.videos)} videos are more than the least frame budget; raise "
                "data.frame_budgets",
            )
        if row.row_id in self._ids:
            raise Unusable(REPEATED, f"row_id {row.row_id!r} was used before; make it unique")
        self._check(row)
        self._ids.add(row.row_id)
        self.restated += row.answer != written.answer
        return row


def sft_rows(
    path: str,
    root: str | None = None,
    check: Callable[[Conversation], object] = lambda row: None,
) -> Found[Conversation]:
    """Conversations to learn from.

    Args:
        path: a parquet file of ParaVT-Parquet's `sft` configuration, a folder of them, or a JSONL
            file with a `messages` list per line.
        root: what paths of videos and images are relative to, and may not leave; default: the
            folder of the data.
        check: raises a `ValueError` for a row that cannot be used for another reason.

    Raises:
        ValueError: there is no such file, or no row can be used.
    """
    files = _files(path, paravt.SFT_COLUMNS)

    def make(fields: dict[str, Any], row_id: str, media: Media) -> Conversation:
        row = paravt.sft_row(fields, row_id, media)
        check(row)
        return row

    data = _read(path, files, root, make, paravt.sft_videos)
    if not data.rows:
        raise ValueError(f"{path}: no conversations; {data.summary() or 'add some'}")
    return data


def _files(path: str, required: set[str]) -> list[str]:
    """Files of a data set that have the wanted columns: both configurations may lie together."""
    files = data_files(path)
    if files[0].endswith(".csv"):
        _check_header(files[0])
    if not files[0].endswith(".parquet"):
        return files
    fitting = [file for file in files if required <= set(columns(file))]
    if not fitting:
        raise ValueError(
            f"{path}: no parquet file has the columns {', '.join(sorted(required))}; questions "
            "(`rl`) and conversations (`sft`) are different configurations"
        )
    return fitting


def _check_header(file: str) -> None:
    """Refuse a CSV file that does not name its columns."""
    header = columns(file)
    if missing := [name for name in COLUMNS if name not in header]:
        first_line = one_line(",".join(header))
        raise ValueError(
            f"{file}: no column {', '.join(missing)}; its first line is {first_line!r}. Write "
            f"`{','.join(COLUMNS)}`, separated by commas"
        )


def _read(
    path: str, files: Sequence[str], root: str | None, make: Make[T], paths: Paths
) -> Found[T]:
    here = local_tables(path)
    folder = here if os.path.isdir(here) else os.path.dirname(files[0])
    # Videos stay where they are.
    beside = (posixpath.dirname(path) if is_table(path) else path) if is_remote(path) else folder
    media = _media(beside, root, trusted=not files[0].endswith(".parquet"))
    rows: list[T] = []
    rejected: list[Rejected] = []
    everything = itertools.chain.from_iterable(records(file, folder) for file in files)
    while some := list(itertools.islice(everything, PROBED_TOGETHER)):
        media.probe(written for record in some for written in _attempted(paths, record))
        for record in some:
            try:
                rows.append(_made(make, record, media))
            except ValueError as error:
                rejected.append(Rejected.of(record.where, error))
    return Found(rows, tuple(rejected), media.buckets)


def _media(folder: str, root: str | None, trusted: bool) -> Media:
    """The files that a data set may show.

    Args:
        trusted: the user wrote the data set, which may then name any file absolutely, or through a
            link beside it.
    """
    if is_remote(root or folder):
        return RemoteMedia(root or folder)
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"video root {root}: no such folder; check the path")
    return Media(root or folder, trusted=trusted and root is None)


def _made(make: Make[T], record: Record, media: Media) -> T:
    if record.fault is not None:
        raise record.fault
    return make(record.fields, record.row_id, media)


def _attempted(paths: Paths, record: Record) -> list[str]:
    """Paths of a record; none of one that will be rejected for its fields."""
    try:
        return [] if record.fault else paths(record.fields)
    except ValueError:
        return []


def own_row(fields: dict[str, Any], row_id: str, media: Media) -> Row:
    """A question of a CSV or JSONL file.

    Raises:
        ValueError: a value is missing or wrong, or the video cannot be found or read.
    """
    values = {name: plain_text(fields.get(name), name) for name in COLUMNS}
    if missing := [name for name, value in values.items() if not value]:
        raise Unusable(
            FIELD, f"{', '.join(missing)} missing; each question needs {', '.join(COLUMNS)}"
        )
    if values["question_type"] not in tuple(QuestionType):
        raise Unusable(
            FIELD, f"question_type={values['question_type']!r}; use {', '.join(QuestionType)}"
        )
    return Row(
        row_id=plain_text(fields.get("row_id"), "row_id") or row_id,
        video=media.video(values["video"]),
        question=values["question"],
        answer=values["answer"],
        question_type=values["question_type"],
        evidence=_windows(fields.get("evidence")),
    )


def _guarded(reader: Make[Row]) -> Make[Row]:
    """A user's reader, whose every failure rejects one record and says which function failed."""
    name = getattr(reader, "__name__", repr(reader))

    def make(fields: dict[str, Any], row_id: str, media: Media) -> Row:
        try:
            row = reader(fields, row_id, media)
        except ValueError:
            raise
        except Exception as error:
            raise Unusable(FIELD, f"{name}: {type(error).__name__}: {error}") from error
        if not isinstance(row, Row):
            raise Unusable(FIELD, f"{name} returned {type(row).__name__}, not a Row")
        return row

    return make


def _own_videos(fields: dict[str, Any]) -> list[str]:
    video = plain_text(fields.get("video"), "video")
    return [video] if video else []


def _windows(value: Any) -> tuple[tuple[float, float], ...]:
    """Windows of an `evidence` column, from JSON if it is a string."""
    if isinstance(value, str):
        value = json_value(value, "evidence") if value.strip() else ()
    try:
        windows = tuple((float(start), float(end)) for start, end in value or ())
    except (TypeError, ValueError, OverflowError) as error:
        raise Unusable(
            FIELD, f"evidence={value!r}; write [[start, end], ...] in seconds"
        ) from error
    if not all(0 <= start < end < math.inf for start, end in windows):
        raise Unusable(FIELD, f"evidence={value!r}; each window needs 0 <= start < end")
    return windows
