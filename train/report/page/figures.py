"""From what a run left to what its page shows: figures as JSON values, nothing of how they look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from train.report.page.source import Group, RunSource

OFFSETS = 41
"""Places before and after the gold window at which is counted who looked."""
COLUMNS = 120
"""Most columns of the heat map; neighbouring steps share one."""
RIGHT = 0.5
"""Accuracy from which on an answer counts as right."""
LONGEST = 200
"""Characters of a question in lists."""


def run_figures(source: RunSource) -> dict[str, Any]:
    """What the view of a run shows, but for what its rollouts tell."""
    settings = source.settings
    return {
        "name": source.workdir.name,
        "recipe": settings.get("recipe"),
        "stage": settings.get("stage"),
        "planned_steps": settings.get("steps"),
        "settings": settings,
        "departures": source.departures,
        "metrics": columns(source.metrics),
        "evaluation": {k: v for k, v in source.evaluation.items() if k in ("before", "after")},
        "steps": source.steps,
    }


def columns(records: Sequence[dict[str, float]]) -> dict[str, list[float | None]]:
    """Metrics by name, a value for each step; None where a step does not tell it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


class RolloutFigures:
    """Gathers figures over the rollouts of all steps, one step after the other."""

    def __init__(self) -> None:
        self.bands: dict[str, list[list[float]]] = {}
        """95 % intervals of means over prompts, `[step, low, high]` by metric."""
        self._looks: list[tuple[int, np.ndarray, np.ndarray]] = []
        self._widths: list[float] = []
        self._index: list[tuple[Any, ...]] = []
        self._questions: dict[str, int] = {}
        self._types: dict[str, int] = {}

    def add(self, step: int, groups: Sequence[Group]) -> None:
        """The rollouts of a step."""
        for name, values in _by_prompt(groups).items():
            self.bands.setdefault(name, []).append([step, *interval(values)])
        looked, possible = np.zeros(OFFSETS), np.zeros(OFFSETS)
        for number, group in enumerate(groups):
            for line in group:
                self._index.append(self._row(step, number, line))
                self._look(line, looked, possible)
        self._looks.append((step, looked, possible))

    def _row(self, step: int, group: int, line: dict[str, Any]) -> tuple[Any, ...]:
        verdicts = [call["verdict"] for call in line.get("tool_calls", ())]
        question = self._questions.setdefault(line["question"][:LONGEST], len(self._questions))
        kind = self._types.setdefault(line["question_type"], len(self._types))
        rewards = line["rewards"]
        return (
            *(step, group, line["rollout"], round(rewards["total"], 4)),
            *(round(rewards.get("accuracy", 0.0), 4), int(line.get("complies", True))),
            *(line["calls"], verdicts.count("hit"), verdicts.count("invalid"), kind, question),
        )

    def _look(self, line: dict[str, Any], looked: np.ndarray, possible: np.ndarray) -> None:
        """Count at which distances from the gold window this rollout looked, and could have."""
        gold, duration = line.get("gold"), line.get("duration")
        if not gold or not duration:
            return
        start, end = gold[0]
        times = (start + end) / 2 + offsets() * duration
        self._widths.append((end - start) / duration)
        # Where a video has ended nobody could look: that must not count as not looking.
        possible += (times >= 0) & (times <= duration)
        covered = np.zeros(OFFSETS, bool)
        for call in line["tool_calls"]:
            if call["window"] and call["verdict"] != "invalid":
                covered |= (call["window"][0] <= times) & (times < call["window"][1])
        looked += covered

    @property
    def look(self) -> dict[str, Any] | None:
        """Which share of rollouts looked at each distance from the gold window's centre, as a share
        of the video's length, by steps; None without gold windows."""
        if not self._widths:
            return None
        share = max(1, math.ceil(len(self._looks) / COLUMNS))
        cells = []
        for at in range(0, len(self._looks), share):
            part = self._looks[at : at + share]
            looked, possible = (sum(step[n] for step in part) for n in (1, 2))
            shares = np.where(possible > 0, looked / np.maximum(possible, 1), np.nan)
            cells.append([_number(x) for x in shares])
        return {
            "offsets": [round(x, 4) for x in offsets().tolist()],
            "steps": [step[0] for step in self._looks][::share],
            "steps_per_column": share,
            "shares": cells,
            "gold_width": round(float(np.mean(self._widths)), 4),
        }

    @property
    def index(self) -> dict[str, Any]:
        """A row for each rollout, by columns: what filters ask for."""
        names = ("step", "group", "rollout", "reward", "accuracy", "complies", "calls", "hits")
        names += ("invalid", "type", "question")
        table = zip(*self._index, strict=True) if self._index else ((),) * len(names)
        rows = {name: list(column) for name, column in zip(names, table, strict=True)}
        return {**rows, "types": list(self._types), "questions": list(self._questions)}


def offsets() -> np.ndarray:
    """Distances from the gold window's centre, as shares of the video's length."""
    return np.linspace(-1.0, 1.0, OFFSETS)


def _by_prompt(groups: Sequence[Group]) -> dict[str, list[float]]:
    """The mean of each prompt's rollouts, by the names of `metrics.jsonl`."""
    means: dict[str, list[float]] = {}
    for group in groups:
        metrics = [_metrics(line) for line in group]
        for name in metrics[0]:
            # Rollouts of a prompt are alike: taken as independent, they would make intervals too
            # narrow.
            means.setdefault(name, []).append(float(np.mean([each[name] for each in metrics])))
    return means


def _metrics(line: dict[str, Any]) -> dict[str, float]:
    metrics = {f"reward/{term}": value for term, value in line["rewards"].items()}
    metrics |= {"tool/calls_per_rollout": line["calls"], "length/generated": sum(line["generated"])}
    return metrics | ({"format/compliance": float(line["complies"])} if "complies" in line else {})


def interval(values: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the mean of independent values, by the normal approximation."""
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return mean - 1.96 * error, mean + 1.96 * error


def step_figures(source: RunSource, step: int, groups: Sequence[Group]) -> dict[str, Any]:
    """What the views of the groups and rollouts of a step show."""
    details = source.details(step)
    return {"step": step, "groups": [_group(g, [next(details) for _ in g]) for g in groups]}


def _group(lines: Group, details: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, detail = lines[0], details[0]
    shared = ("row_id", "duration", "question", "answer", "question_type", "gold", "frame_budget")
    return {
        **{name: first.get(name) for name in shared},
        "video": first["video"].replace("\\", "/").rpartition("/")[2],
        "overview_times": first.get("overview_times", []),
        "sheet": detail.get("sheet"),
        "overview": detail.get("overview"),
        "rollouts": [_rollout(*pair) for pair in zip(lines, details, strict=True)],
    }


def _rollout(line: dict[str, Any], detail: dict[str, Any]) -> dict[str, Any]:
    calls = line.get("tool_calls", [])
    crops = detail.get("crops", [None] * len(calls))
    values = {f"{name}": value for name, value in detail.get("values", {}).items()}
    drawn = [p for p, new in zip(line["log_probs"], line["generated"], strict=True) if new]
    names = ("said", "text", "rewards", "stop_reasons", "subagents", "complies")
    return {
        **{name: line.get(name) for name in names},
        "right": line["rewards"].get("accuracy", 0.0) >= RIGHT,
        "calls": [{**call, "crop": crop} for call, crop in zip(calls, crops, strict=True)],
        "generated": line["generated"],
        "pieces": detail.get("pieces"),
        "values": {"sampler": drawn, **values},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)
