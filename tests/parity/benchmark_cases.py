"""What other harnesses' own functions return, replayed by ours.

`replay({"fn": ..., "in": ...})` answers a case of `benchmark_cases.jsonl` (lmms-eval 75571cf,
VLMEvalKit e8e78f0), `replay({"function": ..., "args": ...})` one of `eval_cases.jsonl` (ParaVT's
driver, cf55249), both in `tests/data/benchmark_cases`. Each is put through the protocol that it
belongs to; functions that are a step within one are called directly.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluate.benchmarks import protocol, schemas
from evaluate.benchmarks.captions import Seen
from evaluate.benchmarks.sample import Kind, Sample

TASKS = {"timelens": "timelens_charades"}
FILLED = {
    "uid": "0",
    "id": "0",
    "answer": "A",
    "video_path": "Art/v.mp4",
    "video_name": "v.mp4",
    "question_type": "open-ended",
    "task_type": "needle",
}
"""Fields that a row needs to be read, and a case about its prompt leaves out."""


def sample_of(task: str, doc: Mapping[str, Any], folder: str = "/nowhere") -> Sample:
    """The sample of a row that may lack fields."""
    return schemas.TASKS[task].make(task, 0, {**FILLED, **doc}, schemas.Places(Path(folder)))


def rules_of(name: str, task: str, kind: Kind = Kind.CHOICE) -> protocol.Rules:
    return protocol.load(name).rules(task, kind)


def prompt(fn: str, given: Any) -> str:
    """`prompt TASK [VARIANT]` with a row, or with `doc`, `srt` or `subtitles`, and a grid."""
    _, task, *variant = fn.split()
    task = TASKS.get(task, task)
    name = "lmms-eval/qwen3_vl" if "qwen3_vl" in variant else "lmms-eval"
    more = given if "doc" in given else {"doc": given}
    with tempfile.TemporaryDirectory() as folder:
        sample = with_subtitles(sample_of(task, more["doc"], folder), more, Path(folder))
        rules = rules_of(name, task, sample.kind)
        if "frame_num" in more:
            chosen = dataclasses.replace(rules.subtitles, frames=more["frame_num"])
            rules = dataclasses.replace(rules, subtitles=chosen)
        total, fps = more.get("frames", 2500), more.get("fps", 25)
        seen = Seen(rules.video.indices(total, fps), total, fps)
        return words(rules.messages(sample, seen), with_images="{interleaved}" in rules.prompt.user)


def with_subtitles(sample: Sample, more: Mapping[str, Any], folder: Path) -> Sample:
    written = more.get("srt") or (json.dumps(more["subtitles"]) if "subtitles" in more else None)
    if written is None:
        return sample
    path = folder / "subtitles"
    path.write_text(written, encoding="utf-8")
    return dataclasses.replace(sample, subtitles=str(path))


def words(messages: protocol.Messages, with_images: bool = False) -> str:
    """The text as lmms-eval hands it to a backend: frames between lines are `<image>`."""
    image = "<image>" if with_images else ""
    return "".join(part if isinstance(part, str) else image for part in messages.parts)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {}


def replay(case: Mapping[str, Any]) -> Any:
    """What ours returns for a case; None where the harness draws at random."""
    fn = case["fn"]
    if fn.startswith("prompt "):
        return prompt(fn, case["in"])
    return FUNCTIONS[fn.partition(" (")[0]](case["in"])
