"""Published rows to samples: the seven splits, and files of one's own.

Local copies lie below one root, each split in its folder, as lmms-eval's cache has them:

    ROOT/videomme/         test*.parquet     data/VIDEOID.mp4     subtitle/VIDEOID.srt
    ROOT/longvideobench/   validation*.parquet or lvb_val.json    videos/     subtitles/
    ROOT/lvbench/  ROOT/mlvu/  ROOT/mmvu/  ROOT/charades_sta/  ROOT/timelens/

Annotations may also be .jsonl, .json or .csv; they and the videos are looked for in the folder and
in those below it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evaluate.benchmarks.sample import MANY, Kind, Sample, Window
from paravt_jax.settings import any_of
from pipelines.faults import FIELD, Unusable, one_line
from pipelines.tables import Fields, json_value, records

ENDINGS = (".parquet", ".jsonl", ".json", ".csv")
_VIDEO_FOLDERS = ("", "data", "videos", "video", "all_videos", "Charades_v1_480", "videos/charades")
_VIDEO_ENDINGS = ("", ".mp4", ".MP4", ".mkv", ".webm", ".avi")
_OPTION = re.compile(r"\n(?:\(([A-J])\)|([A-J])[.)])\s+")


class Places:
    """Finds the media of one split below its folder, or below others."""

    def __init__(self, folder: Path, *others: Path) -> None:
        self.folder, self._folders = folder, (folder, *others)

    def video(self, name: str) -> str:
        """Where a video is; where it should be, if it is nowhere."""
        name = _relative(self._below(name))
        tails = [name + ending for ending in _VIDEO_ENDINGS]
        names = [*tails, os.path.basename(name)]
        for folder, below in itertools.product(self._folders, _VIDEO_FOLDERS):
            for tail in names:
                path = folder / below / tail
                if path.is_file():
                    return str(path)
        for tail in names:
            if path := self._elsewhere.get(os.path.basename(tail)):
                return path
        return str(self.folder / (name if os.path.splitext(name)[1] else f"{name}.mp4"))

    def _below(self, name: str) -> str:
        """An absolute path as seen from the folder that it lies in."""
        path = Path(name)
        folder = next((f for f in self._folders if path.is_relative_to(f)), None)
        return name if folder is None else str(path.relative_to(folder))

    @functools.cached_property
    def _elsewhere(self) -> dict[str, str]:
        """Files anywhere below by their names, empty for a name that several have: archives are
        unpacked into all kinds of folders."""
        paths: dict[str, str] = {}
        for below, _, names in os.walk(self.folder):
            for name in names:
                paths[name] = "" if name in paths else os.path.join(below, name)
        return paths

    def subtitles(self, name: str, *folders: str) -> str:
        """Where a file of subtitles is, or should be."""
        for below in folders:
            if (self.folder / below / name).is_file():
                return str(self.folder / below / name)
        return str(self.folder / folders[0] / name)


Make = Callable[[str, int, Fields, Places], Sample]


@dataclasses.dataclass(frozen=True)
class Split:
    """Where the rows of a task lie, and how they become samples."""

    folder: str
    """Below the root."""
    files: tuple[str, ...]
    """Names of the annotations without ending, `*` for anything; the first that is there counts."""
    make: Make
    keep: Callable[[Fields], bool] = lambda fields: True
    """Which rows belong to the task."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The rows of a task."""

    samples: list[Sample]
    faults: list[str]
    """Rows that are no question, one line each: place and reason. They count as errors."""


def load(task: str, root: str) -> Loaded:
    """The samples of a task, in the order of its rows.

    Args:
        task: a name of `TASKS` or `ALIASES`, or a .csv, .jsonl, .json or .parquet file of one's
            own.
        root: the folder that holds the local copies; videos of one's own file lie beside it, or
            here.

    Raises:
        ValueError: there is no such task, or nothing of it below the root.
    """
    if task.endswith(ENDINGS):
        places = Places(Path(task).resolve().parent, Path(root).resolve())
        return _read(Path(task).stem, [task], _own, places)
    name = ALIASES.get(task, task)
    if name not in TASKS:
        raise ValueError(
            f"--benchmarks {task}: choose {any_of(TASKS)}, or give a file that ends in "
            f"{any_of(ENDINGS)}"
        )
    split = TASKS[name]
    folder = Path(root) / split.folder
    return _read(name, _annotations(name, folder, split.files), split.make, Places(folder), split)


def _annotations(task: str, folder: Path, names: Sequence[str]) -> list[str]:
    for name in names:
        for ending in ENDINGS:
            paths = sorted(str(path) for path in folder.rglob(name + ending))
            if paths:
                return paths
    raise ValueError(
        f"--data: {folder} holds no rows of {task}; put {any_of(names)} with one of the endings "
        f"{any_of(ENDINGS)} there, and the videos below it"
    )


def _read(
    task: str, files: Sequence[str], make: Make, places: Places, split: Split | None = None
) -> Loaded:
    loaded = Loaded([], [])
    for where, fields, fault in _rows(files):
        if split is not None and fault is None and not split.keep(fields):
            continue
        number = len(loaded.samples) + len(loaded.faults)
        try:
            if fault is not None:
                raise fault
            loaded.samples.append(make(task, number, fields, places))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else str(error)
            loaded.faults.append(one_line(f"{where}: {why}"))
    _check_unique(task, loaded.samples)
    return loaded


def _rows(files: Sequence[str]) -> Iterator[tuple[str, Fields, Unusable | None]]:
    for file in files:
        for record in records(file, os.path.dirname(file)):
            yield record.where, record.fields, record.fault


def _check_unique(task: str, samples: Sequence[Sample]) -> None:
    seen: set[str] = set()
    for sample in samples:
        if sample.sample_id in seen:
            raise ValueError(
                f"{task}: two rows have the id {sample.sample_id!r}; give each its own"
            )
        seen.add(sample.sample_id)


# --- The splits -----------------------------------------------------------------------------------


def _videomme(task: str, number: int, row: Fields, places: Places) -> Sample:
    # videoID names the video and is not unique: each has three questions.
    return Sample(
        task,
        str(row["question_id"]),
        number,
        row,
        Kind.CHOICE,
        places.video(row["videoID"]),
        row["question"],
        _letter(row["answer"]),
        row["videoID"],
        tuple(_listed(row["options"], "options")),
        _groups(row, duration="duration", domain="domain", category="task_type"),
        places.subtitles(f"{row['videoID']}.srt", "subtitle", "subtitles"),
    )


def _longvideobench(task: str, number: int, row: Fields, places: Places) -> Sample:
    options = [row.get(f"option{number}") for number in range(5)]
    if "candidates" in row and not any(options):
        options = _listed(row["candidates"], "candidates")  # lvb_val.json
    choices = tuple(str(option) for option in options if option not in (None, "", "N/A"))
    return Sample(
        task,
        str(row["id"]),
        number,
        row,
        Kind.CHOICE,
        places.video(row["video_path"]),
        row["question"],
        chr(ord("A") + int(row["correct_choice"])),
        str(row.get("video_id") or row["video_path"]),
        choices,
        _groups(row, duration="duration_group", category="question_category"),
        places.subtitles(str(row.get("subtitle_path") or ""), "subtitles"),
    )


def _lvbench(task: str, number: int, row: Fields, places: Places) -> Sample:
    kinds = row.get("question_type") or ""
    groups = {"category": kinds if isinstance(kinds, str) else MANY.join(kinds)}
    return Sample(
        task,
        str(row["uid"]),
        number,
        row,
        Kind.CHOICE,
        places.video(row["video_path"]),
        row["question"],
        _letter(row["answer"]),
        row["video_path"],
        _inline(row["question"]),
        groups,
    )


def _mlvu(task: str, number: int, row: Fields, places: Places) -> Sample:
    # question_id counts within each file of a task type: the number of the row is unique.
    options = tuple(_listed(row["candidates"], "candidates"))
    return Sample(
        task,
        f"{row['task_type']}-{number}",
        number,
        row,
        Kind.CHOICE,
        places.video(row["video_name"]),
        row["question"],
        _letter_or_text(row["answer"], options),
        row["video_name"],
        options,
        {"category": row["task_type"]},
    )


def _mmvu(task: str, number: int, row: Fields, places: Places) -> Sample:
    written = row.get("video_path") or row["video"]
    path = written.partition("/main/")[2] or written
    choice = row["question_type"] == "multiple-choice"
    choices = row.get("choices") or {}
    if isinstance(choices, str):
        choices = json_value(choices, "choices")
    options = [choices.get(letter) for letter in "ABCDE"]
    return Sample(
        task,
        str(row["id"]),
        number,
        row,
        Kind.CHOICE if choice else Kind.OPEN,
        places.video(path),
        row["question"],
        str(row["answer"]).strip(),
        path,
        tuple(str(option) for option in options if option) if choice else (),
        _mmvu_groups(path),
    )


def _mmvu_groups(path: str) -> dict[str, str]:
    subject = path.split("/")[-2] if "/" in path else ""
    return {"subject": subject, "category": DISCIPLINES.get(subject, "unknown")}


def _charades(task: str, number: int, row: Fields, places: Places) -> Sample:
    return Sample(
        task,
        str(number),
        number,
        row | {"timestamp": list(_window(row["timestamp"]))},
        Kind.GROUNDING,
        places.video(row["video"]),
        row["caption"],
        _window(row["timestamp"]),
        row["video"],
    )


def _timelens(task: str, number: int, row: Fields, places: Places) -> Sample:
    spans = row["span"]
    first = (json_value(spans, "span") if isinstance(spans, str) else spans)[0]
    return Sample(
        task,
        str(number),
        number,
        row,
        Kind.GROUNDING,
        places.video(row["video_path"]),
        row["query"],
        _window(first),  # lmms-eval and TimeLens compare with the first of several
        row["video_path"],
    )


def _own(task: str, number: int, row: Fields, places: Places) -> Sample:
    """A row `video, question, answer`, with `options` (a JSON list, or parted by `|`; else those in
    the question), `kind` (`mcq`, `open`, `grounding`, or as in training `question_type`), `id` and
    `subtitles` if wanted. Other columns break figures down."""
    question = str(row["question"])
    if not question.strip():
        raise Unusable(FIELD, "question is empty")
    options = tuple(_options(row.get("options"))) or _inline(question)
    kind, video = _own_kind(row, bool(options)), str(row["video"])
    columns = {"video", "question", "answer", "options", "kind", "id", "subtitles", "question_type"}
    others = {name: name for name in row if name not in columns}
    beside = os.path.splitext(places.video(video))[0] + ".srt"
    subtitles = row.get("subtitles")
    answer = row["answer"]
    return Sample(
        task,
        str(row.get("id") or number),
        number,
        row,
        kind,
        places.video(video),
        question,
        _own_gold(answer, kind, options),
        video,
        options,
        _groups(row, **others),
        str(places.folder / subtitles) if subtitles else beside,
    )


_KINDS = {"mcq": Kind.CHOICE, "open": Kind.OPEN, "oe": Kind.OPEN, "grounding": Kind.GROUNDING}
_KINDS |= {"tvg": Kind.GROUNDING}


def _own_kind(row: Fields, has_options: bool) -> Kind:
    written = row.get("kind") or row.get("question_type") or ("mcq" if has_options else "open")
    if written not in _KINDS:
        raise Unusable(FIELD, f"kind={written!r}: write {any_of(_KINDS)}")
    return _KINDS[written]


def _own_gold(answer: Any, kind: Kind, options: Sequence[str]) -> str | Window:
    if kind is Kind.GROUNDING:
        return _window(answer)
    if kind is Kind.CHOICE:
        return _letter_or_text(answer, options)
    return str(answer).strip()


def _options(written: Any) -> list[str]:
    if not written:
        return []
    if isinstance(written, str) and not written.lstrip().startswith("["):
        return [option.strip() for option in written.split("|")]
    return _listed(written, "options")


# --- Fields ---------------------------------------------------------------------------------------


def _relative(name: str) -> str:
    """A path below the folder, whatever a row says: no data set chooses which other files of this
    machine are opened."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        raise Unusable(FIELD, f"the video {name!r} names no file")
    return "/".join(parts)


def _listed(value: Any, name: str) -> list[str]:
    options = json_value(value, name) if isinstance(value, str) else value
    if not isinstance(options, list):
        raise Unusable(FIELD, f"{name}={value!r} is no list")
    return [str(option) for option in options]


def _letter(value: Any) -> str:
    letter = str(value).strip()
    if not re.fullmatch("[A-J]", letter):
        raise Unusable(FIELD, f"answer={value!r} is no option letter")
    return letter


def _letter_or_text(value: Any, options: Sequence[str]) -> str:
    """A letter, also where the text of an option is published, as in MLVU's own files."""
    text = str(value).strip()
    return chr(ord("A") + options.index(text)) if text in options else _letter(text)


def _window(value: Any) -> Window:
    """Start and end as published: Charades-STA has them in half precision, 24.3 as 24.296875."""
    ends = json_value(_bracketed(value), "the window") if isinstance(value, str) else value
    start, end = (float(number) for number in ends)
    return start, end


def _bracketed(text: str) -> str:
    return text if text.lstrip().startswith("[") else f"[{text}]"


def _inline(question: str) -> tuple[str, ...]:
    """The options that stand in a question, `(A) ...` or `A. ...` at the beginning of lines."""
    return tuple(text.strip() for text in _OPTION.split(question)[3::3])


def _groups(row: Fields, **columns: str) -> dict[str, str]:
    values = {name: row.get(column) for name, column in columns.items()}
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


_SCIENCE = (
    "Biology Chemistry Modern_Physics Astronomy Geography Materials_Science Neurobiology "
    "Electromagnetism Thermodynamics Mechanics"
)
_ENGINEERING = (
    "Civil_Engineering Electrical_Engineering Mechanical_Engineering Biomedical_Engineering "
    "Electronics_and_Communication Computer_Science"
)
_HEALTHCARE = "Clinical_Medicine Basic_Medicine Preventive_Medicine Pharmacy Dentistry"
_HUMANITIES = "Art Literature History Law Economics Management"
DISCIPLINES = {
    subject: discipline
    for discipline, subjects in (
        ("Science", _SCIENCE),
        ("Engineering", _ENGINEERING),
        ("Healthcare", _HEALTHCARE),
        ("Humanities_and_Social_Science", _HUMANITIES),
    )
    for subject in subjects.split()
}
"""MMVU's disciplines by subject, as lmms-eval groups them. Its mean leaves other subjects out."""

_VIDEOMME = functools.partial(Split, "videomme", ("test*", "videomme*", "Video-MME*"), _videomme)
_LONGVIDEOBENCH = Split("longvideobench", ("validation*", "lvb_val", "val*"), _longvideobench)
_MMVU = Split("mmvu", ("validation*", "mmvu*"), _mmvu)

TASKS: dict[str, Split] = {
    "videomme": _VIDEOMME(),
    "videomme_long": _VIDEOMME(keep=lambda row: row.get("duration") == "long"),
    "videomme_w_subtitle": _VIDEOMME(),
    "longvideobench_val_v": _LONGVIDEOBENCH,
    "longvideobench_val_i": _LONGVIDEOBENCH,
    "lvbench": Split("lvbench", ("train*", "lvbench*", "video_info*"), _lvbench),
    "mlvu_dev": Split("mlvu", ("test*", "mlvu*"), _mlvu),
    "mmvu_val": _MMVU,
    "mmvu_val_cot": _MMVU,
    "temporal_grounding_charades": Split("charades_sta", ("test*", "charades*"), _charades),
    "timelens_charades": Split("timelens", ("charades*",), _timelens),
}
"""Tasks by lmms-eval's names."""
ALIASES = {
    "longvideobench": "longvideobench_val_v",
    "mlvu": "mlvu_dev",
    "mmvu": "mmvu_val",
    "charades": "temporal_grounding_charades",
    "charades_sta": "temporal_grounding_charades",
    "timelens": "timelens_charades",
    "charades_timelens": "timelens_charades",
    "videomme_wsub": "videomme_w_subtitle",
}
"""Shorter names, and those of ParaVT's driver."""


def as_json(row: Fields) -> str:
    """A published row as JSON, whatever numbers a parquet file gives."""
    return json.dumps(row, ensure_ascii=False, default=lambda value: getattr(value, "item", str)())
