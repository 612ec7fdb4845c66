"""ParaVT-Parquet in small: both configurations in the published schema, with real videos.

Files hold columns either as nested lists and dictionaries or as JSON in a string; paths are
sentinels, `file://` URIs or absolute; rows have one video or several; some videos are missing.
"""

from __future__ import annotations

import json
import os

import cv2
import numpy as np
import pyarrow
import pyarrow.parquet

from tests.support.videos import write_video

VIDEOS = (
    "longvt_source/hacs/a.mp4",
    "museg/charades/b.mp4",
    "museg/et_instruct_164k/c.mp4",
    "selfqa/d.mp4",
)
MISSING = ("selfqa/lost.mp4", "museg/charades/lost.mp4")
BROKEN = "longvt_source/hacs/broken.mp4"
FRAME = "selfqa/frame.jpg"
SYSTEM = "You are a helpful assistant."
SECONDS = 8


def write_paravt(folder: str) -> str:
    """Write videos, an image and the parquet files of both configurations; returns `folder`."""
    for number, name in enumerate(VIDEOS):
        write_video(os.path.join(folder, name), shade=60 * number)
    with open(os.path.join(folder, BROKEN), "wb") as file:
        file.write(b"no video")
    cv2.imwrite(os.path.join(folder, FRAME), np.full((32, 32, 3), 90, np.uint8))
    questions, conversations = rl_rows(folder), sft_rows(folder)
    write_table(folder, "rl/nested.parquet", questions[:4])
    write_table(folder, "rl/strings.parquet", as_text(questions[4:], "extra_info"))
    write_table(folder, "sft/museg/train.parquet", conversations[:2])
    write_table(folder, "sft/selftrace/train.parquet", as_text(conversations[2:], "messages"))
    return folder


def rl_rows(folder: str) -> list[dict]:
    """Questions; the second video of the fourth is missing, and that of the last is no video."""
    first, second, third, fourth = VIDEOS
    return [
        question([first], "<video>\nWhat colour is the wall?", "red"),
        question([f"file://{folder}/{second}"], "<video>When?", "1.0, 3.5", "tvg"),
        question([third, fourth], "<video><video>\nWhich? A. one B. two", "B", "mcq"),
        question([first, MISSING[0]], "<video><video>\nWhich comes first?", "the second"),
        question([os.path.join(folder, fourth)], "Look: <video> What is it?", "a wall", "oe"),
        question([MISSING[1]], "<video>\nWhat is lost?", "this"),
        question([BROKEN], "<video>\nWhat is broken?", "this"),
    ]


def sft_rows(folder: str) -> list[dict]:
    """Conversations; the last shows a missing video."""
    call = '<think>I must look closer.</think><tool_call>{"name": "crop_video"}</tool_call>'
    answer = "<think>It is clear now.</think><answer>red</answer>"
    asked = [video(VIDEOS[0]), text("What colour is it?")]
    seen = [image(f"file://{FRAME}"), text("1 frame from 1 s to 2 s.")]
    two = [video(VIDEOS[1]), video(f"file://{folder}/{VIDEOS[2]}"), text("Which is longer?")]
    return [
        conversation(system=[text(SYSTEM)], user=asked, assistant=[text(call)])
        | {"note": "other columns are no matter"},
        conversation(user=two, assistant=[text(answer)]) | {"note": ""},
        conversation(user=asked, assistant=[text(call)], tool=seen, last=[text(answer)]),
        conversation(user=[video(MISSING[0]), text("?")], assistant=[text(answer)]),
    ]


def question(videos: list[str], words: str, answer: str, kind: str | None = None) -> dict:
    """A row of `rl`."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": words}]
    extra = {"answer": answer, "question_type": kind}
    return {"prompt": messages, "videos": [{"video": v} for v in videos], "extra_info": extra}


def conversation(last: list[dict] | None = None, **turns: list[dict]) -> dict:
    """A row of `sft`; `last` is a second turn of the assistant."""
    messages = [{"role": role, "content": parts} for role, parts in turns.items()]
    if last:
        messages.append({"role": "assistant", "content": last})
    return {"messages": messages}


def text(words: str) -> dict:
    """Words as part of a message."""
    return {"type": "text", "text": words}


def video(path: str) -> dict:
    """A video as part of a message."""
    return {"type": "video_url", "video_url": {"url": path}}


def image(path: str) -> dict:
    """An image as part of a message."""
    return {"type": "image_url", "image_url": {"url": path}}


def as_text(rows: list[dict], column: str) -> list[dict]:
    """Rows with one column as JSON in a string."""
    return [row | {column: json.dumps(row[column])} for row in rows]


def write_table(folder: str, name: str, rows: list[dict]) -> None:
    """A parquet file of rows."""
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
