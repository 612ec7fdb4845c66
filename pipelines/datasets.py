"""Where question rows come from: a user's own file, or the needle world."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from paravt_jax.records import QuestionType, Row, VideoRef
from pipelines.decode import video_ref
from pipelines.needle.questions import NeedleQuestion, ask
from pipelines.needle.world import NeedleWorld, videos

COLUMNS = ("video", "question", "answer", "question_type")
FILES = ("questions.csv", "questions.jsonl")


def needle_questions(
    world: NeedleWorld, cache_dir: str, split: str, question_types: Sequence[str]
) -> list[NeedleQuestion]:
    """Questions about one split of the needle world, whose videos are written if need be.

    Raises:
        ValueError: the split or a question type does not exist.
    """
    return ask(videos(world, cache_dir, split), question_types)


def folder_rows(path: str, question_types: Sequence[str] = ()) -> list[Row]:
    """Questions about a user's own videos.

    Args:
        path: a CSV file with a header or a JSONL file, with columns `video`, `question`,
            `answer`, `question_type` (oe, mcq or tvg; a tvg answer is `start, end` in seconds)
            and, optionally, `row_id`; or a folder that holds `questions.csv` or
            `questions.jsonl`. Videos are paths relative to the file, or absolute ones.
        question_types: keep only rows of these types; empty keeps all.

    Raises:
        ValueError: a file or a column is missing, a value is wrong, or a video cannot be read.
            The message names file, line and remedy.
    """
    file = _question_file(path)
    refs: dict[str, VideoRef] = {}
    rows = [_row(record, file, line, refs) for line, record in _records(file)]
    kept = [row for row in rows if not question_types or row.question_type in question_types]
    if not kept:
        wanted = ", ".join(question_types) or "any type"
        raise ValueError(f"{file}: no questions ({wanted}); add rows or allow other types")
    return kept


def _question_file(path: str) -> str:
    candidates = [path] if os.path.isfile(path) else [os.path.join(path, f) for f in FILES]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return os.path.abspath(candidate)
    raise ValueError(f"{path}: give a CSV or JSONL file, or a folder with {' or '.join(FILES)}")


def _records(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields of each question."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        if file.endswith(".csv"):
            table = csv.DictReader(stream)
            for record in table:
                yield table.line_num, record
            return
        for line, text in enumerate(stream, start=1):
            if text.strip():
                yield line, _json_object(text, file, line)


def _json_object(text: str, file: str, line: int) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {line}: not JSON ({error}); write one object") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file}, line {line}: not a JSON object; write {{...}} per line")
    return record


def _row(record: dict[str, Any], file: str, line: int, refs: dict[str, VideoRef]) -> Row:
    where = f"{file}, line {line}"
    missing = [name for name in COLUMNS if record.get(name) in (None, "")]
    if missing:
        raise ValueError(
            f"{where}: {', '.join(missing)} missing; each question needs {', '.join(COLUMNS)}"
        )
    values = {name: str(record[name]).strip() for name in COLUMNS}
    if values["question_type"] not in tuple(QuestionType):
        raise ValueError(
            f"{where}: question_type={values['question_type']!r}; use {', '.join(QuestionType)}"
        )
    path = os.path.join(os.path.dirname(file), values.pop("video"))
    row_id = record.get("row_id")
    return Row(
        row_id=f"{os.path.basename(file)}:{line}" if row_id in (None, "") else str(row_id),
        video=_reference(path, where, refs),
        **values,
    )


def _reference(path: str, where: str, refs: dict[str, VideoRef]) -> VideoRef:
    """Probe each video once, however many questions ask about it."""
    if path not in refs:
        try:
            refs[path] = video_ref(path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return refs[path]
