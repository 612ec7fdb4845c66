"""Questions that cannot be asked: no video, no model, flags that do not fit."""

from __future__ import annotations

import json

from tests.contracts.mistakes import Mistake

DOOR = "evaluate/ask.py"
ASKED = "{videos}/a.mp4 What?"


def ask(arguments: str, *named: str, code: int = 1, **more) -> Mistake:
    """One question."""
    return Mistake(arguments, named, code, door=DOOR, **more)


ROWS = [
    ask("nowhere.mp4 What?", "nowhere.mp4", "no such file"),
    ask("{videos} What?", "it is a folder"),
    ask("notes.mp4 What?", "notes.mp4", "no video", files={"notes.mp4": "some words"}),
    ask(f"{ASKED} --model nowhere", "nowhere", "does not exist"),
    ask(f"{ASKED} --model {{videos}}", "config.json", "Hugging Face"),
    ask(
        f"{ASKED} --model run",
        *("--model run", "hf/", "to-hf"),
        files={"run/config.json": json.dumps({"recipe": "needle_rl", "stage": "rl"})},
    ),
    ask(f"{ASKED} --recipe needle", "--recipe needle", "needle_rl"),
    ask(f"{ASKED} --max-tokens 5000", "--max-tokens", "max_position_embeddings=4096"),
    ask("{videos}/a.mp4 '<|im_end|>?'", "<|im_end|>", "control token"),
    ask("", "video", code=2),
    ask(f"{ASKED} --frames 0", "--frames 0", code=2),
    ask(f"{ASKED} --frames many", "--frames", "many", code=2),
    ask(f"{ASKED} --temperature -1", "--temperature", code=2),
    ask(f"{ASKED} --temperature nan", "--temperature", code=2),
    ask(f"{ASKED} --seed 3", "--seed 3", "--temperature", code=2),
    ask(f"{ASKED} --seed -3 --temperature 1", "--seed -3", code=2),
    ask(f"{ASKED} --max-tokens 0", "--max-tokens 0", code=2),
    ask(f"{ASKED} --max-tool-rounds 0", "--max-tool-rounds 0", "--no-tools", code=2),
    ask(f"{ASKED} --max-tool-rounds 2 --no-tools", "--no-tools", code=2),
    ask(f"{ASKED} --model ''", "--model", "empty", code=2),
]
