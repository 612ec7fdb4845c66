"""Records of CSV, JSONL and parquet files.

A file that is not what its name says ends the reading. A row that cannot be read is a record with
a fault, and the rows beside it are kept.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

from paravt_jax.fetched import local_folder
from paravt_jax.protocol import nests_beyond
from paravt_jax.remote import is_remote
from pipelines.faults import FIELD, MALFORMED, Unusable

OWN_FILES = ("questions.csv", "questions.jsonl")
"""What a folder of a user's own questions holds."""
BATCH = 256
"""Records of a parquet file that are in memory at once."""
DEEPEST = 32
"""Levels of lists and dictionaries in a row. Conversations with calls take a dozen; Python reads
more than it can print or compare."""

QUOTES = "close its quotes and double those inside of a field, or shorten the field"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# UTF-16 begins with one of these marks, or has a NUL beside its first letter.
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")

Fields = dict[str, Any]


class Record(NamedTuple):
    """Fields of one row of a file."""

    row_id: str
    """File below the folder of the data, and line (counted from 1) or row (counted from 0)."""
    where: str
    """The same in words, for messages."""
    fields: Fields
    fault: Unusable | None = None
    """Why the row cannot be read; there are no fields then."""


def local_tables(path: str) -> str:
    """Where the tables of a data set can be opened: where they are, or copies of remote ones."""
    if not is_remote(path):
        return path
    folder = local_folder(path, is_table)
    return os.path.join(folder, os.path.basename(path)) if is_table(path) else folder


def is_table(name: str) -> bool:
    """Whether it is a file of records, by its name."""
    return name.endswith((".csv", ".jsonl", ".parquet"))


def data_files(path: str) -> list[str]:
    """The files of a data set: a file, the questions of a folder, or all parquet files below it.

    Raises:
        ValueError: there are none, or of a kind that cannot be read.
    """
    path = local_tables(path)
    if os.path.isfile(path):
        if not is_table(path):
            raise ValueError(f"{path}: give a .csv, .jsonl or .parquet file")
        return [os.path.abspath(path)]
    candidates = [os.path.join(path, name) for name in OWN_FILES]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return [os.path.abspath(candidate)]
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    tables = sorted(os.path.abspath(name) for name in files if name.endswith(".parquet"))
    if not tables:
        raise ValueError(
            f"{path}: give a CSV, JSONL or parquet file, or a folder with {' or '.join(OWN_FILES)} "
            "or parquet files"
        )
    return tables


def columns(file: str) -> list[str]:
    """Names of the columns of a parquet or CSV file.

    Raises:
        ValueError: it is no such file.
    """
    if file.endswith(".parquet"):
        return _open(file).schema_arrow.names
    try:
        return next(_reader(_lines(file)), [])
    except csv.Error as error:
        raise ValueError(f"{file}: its first line names no columns ({error})") from error


def records(file: str, folder: str) -> Iterator[Record]:
    """The records of one file below the folder of a data set.

    Raises:
        ValueError: the file is not what its name says; the message names it.
    """
    kind = os.path.splitext(file)[1]
    read = {".csv": _csv, ".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}[kind]
    word = "row" if kind in (".parquet", ".json") else "line"
    name = os.path.relpath(file, folder)
    for number, row in read(file):
        fields, fault = ({}, row) if isinstance(row, Unusable) else (row, None)
        yield Record(f"{name}:{number}", f"{file}, {word} {number}", fields, fault)


def json_value(text: str, name: str) -> Any:
    """A value from JSON.

    Args:
        name: what the text is, for messages.

    Raises:
        Unusable: it is no JSON, nests too deeply, or holds what cannot be written as UTF-8.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise Unusable(MALFORMED, f"{name} nests too deeply") from error
    except ValueError as error:
        raise Unusable(MALFORMED, f"{name} is not JSON ({error})") from error
    if nests_beyond(value, DEEPEST):
        raise Unusable(MALFORMED, f"{name} nests too deeply, beyond {DEEPEST} levels")
    _check_letters(json.dumps(value, ensure_ascii=False), name)
    return value


def plain_text(value: Any, name: str) -> str:
    """A text or a number as a text without white space around it; "" for nothing.

    A list of numbers, as JSON writes a window of time, becomes "63, 71".

    Raises:
        Unusable: the value is something else.
    """
    if isinstance(value, list) and value and all(map(_is_number, value)):
        return ", ".join(map(str, value))
    if not (value is None or isinstance(value, str) or _is_number(value)):
        raise Unusable(FIELD, f"{name} is a {type(value).__name__}; write a text")
    return "" if value is None else str(value).strip()


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (isinstance(value, int) or math.isfinite(value))


def _check_letters(text: str, name: str) -> None:
    if _LONE_SURROGATE.search(text):
        raise Unusable(MALFORMED, f"{name} holds half of a surrogate pair, which is no letter")


def _lines(file: str) -> Iterator[str]:
    """The lines of a text file with their ends."""
    with open(file, "rb") as raw:
        head = raw.read(2)
    if head in _UTF_16 or b"\0" in head:
        raise ValueError(f"{file} is in UTF-16; save it as UTF-8")
    try:
        # Halves of surrogate pairs spoil their row, not the file.
        with open(file, encoding="utf-8-sig", errors="surrogatepass", newline="") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{file} is not in UTF-8 (byte 0x{byte:02x}), but in Latin-1, Windows-1252 or the "
            "like; save it as UTF-8"
        ) from error


def _reader(lines: Iterator[str]) -> Any:
    """Rows of cells. Quotes must close: else a row would silently swallow those that follow."""
    return csv.reader(lines, strict=True, skipinitialspace=True)


def _csv(file: str) -> Iterator[tuple[int, Fields | Unusable]]:
    """Rows by the line at which they end. Behind a row that cannot be read, reading goes on with
    the next line, which its quotes may have swallowed."""
    lines, header, at = list(_lines(file)), None, 0
    while at < len(lines):
        table, read = _reader(lines[number] for number in range(at, len(lines))), 0
        try:
            for cells in table:
                read = table.line_num
                if header is None:
                    header = cells
                elif cells:
                    yield at + read, _fields(header, cells)
            return
        except csv.Error as error:
            at += read + 1
            yield at, Unusable(MALFORMED, f"{error}; {QUOTES}")


def _fields(header: Sequence[str], cells: Sequence[str]) -> Fields | Unusable:
    if any(cells[len(header) :]):
        return Unusable(
            MALFORMED,
            f"{len(cells)} fields for {len(header)} columns; put quotes around fields with commas",
        )
    try:
        _check_letters("".join(cells), "the row")
    except Unusable as fault:
        return fault
    return dict(itertools.zip_longest(header, cells[: len(header)]))


def _jsonl(file: str) -> Iterator[tuple[int, Fields | Unusable]]:
    for line, text in enumerate(_lines(file), start=1):
        if text.strip():
            yield line, _json_object(text)


def _json(file: str) -> Iterator[tuple[int, Fields | Unusable]]:
    """The objects of one array, as many benchmarks publish their rows."""
    try:
        rows = json_value("".join(_lines(file)), "the file")
    except Unusable as fault:
        raise ValueError(f"{file}: {fault}; download it again") from fault
    if not isinstance(rows, list):
        raise ValueError(f"{file}: holds no JSON array of rows; write [{{...}}, ...]")
    for number, fields in enumerate(rows):
        wrong = Unusable(MALFORMED, "the row is not a JSON object; write {...}")
        yield number, fields if isinstance(fields, dict) else wrong


def _json_object(text: str) -> Fields | Unusable:
    try:
        record = json_value(text, "the row")
    except Unusable as fault:
        return fault
    if not isinstance(record, dict):
        return Unusable(MALFORMED, "the row is not a JSON object; write {...} per line")
    return record


def _parquet(file: str) -> Iterator[tuple[int, Fields | Unusable]]:
    number = 0
    try:
        for batch in _open(file).iter_batches(BATCH):
            for fields in _plain(batch):
                yield number, fields
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{file}: damaged behind row {number} ({error}); download it again"
        ) from error


def _plain(batch: pyarrow.RecordBatch) -> Iterator[Fields | Unusable]:
    """Rows of a batch as Python values."""
    try:
        yield from batch.to_pylist()
    except ValueError:  # A single value spoils the whole batch.
        for number in range(batch.num_rows):
            yield _plain_row(batch.slice(number, 1))


def _plain_row(batch: pyarrow.RecordBatch) -> Fields | Unusable:
    try:
        return batch.to_pylist()[0]
    except ValueError as error:
        return Unusable(MALFORMED, f"a value that cannot be read ({error})")


def _open(file: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: no parquet file ({error}); download it again") from error
