"""The small world in which mistakes are made: a model, videos, questions, a run; made once."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.command import SMALL
from tests.support.videos import write_video
from train.data.needle import questions_of_world
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import override, to_dict

QUESTIONS = """video,question,answer,question_type
a.mp4,What colour is the wall?,red,oe
b.mp4,When is it bright?,"1, 3",tvg
a.mp4,Which wall? A. red B. blue,A,mcq
b.mp4,What colour is the floor?,grey,oe
"""


def make_world(folder: Path) -> dict[str, str]:
    """Write the world below a folder; what its names stand for."""
    (folder / "videos").mkdir(parents=True)
    for number, name in enumerate("ab"):
        path = folder / "videos" / f"{name}.mp4"
        write_video(path, shade=80 * number, frames=20, rate=5.0, size=(32, 32))
    (folder / "videos" / "questions.csv").write_text(QUESTIONS)
    (folder / "videos" / "chats.jsonl").write_text(json.dumps(conversation("a.mp4")) + "\n")
    settings = [*SMALL, f"data.cache_dir={folder / 'cache'}"]
    own = [text for text in settings if not text.startswith("evaluation.rows")]
    names = {
        "model": str(COLD_START),
        "videos": str(folder / "videos"),
        "questions": str(folder / "videos" / "questions.csv"),
        "chats": str(folder / "videos" / "chats.jsonl"),
        "run": str(_make_run(folder / "run", settings)),
        "small": _flags(settings),
        "own": _flags([*own, "evaluation.rows=0"])
        + f" --data {folder / 'videos' / 'questions.csv'}",
        "chatting": f"--recipe paravt_sft --model {COLD_START} --data {folder}/videos/chats.jsonl "
        + _flags([f"data.cache_dir={folder / 'cache'}", "sft.packing.tokens=512"]),
    }
    return names


def conversation(video: str) -> dict:
    """A question about a video and its answer, as `paravt_sft` reads them."""
    shown = {"type": "video_url", "video_url": {"url": video}}
    asked = {"type": "text", "text": "What colour is it?"}
    return {
        "messages": [
            {"role": "user", "content": [shown, asked]},
            {"role": "assistant", "content": "<think>I look.</think><answer>red</answer>"},
        ]
    }


def _make_run(folder: Path, settings: list[str]) -> Path:
    """What a run leaves that is looked at before its weights are: no weights are in it."""
    config = override(get_recipe("needle_rl"), [*settings, "steps=2"])
    for split in ("train", "held_out"):
        questions_of_world(config.data, split)
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2))
    return folder


def _flags(settings: list[str]) -> str:
    return " ".join(f"--set {text}" for text in settings)
