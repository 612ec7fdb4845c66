"""What other harnesses' own functions return, replayed by ours.

`replay({"fn": ..., "in": ...})` answers a case of `benchmark_cases.jsonl` (lmms-eval 75571cf,
VLMEvalKit e8e78f0), `replay({"function": ..., "args": ...})` one of `eval_cases.jsonl` (ParaVT's
driver, cf55249), both in `tests/data/benchmark_cases`. Each is put through the protocol that it
belongs to; functions that are a step within one are called directly.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from evaluate.benchmarks import extraction, protocol, schemas, scoring
from evaluate.benchmarks.aggregate import aggregate
from evaluate.benchmarks.captions import Seen
from evaluate.benchmarks.sample import Kind, Sample, SampleResult

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


@functools.cache
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


# --- Answers --------------------------------------------------------------------------------------

STRIP = protocol.load("lmms-eval").rules("videomme", Kind.CHOICE).scoring.strip


def strip(text: str) -> str:
    return extraction.strip_reasoning(text, STRIP)


def mmvu(kind: Kind) -> Callable[[Mapping[str, Any]], bool]:
    """MMVU's rules without a judge, on an answer from which nothing was dropped."""
    written = {Kind.CHOICE: "multiple-choice", Kind.OPEN: "open-ended"}[kind]

    def score(given: Mapping[str, Any]) -> bool:
        sample = sample_of("mmvu_val", {**given, "question": "?", "question_type": written})
        rules = rules_of("lmms-eval", "mmvu_val", kind)
        plain = dataclasses.replace(rules, scoring=dataclasses.replace(rules.scoring, strip=()))
        return bool(scoring.score(plain, sample, given["prediction"]).score)

    return score


GROUNDING = {
    "charades": ("temporal_grounding_charades", "caption", "timestamp", "video"),
    "timelens": ("timelens_charades", "query", "span", "video_path"),
}


def grounded(name: str, truth: Any, said: str, video: str = "v", about: str = "c") -> SampleResult:
    """An answer to a grounding question, scored as it stands."""
    task, *columns = GROUNDING[name]
    truth = [truth] if name == "timelens" else truth
    sample = sample_of(task, dict(zip(columns, (about, truth, video), strict=True)))
    rules = rules_of("lmms-eval", task, Kind.GROUNDING)
    plain = dataclasses.replace(rules, scoring=dataclasses.replace(rules.scoring, strip=()))
    found = scoring.score(plain, sample, said)
    return SampleResult.of(sample, score=found.score)


def iou(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda given: grounded(name, given["gt"], given["pred"]).score


def merged(name: str) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Figures of answers keyed `video>>>caption>>>window`, by names without their stem."""

    def figures(given: Mapping[str, Any]) -> dict[str, float]:
        pairs = [pair for sub in given["subs"] for pair in sub.items()]
        results = []
        for key, said in pairs:
            video, about, truth = key.split(">>>")
            window = json.loads(truth)
            window = window[0] if name == "timelens" else window
            results.append(grounded(name, window, said, video, about))
        rules = rules_of("lmms-eval", GROUNDING[name][0], Kind.GROUNDING).scoring
        found = aggregate(rules, results)
        named = [figure for figure in (found.headline, *found.figures) if figure]
        return {
            figure.name.removeprefix(f"{rules.metric}_"): figure.value
            for figure in named
            if "=" not in figure.name
        }

    return figures


def mlvu(given: Any) -> float:
    """The macro mean of rows `task_type, pred_answer, answer`, or of such tuples."""
    rows = next(iter(given.values())) if isinstance(given, Mapping) else given
    results = []
    for number, row in enumerate(rows):
        names = ("task_type", "pred_answer", "answer")
        kind, said, right = (row[name] for name in names) if isinstance(row, Mapping) else row
        sample = sample_of("mlvu_dev", MLVU_ROW | {"task_type": kind, "answer": right})
        named = dataclasses.replace(sample, sample_id=str(number), doc_id=number)
        results.append(SampleResult.of(named, score=float(said == right)))
    found = aggregate(rules_of("lmms-eval", "mlvu_dev").scoring, results).headline
    return found.value if found else 0.0


MLVU_ROW = {"question": "?", "candidates": ["w", "x", "y", "z"]}


def windows(found: Any) -> list[list[float]]:
    """As the harnesses return them: a list of pairs, empty for none."""
    pairs = [found] if isinstance(found, tuple) else found or []
    return [list(pair) for pair in pairs]


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "strip_reasoning": strip,
    "mcq_extract_ABCD": lambda text: extraction.mcq(text, "ABCD"),
    "strip_then_mcq_ABCD": lambda text: extraction.mcq(strip(text), "ABCD"),
    "longvideobench_parse": extraction.longvideobench,
    "vlmevalkit_extract": extraction.vlmevalkit,
    "mmvu_rule_mc": mmvu(Kind.CHOICE),
    "mmvu_rule_open": mmvu(Kind.OPEN),
    "charades_extract": lambda text: windows(extraction.charades(text)),
    "timelens_extract": lambda text: windows(extraction.timelens(text)),
    "charades_iou": iou("charades"),
    "timelens_iou": iou("timelens"),
    "charades_aggregate": merged("charades"),
    "timelens_aggregate": merged("timelens"),
    "mlvu_aggregate_dev": mlvu,
}


# --- ParaVT's driver ------------------------------------------------------------------------------


def driver_score(final: str, truth: Any) -> dict[str, Any]:
    """Its `_score` of a letter, or of a window of time."""
    if isinstance(truth, str):
        doc = {"question": "?", "answer": "A"}
        sample = dataclasses.replace(sample_of("lvbench", doc), gold=truth)
        rules = rules_of("paravt-release", "lvbench")
    else:
        doc = {"video": "v", "caption": "c", "timestamp": truth}
        sample = sample_of("temporal_grounding_charades", doc)
        rules = rules_of("paravt-release", sample.task, Kind.GROUNDING)
    found = scoring.score(rules, sample, final)
    if isinstance(truth, str):
        correct = found.score == 1.0
        return {"correct": correct, "score": found.score, "pred": found.prediction or ""}
    ends = found.prediction
    read = f"{ends[0]:.1f}-{ends[1]:.1f}" if isinstance(ends, list) else final[:200]
    return {"correct": None, "score": found.score, "pred": read}


def driver_window(text: str) -> list[float] | None:
    found = extraction.paravt_window(text)
    return None if found is None else list(found)


DRIVER: dict[str, Callable[..., Any]] = {
    "extract_letter": extraction.paravt_letter,
    "extract_time_from_response": driver_window,
    "temporal_iou": extraction.hull_iou,
    "driver._score": driver_score,
}


def replay(case: Mapping[str, Any]) -> Any:
    """What ours returns for a case; None where the harness draws at random."""
    if "function" in case:
        return DRIVER[case["function"]](*case["args"])
    fn = case["fn"]
    if fn.startswith("prompt "):
        return prompt(fn, case["in"])
    return FUNCTIONS[fn.partition(" (")[0]](case["in"])
