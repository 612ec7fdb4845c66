"""Results of samples as JSON lines: written one by one, read back after whatever happened."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from evaluate.benchmarks.sample import SampleResult

SAMPLES, REPORT = "samples.jsonl", "report.json"
"""Files of an evaluation: a line for each sample, and the report made from them."""
_FIELDS = {field.name for field in dataclasses.fields(SampleResult)}


def line(result: SampleResult) -> str:
    """A result as a line with its end."""
    return json.dumps(dataclasses.asdict(result), ensure_ascii=False) + "\n"


def append(path: Path, results: Iterable[SampleResult]) -> None:
    """Add lines that outlive a kill of this process right afterwards.

    A line that a kill left half written is closed first, so that it spoils no other.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write("".join(map(line, results)).encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[SampleResult]:
    """The results in a file, in its order; of several of one sample the last. Lines that a kill cut
    off are left out.

    Raises:
        ValueError: a whole line is no result.
        OSError: the file cannot be read.
    """
    by_sample: dict[tuple[str, str], SampleResult] = {}
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, start=1):
        try:
            fields = json.loads(text) if text.strip() else None
        except ValueError:
            continue  # cut off: its sample is asked again
        if fields is None:
            continue
        if not isinstance(fields, dict) or not {"task", "sample_id"} <= fields.keys():
            raise ValueError(f"{path}, line {number}: no result of a sample; give {SAMPLES}")
        try:
            result = SampleResult(**{name: fields[name] for name in _FIELDS & fields.keys()})
        except TypeError as error:
            raise ValueError(f"{path}, line {number}: no result of a sample ({error})") from error
        by_sample[result.task, result.sample_id] = result
    return list(by_sample.values())


def read_run(path: str) -> tuple[str, list[SampleResult]]:
    """The name and the results of an evaluation, from its folder, its report or its lines.

    Raises:
        ValueError: there are none.
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    lines = place if place.suffix == ".jsonl" else folder / SAMPLES
    if not lines.is_file():
        raise ValueError(f"{path}: no {SAMPLES} there; give the folder of an evaluation")
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        name = f"{report['model']}, {report['protocol']['name']}, {report['mode']}"
        name += f", judged by {report['judge']}" if report["judge"] else ""
    except (OSError, ValueError, KeyError, TypeError):
        name = str(folder)
    return name, read(lines)
