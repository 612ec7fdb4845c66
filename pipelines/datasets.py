"""Where rows come from: a user's own questions, ParaVT-Parquet, or the needle world."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from paravt_jax.records import Conversation, QuestionType, Row
from pipelines import paravt
from pipelines.media import Bucket, Media
from pipelines.needle.questions import NeedleQuestion, ask
from pipelines.needle.world import NeedleWorld, videos
from pipelines.tables import Record, columns, data_files, records

T = TypeVar("T")

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


@dataclasses.dataclass(frozen=True)
class Found(Generic[T]):
    """What reading a data set gave."""

    rows: list[T]
    rejected: tuple[Rejected, ...] = ()
    buckets: dict[str, Bucket] = dataclasses.field(default_factory=dict)
    """Media files that were looked for, by first path component below the root."""
    left_out: int = 0
    """Rows that can be used and were not asked for."""

    @property
    def total(self) -> int:
        """Rows that were read."""
        return len(self.rows) + len(self.rejected) + self.left_out

    @property
    def share_rejected(self) -> float:
        """Share of the rows that cannot be used."""
        return len(self.rejected) / max(self.total, 1)

    def report(self) -> list[str]:
        """What is missing, in lines for people; none if nothing is."""
        if not self.rejected:
            return []
        lines = [f"{len(self.rejected)} of {self.total} rows cannot be used:"]
        for name, bucket in self.buckets.items():
            if bucket.missing or bucket.unreadable:
                lines.append(
                    f"  {name}: {bucket.missing} of {bucket.files} files missing, "
                    f"{bucket.unreadable} unreadable"
                )
        first = self.rejected[0]
        return [*lines, f"  for example {first.where}: {first.reason}"]

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
        first = next(records(files[0], os.path.dirname(files[0])), None)
        chats = first is not None and "messages" in first.fields
        return ("conversations",) if chats else ("questions",)
    names = [set(columns(file)) for file in files]
    kinds = {"questions": paravt.RL_COLUMNS, "conversations": paravt.SFT_COLUMNS}
    held = tuple(kind for kind, wanted in kinds.items() if any(wanted <= own for own in names))
    if not held:
        raise ValueError(f"{path}: no file has the columns of ParaVT-Parquet, {kinds}")
    return held


def question_rows(
    path: str,
    root: str | None = None,
    question_types: Sequence[str] = (),
    most_videos: int | None = None,
) -> Found[Row]:
    """Questions about videos on this machine.

    Args:
        path: a CSV file with a header or a JSONL file, with columns `video`, `question`,
            `answer`, `question_type` (oe, mcq or tvg; a tvg answer is `start, end` in seconds)
            and, optionally, `row_id` and `evidence` (windows in seconds, `[[start, end], ...]`);
            or a parquet file of ParaVT-Parquet's `rl` configuration; or a folder that holds
            `questions.csv`, `questions.jsonl` or such parquet files.
        root: what video paths are relative to, and may not leave; default: the folder of the
            data, which absolute paths of a CSV or JSONL file may leave.
        question_types: keep only rows of these types; empty keeps all.
        most_videos: reject rows of more videos, which cannot share a frame budget of so many.

    Raises:
        ValueError: a file or a column is missing, a value of a CSV or JSONL file is wrong, or no
            row can be used. The message names file, line and remedy.
    """
    files = _files(path, paravt.RL_COLUMNS)
    make, paths = paravt.rl_row, paravt.rl_videos
    if not files[0].endswith(".parquet"):
        make, paths = own_row, _own_videos
    found = _at_most(_read(path, files, root, make, paths), most_videos)
    kept = [r for r in found.rows if not question_types or r.question_type in question_types]
    if not kept:
        wanted = ", ".join(question_types) or "any type"
        why = found.summary() or "add rows or allow other types"
        raise ValueError(f"{path}: no questions ({wanted}); {why}")
    return dataclasses.replace(found, rows=kept, left_out=len(found.rows) - len(kept))


def _at_most(found: Found[Row], videos: int | None) -> Found[Row]:
    """Without rows of more videos."""
    many = [row for row in found.rows if videos is not None and len(row.videos) > videos]
    if not many:
        return found
    reason = "{} videos are more than the least frame budget; raise data.frame_budgets"
    rejected = [Rejected(row.row_id, reason.format(len(row.videos))) for row in many]
    kept = [row for row in found.rows if len(row.videos) <= (videos or 0)]
    return dataclasses.replace(found, rows=kept, rejected=(*found.rejected, *rejected))


def sft_rows(path: str, root: str | None = None) -> Found[Conversation]:
    """Conversations to learn from.

    Args:
        path: a parquet file of ParaVT-Parquet's `sft` configuration, a folder of them, or a JSONL
            file with a `messages` list per line.
        root: what paths of videos and images are relative to, and may not leave; default: the
            folder of the data.

    Raises:
        ValueError: there is no such file, or no row can be used.
    """
    files = _files(path, paravt.SFT_COLUMNS)
    found = _read(path, files, root, paravt.sft_row, paravt.sft_videos)
    if not found.rows:
        raise ValueError(f"{path}: no conversations; {found.summary() or 'add some'}")
    return found


def _files(path: str, wanted: set[str]) -> list[str]:
    """The files of a data set that have the wanted columns: both configurations may lie together.

    Raises:
        ValueError: there are none.
    """
    files = data_files(path)
    if not files[0].endswith(".parquet"):
        return files
    fitting = [file for file in files if wanted <= set(columns(file))]
    if not fitting:
        raise ValueError(
            f"{path}: no parquet file has the columns {', '.join(sorted(wanted))}; questions "
            "(`rl`) and conversations (`sft`) are different configurations"
        )
    return fitting


Make = Callable[[dict[str, Any], str, Media], T]
"""A typed row from the fields of a record, its id and the files it may show."""
Paths = Callable[[dict[str, Any]], list[str]]
"""Paths of the videos of a record, as written."""


def _read(
    path: str, files: Sequence[str], root: str | None, make: Make[T], paths: Paths
) -> Found[T]:
    folder = path if os.path.isdir(path) else os.path.dirname(files[0])
    media = _media(folder, root, own=not files[0].endswith(".parquet"))
    rows: list[T] = []
    rejected: list[Rejected] = []
    everything = itertools.chain.from_iterable(records(file, folder) for file in files)
    while some := list(itertools.islice(everything, PROBED_TOGETHER)):
        media.probe(written for record in some for written in _attempted(paths, record))
        for record in some:
            try:
                rows.append(make(record.fields, record.row_id, media))
            except BadLine as error:
                raise ValueError(f"{record.where}: {error}") from error
            except ValueError as error:
                rejected.append(Rejected(record.where, str(error)))
    return Found(rows, tuple(rejected), media.buckets)


def _media(folder: str, root: str | None, own: bool) -> Media:
    """The files that a data set may show.

    Args:
        own: the user wrote the data set, which may then name any file absolutely.
    """
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"video root {root}: no such folder; check the path")
    return Media(root or folder, anywhere=own and root is None)


def _attempted(paths: Paths, record: Record) -> list[str]:
    """Paths of a record; none of one that will be rejected for its fields."""
    try:
        return paths(record.fields)
    except ValueError:
        return []


class BadLine(ValueError):
    """A line that its author should correct: it ends the reading."""


def own_row(fields: dict[str, Any], row_id: str, media: Media) -> Row:
    """A question of a CSV or JSONL file.

    Raises:
        BadLine: a value is missing or wrong.
        ValueError: the video is missing or cannot be read.
    """
    missing = [name for name in COLUMNS if fields.get(name) in (None, "")]
    if missing:
        raise BadLine(f"{', '.join(missing)} missing; each question needs {', '.join(COLUMNS)}")
    values = {name: str(fields[name]).strip() for name in COLUMNS}
    if values["question_type"] not in tuple(QuestionType):
        raise BadLine(f"question_type={values['question_type']!r}; use {', '.join(QuestionType)}")
    own_id = fields.get("row_id")
    return Row(
        row_id=row_id if own_id in (None, "") else str(own_id),
        video=media.video(values["video"]),
        question=values["question"],
        answer=values["answer"],
        question_type=values["question_type"],
        evidence=_windows(fields.get("evidence")),
    )


def _own_videos(fields: dict[str, Any]) -> list[str]:
    return [str(fields["video"]).strip()] if fields.get("video") else []


def _windows(value: Any) -> tuple[tuple[float, float], ...]:
    """Windows of an `evidence` column, from JSON if it is a string."""
    try:
        value = json.loads(value) if isinstance(value, str) and value.strip() else value or ()
        windows = tuple((float(start), float(end)) for start, end in value)
    except (TypeError, ValueError) as error:
        raise BadLine(f"evidence={value!r}; write [[start, end], ...] in seconds") from error
    if not all(0 <= start < end for start, end in windows):
        raise BadLine(f"evidence={value!r}; each window needs 0 <= start < end")
    return windows
