"""Twenty hand-made rows of each split in its published schema, with three tiny videos.

root = write_splits(folder)         # ROOT of evaluate/main.py --data ROOT
EXPECTED["lvbench"](doc)            # the prompt of the default protocol of lmms-eval, by hand
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from tests.support.videos import write_video

ROWS = 20
COLOURS = ("red", "green", "blue", "black")
SCENES = ("a dog runs", "a cup falls", "the door opens", "somebody waves", "it rains")
LENGTHS = {"clip0": 9.0, "clip1": 12.0, "clip2": 15.0}
"""Seconds of the videos. With 6 frames a second each has the 32 and more that harnesses show."""
RATE = 6.0
SUBTITLES = (
    '1\n00:00:00,000 --> 00:00:02,500\n<font color="white" size=".72c">Good morning</font>\n\n'
    "2\n00:00:03,000 --> 00:00:04,000\nplain words\n\n"
    '3\n00:00:05,000 --> 00:00:08,000\n<font color="white" size=".72c">Good night</font>\n'
)

Row = dict[str, Any]


def letter(number: int) -> str:
    return "ABCD"[number % 4]


def clip(number: int) -> str:
    return f"clip{number % 3}"


def inline(options: tuple[str, ...]) -> str:
    return "\n".join(f"({name}) {text}" for name, text in zip("ABCD", options, strict=True))


def videomme() -> list[Row]:
    return [
        {
            "video_id": f"{number // 3:03d}",
            "duration": ("short", "medium", "long")[number % 3],
            "domain": "Knowledge",
            "sub_category": "Law",
            "url": "https://example.org",
            "videoID": clip(number),
            "question_id": f"{number // 3:03d}-{number % 3 + 1}",
            "task_type": ("OCR Problems", "Counting Problem")[number % 2],
            "question": f"What colour is thing {number}?",
            "options": [f"{name}. {text}." for name, text in zip("ABCD", COLOURS, strict=True)],
            "answer": letter(number),
        }
        for number in range(ROWS)
    ]


def longvideobench() -> list[Row]:
    rows = []
    for number in range(ROWS):
        many = 2 + number % 4
        options = [*SCENES[:many], *["N/A"] * (5 - many)]
        rows.append(
            {
                "id": f"{clip(number)}_{number}",
                "video_id": clip(number),
                "video_path": f"{clip(number)}.mp4",
                "question": f"At 0:0{number % 9}, what happens?",
                **{f"option{n}": text for n, text in enumerate(options)},
                "correct_choice": number % many,
                "duration_group": (15, 60, 600, 3600)[number % 4],
                "question_category": ("S2E", "T3O")[number % 2],
                "subtitle_path": f"{clip(number)}_en.json",
                "starting_timestamp_for_subtitles": 0.0,
                "duration": LENGTHS[clip(number)],
            }
        )
    return rows


def lvbench() -> list[Row]:
    return [
        {
            "uid": str(number),
            "video_path": f"{clip(number)}.mp4",
            "question": f"Which year is it in scene {number}?\n{inline(COLOURS)}",
            "answer": letter(number),
            "question_type": ["entity recognition", "reasoning"][: 1 + number % 2],
            "time_reference": "00:01-00:05",
        }
        for number in range(ROWS)
    ]


MLVU_TYPES = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")


def mlvu() -> list[Row]:
    return [
        {
            "video_name": f"{clip(number)}.mp4",
            "duration": LENGTHS[clip(number)],
            "question": f"What does person {number} do?\n{inline(SCENES[:4])}\n",
            "candidates": list(SCENES[:4]),
            "answer": letter(number),
            "task_type": MLVU_TYPES[number % 7],
            "question_id": str(number // 7),
        }
        for number in range(ROWS)
    ]


def mmvu() -> list[Row]:
    rows = []
    for number in range(ROWS):
        choice = number % 5 < 3
        choices = dict(zip("ABCDE", (*COLOURS, "none of them"), strict=True))
        rows.append(
            {
                "id": f"validation_{number}",
                "video": f"https://huggingface.co/x/resolve/main/videos/Art/{clip(number)}.mp4",
                "video_path": f"videos/Art/{clip(number)}.mp4",
                "question_type": "multiple-choice" if choice else "open-ended",
                "question": f"Which paint is used in step {number}?",
                "choices": choices if choice else dict.fromkeys("ABCDE"),
                "answer": letter(number) if choice else "burnt sienna",
                "metadata": {"subject": "Art"},
            }
        )
    return rows


def charades() -> list[Row]:
    return [
        {
            "video": f"{clip(number)}.mp4",
            "caption": f"person does thing {number}",
            "timestamp": np.float16([number / 4, number / 4 + 3.3]).tolist(),
        }
        for number in range(ROWS)
    ]


def timelens() -> list[Row]:
    return [
        {
            "video_path": f"charades/{clip(number)}.mp4",
            "query": f"a man opens door {number}",
            "span": json.dumps([[number / 4, number / 4 + 2.5]]),
            "duration": LENGTHS[clip(number)],
        }
        for number in range(ROWS)
    ]


SPLITS: dict[str, tuple[str, str, Callable[[], list[Row]]]] = {
    "videomme": ("videomme/videomme/test-00000-of-00001.parquet", "data", videomme),
    "longvideobench_val_v": ("longvideobench/lvb_val.json", "videos", longvideobench),
    "lvbench": ("lvbench/data/train-00000-of-00001.parquet", "all_videos", lvbench),
    "mlvu_dev": ("mlvu/data/test-00000-of-00001.parquet", "video", mlvu),
    "mmvu_val": ("mmvu/validation.json", "videos/Art", mmvu),
    "temporal_grounding_charades": (
        "charades_sta/data/test-00000-of-00001.parquet",
        "Charades_v1_480",
        charades,
    ),
    "timelens_charades": ("timelens/charades.jsonl", "videos/charades", timelens),
}
"""Of each task: its annotations, the folder of its videos in that of the split, its rows."""
WITH_SUBTITLES = "videomme_w_subtitle"
"""Shares the rows of `videomme`; the third video has no subtitles."""
TASKS = (*SPLITS, WITH_SUBTITLES)


def write_splits(root: Path) -> Path:
    """All splits below a root, which is returned."""
    shared = root / "shared"
    for name, seconds in LENGTHS.items():
        write_video(shared / f"{name}.mp4", shade=20, frames=round(RATE * seconds), rate=RATE)
    for file, videos, rows in SPLITS.values():
        path = root / file
        folder = root / Path(file).parts[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, rows())
        (folder / videos).mkdir(parents=True, exist_ok=True)
        for name in LENGTHS:
            shutil.copyfile(shared / f"{name}.mp4", folder / videos / f"{name}.mp4")
    _write_subtitles(root)
    return root


def _write(path: Path, rows: list[Row]) -> None:
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        if "timestamp" in table.column_names:  # half precision, as published
            at = table.column_names.index("timestamp")
            halves = table["timestamp"].cast(pyarrow.list_(pyarrow.float16()))
            table = table.set_column(at, "timestamp", halves)
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))


def _write_subtitles(root: Path) -> None:
    for name in ("clip0", "clip1"):
        (root / "videomme" / "subtitle").mkdir(exist_ok=True)
        (root / "videomme" / "subtitle" / f"{name}.srt").write_text(SUBTITLES)
    (root / "longvideobench" / "subtitles").mkdir(exist_ok=True)
    for name in LENGTHS:
        spoken = [
            {"start": "00:00:01.000", "end": "00:00:03.000", "line": "first line"},
            {"timestamp": [4.0, 6.5], "text": "second line"},
        ]
        path = root / "longvideobench" / "subtitles" / f"{name}_en.json"
        path.write_text(json.dumps(spoken))


def write_own(folder: Path) -> Path:
    """A CSV of one's own: a choice, an open question and a window, and a column to part by."""
    write_video(folder / "mine.mp4", frames=48, rate=RATE)
    path = folder / "mine.csv"
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["video", "question", "answer", "options", "kind", "place"])
        lines.writerow(["mine.mp4", "Which colour?", "blue", "red|blue", "", "indoors"])
        lines.writerow(["mine.mp4", "What is it?", "a cup", "", "", "outdoors"])
        lines.writerow(["mine.mp4", "the cup falls", "1.5, 4", "", "grounding", "outdoors"])
    return path


# --- The prompts of lmms-eval's default, written out by hand --------------------------------------

_MME = (
    "Select the best answer to the following multiple-choice question based on the video and the "
    "subtitles. Respond with only the letter (A, B, C, or D) of the correct option.\n"
)


def _mme(doc: Mapping[str, Any]) -> str:
    return f"{_MME}{doc['question']}\n" + "\n".join(doc["options"])


def _longvideobench(doc: Mapping[str, Any]) -> str:
    options = [doc[f"option{n}"] for n in range(5) if doc[f"option{n}"] != "N/A"]
    lines = [f"{name}. {text}" for name, text in zip("ABCDE", options, strict=False)]
    post = "Answer with the option's letter from the given choices directly.\n"
    return "\n".join([doc["question"], *lines, post])


def _mmvu(doc: Mapping[str, Any]) -> str:
    head, seen = f"\nQuestion:{doc['question']}\n", "Visual Information: processed video\n"
    silent = "Do not generate any intermediate reasoning process. "
    if doc["question_type"] != "multiple-choice":
        return f"{head}{seen}{silent}Directly output the final answer.\n"
    options = "".join(f"{name}: {text}\n" for name, text in doc["choices"].items())
    post = "Answer directly with the option letter from the\ngiven choices.\n"
    return f"{head}{options}{seen}{silent}{post}"


def _charades(doc: Mapping[str, Any]) -> str:
    return (
        "Please find the visual event described by a sentence in the video, determining its "
        "starting and ending times. The format should be: 'The event happens in the start time - "
        "end time'. For example, The event 'person turn a light on' happens in the 24.3 - 30.4 "
        f"seonds. Now I will give you the textual sentence: {doc['caption']}. Please return its "
        "start time and end time."
    )


def _timelens(doc: Mapping[str, Any]) -> str:
    return (
        f"Please find the visual event described by the sentence '{doc['query']}', determining "
        "its starting and ending times. The format should be: 'The event happens in <start time> "
        "- <end time> seconds'."
    )


def _with_subtitles(doc: Mapping[str, Any]) -> str:
    told = "No subtitles available" if doc["videoID"] == "clip2" else "Good morning\nGood night"
    return f"This video's subtitles are listed below: \n{told}\n{_mme(doc)}\nThe best answer is:"


EXPECTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "videomme": lambda doc: (
        f"{_mme(doc)}\n\nAnswer with the option's letter from the given choices directly."
    ),
    "videomme_w_subtitle": _with_subtitles,
    "longvideobench_val_v": _longvideobench,
    "lvbench": lambda doc: f"{doc['question']}\nAnswer the question with the option letter",
    "mlvu_dev": lambda doc: f"{doc['question']}\nOnly give the best option.\nBest option: (",
    "mmvu_val": _mmvu,
    "temporal_grounding_charades": _charades,
    "timelens_charades": _timelens,
}
"""The user turn of each task, by its published row."""
