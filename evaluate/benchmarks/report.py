"""Reports of an evaluation: our own JSON, a table, and the files of lmms-eval.

    report = make(about, {task: TaskRun(rules, samples, results)})
    write(folder, report, about, runs)

Every row names protocol, frames, pixels, decoding and commit: a figure without them says nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from evaluate.benchmarks.aggregate import (
    Figure,
    TaskFigures,
    aggregate,
    sight,
    timing,
    usage,
)
from evaluate.benchmarks.protocol import Protocol, Rules
from evaluate.benchmarks.results import REPORT
from evaluate.benchmarks.sample import OK, Kind, Sample, SampleResult
from evaluate.benchmarks.schemas import as_json
from paravt_jax.estimates import Difference
from train.workdir.files import write_atomically

LMMS_RESULTS = "results.json"
SHOWN_ERRORS = 5
"""Kinds of errors that are printed."""
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class About:
    """What an evaluation was made with."""

    protocol: Protocol
    mode: str
    model: str
    commit: str
    """Of this project, with `+` where files differ from it."""
    judge: str = ""
    """Name of the model that judged; empty without one."""
    video_marks: str = ""
    """Where vision marks stand around a video (`VideoSpec.marks`), which differs between versions
    of transformers and of vLLM."""
    limit: int | None = None
    """Questions of each task that were asked; None: all."""


@dataclasses.dataclass(frozen=True)
class TaskRun:
    """All that is known of one task."""

    rules: Mapping[Kind, Rules]
    """Of each kind of question that it has."""
    samples: Sequence[Sample]
    results: Sequence[SampleResult]
    faults: Sequence[str] = ()
    """Rows that are no question."""

    @property
    def main(self) -> Rules:
        """The rules of most tasks' only kind: those that figures follow."""
        return next(iter(self.rules.values()))


def make(about: About, runs: Mapping[str, TaskRun]) -> Json:
    """The report of an evaluation."""
    tasks = {task: _task(about, run) for task, run in runs.items()}
    protocol = about.protocol
    return {
        "model": about.model,
        "commit": about.commit,
        "mode": about.mode,
        "judge": about.judge or None,
        "video_marks": about.video_marks or None,
        "limit": about.limit,
        "protocol": {
            "name": protocol.name,
            "about": protocol.about,
            "source": protocol.source,
            "fingerprint": fingerprint(protocol),
            "not_reproducible": list(protocol.not_reproducible),
        },
        "rows": [row for task, told in tasks.items() for row in told.pop("rows")],
        "tasks": tasks,
    }


def fingerprint(protocol: Protocol) -> str:
    """Tells protocols of one name apart that say different things."""
    said = json.dumps(protocol.tables, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _task(about: About, run: TaskRun) -> Json:
    found = aggregate(run.main.scoring, run.results, run.faults)
    figures = [figure for figure in (found.headline, *found.figures) if figure is not None]
    seen = sight(run.results)
    return {
        "headline": found.headline.name if found.headline else None,
        "questions": found.samples,
        "errors": dict(found.errors),
        "drawn": found.drawn,
        "judged": found.judged,
        "notes": [*found.notes, *_notes(about, run, found)],
        "usage": usage(run.results),
        "sight": dataclasses.asdict(seen) if seen else None,
        "rows": [_row(about, run, figure) for figure in figures],
    }


def _notes(about: About, run: TaskRun, found: TaskFigures) -> list[str]:
    notes = []
    open_rules = run.rules.get(Kind.OPEN)
    if open_rules and open_rules.scoring.judge and not about.judge:
        notes.append("open questions by the rules alone: no judge is configured")
    if found.drawn:
        notes.append(f"{found.drawn} answers hold no letter; one was drawn for them by their ids")
    if run.faults:
        notes.append(f"the first malformed row of {len(run.faults)}: {run.faults[0]}")
    if about.limit is not None:
        notes.append(f"the first {about.limit} questions, not all")
    return notes + _seen(sight(run.results))


def _seen(found: Difference | None) -> list[str]:
    if found is None:
        return []
    told = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f}) nats a token likelier"
    blind = "" if found.low > 0 else ": no sign that the model sees them"
    return [f"frames make what is said of them {told}, over {found.samples} answers{blind}"]


def _row(about: About, run: TaskRun, figure: Figure) -> Json:
    """One figure and all that it depends on."""
    return {
        "task": run.main.task,
        **dataclasses.asdict(figure),
        "protocol": about.protocol.name,
        "mode": about.mode,
        "frames": _range([r.frames for r in run.results if r.status == OK]),
        "pixels": _range([r.pixels for r in run.results if r.status == OK]),
        "decoding": " / ".join(dict.fromkeys(r.decoding.shown for r in run.rules.values())),
        "model": about.model,
        "commit": about.commit,
    }


def _range(numbers: Iterable[int]) -> str:
    """`64`, or `12-64`."""
    known = sorted(set(numbers))
    if not known:
        return "-"
    return str(known[0]) if len(known) == 1 else f"{known[0]}-{known[-1]}"


# --- For people -----------------------------------------------------------------------------------


def table(report: Json, parts: bool = False) -> Table:
    """The figures of a report.

    Args:
        parts: those of parts of the questions, too.
    """
    title = f"{report['model']}: {report['protocol']['name']}, {report['mode']}"
    shown = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("", overflow="fold")
    for name in ("value", "95 %", "scored", "videos", "errors"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in report["rows"]:
        if parts or "=" not in row["name"]:
            shown.add_row(*_cells(row, report["tasks"][row["task"]]))
    return shown


def _cells(row: Json, task: Json) -> list[Text | str]:
    digits = 1 if max(abs(row["value"]), row["high"]) > 1 else 3
    named = f"{row['task']} {row['name']}" + (f" ({row['note']})" if row["note"] else "")
    how = (
        f"{row['protocol']}, {row['mode']}; {row['frames']} frames of {row['pixels']} pixels; "
        f"{row['decoding']}; {row['commit']}"
    )
    return [
        Text.assemble(f"{named}\n", (how, "dim")),
        f"{row['value']:.{digits}f}",
        f"{row['low']:.{digits}f}-{row['high']:.{digits}f}",
        str(row["samples"]),
        str(row["clusters"]),
        str(sum(task["errors"].values())),
    ]


def usage_line(results: Sequence[SampleResult]) -> str:
    """How questions were answered, and how long that took."""
    used, took = usage(results), timing(results)
    if not used:
        return "nothing was answered"
    calls = (
        f"calls: {used['tool/calls_per_sample']:.2f} a question, "
        f"{used['tool/calls_per_turn']:.2f} a turn, {used['tool/failed_share']:.1%} failed; "
    )
    return (
        f"{calls if used['tool/calls_per_sample'] else ''}"
        f"{used['parse/unread_share']:.1%} of answers unread; tokens: "
        f"{used['tokens/prompt']:.0f} read, {used['tokens/generated']:.0f} written; "
        f"{took['seconds/mean']:.1f} s from prompt to answer "
        f"({took['seconds/most']:.1f} the longest)"
    )


def remarks(report: Json) -> list[str]:
    """What a reader must know besides the figures, a line each."""
    lines = []
    for name, task in report["tasks"].items():
        lines += [f"{name}: {note}" for note in task["notes"]]
        lines += [f"{name}: {line}" for line in _errors(task["errors"])]
    told = report["protocol"]["not_reproducible"]
    return lines + [f"not reproducible in the harness: {line}" for line in told]


def _errors(counts: Mapping[str, int]) -> list[str]:
    """The most frequent ones: where a folder is missing, each video of it has a reason of its
    own."""
    lines = [f"{count} x error: {why}" for why, count in list(counts.items())[:SHOWN_ERRORS]]
    more = list(counts.values())[SHOWN_ERRORS:]
    return lines + [f"{sum(more)} x error of {len(more)} other kinds: {REPORT}"] * bool(more)


# --- For lmms-eval's tools ------------------------------------------------------------------------


def lmms_results(report: Json, runs: Mapping[str, TaskRun]) -> Json:
    """`results.json` as lmms-eval writes it."""
    rows: dict[str, list[Json]] = {task: [] for task in runs}
    for row in report["rows"]:
        if "/" not in row["name"]:
            rows[row["task"]].append(row)
    return {
        "results": {task: {"alias": task} | _lmms_metrics(rows[task]) for task in runs},
        "group_subtasks": {task: [] for task in runs},
        "configs": {task: _lmms_config(run, rows[task]) for task, run in runs.items()},
        "versions": {task: report["protocol"]["fingerprint"] for task in runs},
        "n-shot": {task: 0 for task in runs},
        "higher_is_better": {task: {r["name"]: True for r in rows[task]} for task in runs},
        "n-samples": {task: _lmms_counts(run) for task, run in runs.items()},
        "config": {
            "model": report["model"],
            "model_args": report["mode"],
            "limit": report["limit"],
        },
        "git_hash": report["commit"],
        "model_name": report["model"],
    }


def _lmms_metrics(rows: Sequence[Json]) -> Json:
    metrics: Json = {}
    for row in rows:
        metrics[f"{row['name']},none"] = row["value"]
        metrics[f"{row['name']}_stderr,none"] = row["stderr"]
    return metrics


def _lmms_config(run: TaskRun, rows: Sequence[Json]) -> Json:
    rules = run.main
    return {
        "task": rules.task,
        "metric_list": [{"metric": row["name"], "higher_is_better": True} for row in rows],
        "generation_kwargs": {
            "max_new_tokens": rules.decoding.max_new_tokens,
            "temperature": rules.decoding.temperature,
            "top_p": rules.decoding.top_p,
            "do_sample": rules.decoding.temperature > 0,
        },
        "metadata": {"protocol": rules.protocol, "mode": rules.mode},
    }


def _lmms_counts(run: TaskRun) -> Json:
    scored = sum(result.status == OK for result in run.results)
    return {"original": len(run.samples) + len(run.faults), "effective": scored}


def lmms_samples(run: TaskRun) -> list[Json]:
    """Lines of lmms-eval's `*_samples_TASK.jsonl`, in the order of the rows. Errors, which it does
    not know, are left out."""
    docs = {sample.sample_id: sample for sample in run.samples}
    done = [r for r in run.results if r.status == OK and r.sample_id in docs]
    return [
        _lmms_sample(run.main, docs[result.sample_id], result)
        for result in sorted(done, key=lambda result: result.doc_id)
    ]


def _lmms_sample(rules: Rules, sample: Sample, result: SampleResult) -> Json:
    doc = json.loads(as_json(dict(sample.doc)))
    told = {
        "question_id": result.sample_id,
        **result.groups,
        "pred_answer": result.prediction,
        "answer": result.target,
        "score": result.score,
        "cluster": result.cluster,
    }
    names = [rules.scoring.metric]
    if result.kind == Kind.GROUNDING:
        stem = "" if names == ["accuracy"] else f"{names[0]}_"
        names = [f"{stem}{name}" for name in ("mIOU", "IOU@3", "IOU@5", "IOU@7")]
    return {
        "doc_id": result.doc_id,
        "doc": doc,
        "target": str(result.target),
        "input": result.prompt,
        "resps": [result.response],
        "filtered_resps": result.filtered,
        "doc_hash": _hash(as_json(doc)),
        "prompt_hash": _hash(result.prompt),
        "target_hash": _hash(str(result.target)),
        # What its comparisons look for first (`baselines/loader.py`).
        "score": result.score,
        **{name: told | {"score": _at(name, result)} for name in names},
    }


def _at(name: str, result: SampleResult) -> float | None:
    """The score under a metric: the overlap, or whether it reaches a threshold."""
    level = name.rpartition("IOU@")[2] if "IOU@" in name else ""
    if not level or result.score is None:
        return result.score
    return float(result.score >= int(level) / 10)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(folder: Path, report: Json, runs: Mapping[str, TaskRun]) -> None:
    """All files of a report. The same results give the same bytes.

    Raises:
        OSError: they cannot be written.
    """
    stem = f"{report['protocol']['name'].replace('/', '_')}_{report['mode']}"
    _write(folder / REPORT, report)
    for name in (LMMS_RESULTS, f"{stem}_{LMMS_RESULTS}"):  # the second is looked for by samples
        _write(folder / name, lmms_results(report, runs))
    for task, run in runs.items():
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in lmms_samples(run)]
        write_atomically(folder / f"{stem}_samples_{task}.jsonl", "".join(lines))


def _write(path: Path, value: Json) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
