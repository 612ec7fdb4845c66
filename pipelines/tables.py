"""Records of CSV, JSONL and parquet files."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

OWN_FILES = ("questions.csv", "questions.jsonl")
"""What a folder of a user's own questions holds."""
BATCH = 256
"""Records of a parquet file that are in memory at once."""


class Record(NamedTuple):
    """Fields of one row of a file."""

    row_id: str
    """File below the folder of the data, and line (counted from 1) or row (counted from 0)."""
    where: str
    """The same in words, for messages."""
    fields: dict[str, Any]


def data_files(path: str) -> list[str]:
    """The files of a data set: a file, the questions of a folder, or all parquet files below it.

    Raises:
        ValueError: there are none, or of a kind that cannot be read.
    """
    if os.path.isfile(path):
        if not path.endswith((".csv", ".jsonl", ".parquet")):
            raise ValueError(f"{path}: give a .csv, .jsonl or .parquet file")
        return [os.path.abspath(path)]
    own = [os.path.join(path, name) for name in OWN_FILES]
    for candidate in own:
        if os.path.isfile(candidate):
            return [os.path.abspath(candidate)]
    found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    tables = sorted(os.path.abspath(name) for name in found if name.endswith(".parquet"))
    if not tables:
        raise ValueError(
            f"{path}: give a CSV, JSONL or parquet file, or a folder with {' or '.join(OWN_FILES)} "
            "or parquet files"
        )
    return tables


def columns(file: str) -> list[str]:
    """Names of the columns of a parquet file.

    Raises:
        ValueError: it is no parquet file.
    """
    return _open(file).schema_arrow.names


def records(file: str, folder: str) -> Iterator[Record]:
    """The records of one file below the folder of a data set.

    Raises:
        ValueError: the file is not what its name says; the message names file and line.
    """
    kind = os.path.splitext(file)[1]
    read = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[kind]
    word = "row" if kind == ".parquet" else "line"
    name = os.path.relpath(file, folder)
    for number, fields in read(file):
        yield Record(f"{name}:{number}", f"{file}, {word} {number}", fields)


def _csv(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(file, encoding="utf-8-sig", newline="") as stream:
        table = csv.DictReader(stream)
        for record in table:
            yield table.line_num, record


def _jsonl(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(file, encoding="utf-8-sig") as stream:
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


def _parquet(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in _open(file).iter_batches(BATCH):
        for fields in batch.to_pylist():
            yield number, fields
            number += 1


def _open(file: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: no parquet file ({error}); download it again") from error
