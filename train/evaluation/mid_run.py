"""Held-out questions in the midst of a run: curves in its metrics, and the best weights kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from train.evaluation.held_out import HeldOut, MetricsByMode, by_name
from train.evaluation.settings import EvaluationSettings
from train.hosts.cluster import from_first, is_first
from train.state import FlatParams
from train.workdir.files import write_atomically

BEST = "best"
"""The folder of a run with its best weights; `best.json` beside it says of which step."""

Export = Callable[[FlatParams, Path], None]
"""Writes weights as a model folder."""


class MidRun:
    """Evaluates every so many steps, and keeps the weights of the best."""

    def __init__(
        self, held_out: HeldOut, settings: EvaluationSettings, workdir: Path, export: Export
    ):
        """
        Raises:
          ValueError: there is no metric of the name `evaluation.best`.
        """
        if settings.best not in held_out.names:
            names = ", ".join(name for name in held_out.names if name.endswith("/accuracy"))
            raise ValueError(
                f"evaluation.best={settings.best}: no figure has this name; give {names}, ..."
            )
        self._held_out, self._settings = held_out, settings
        self._workdir, self._export = workdir, export
        self._best = self._read()
        self.last: tuple[int, MetricsByMode] = (-1, {})
        """Step and metrics of the last evaluation."""
        self.before: Callable[[int, FlatParams], object] = lambda step, params: None
        """Called before each evaluation with what it is of: other work on the devices comes to
        rest."""

    def __call__(self, step: int, params: FlatParams) -> dict[str, float]:
        """The metrics after `step` steps, `evaluation/MODE/NAME`, if they are due."""
        if step % self._settings.every:
            return {}
        self.before(step, params)
        by_mode = self._held_out(params)
        self.last = step, by_mode
        metrics = by_name(by_mode)
        self._keep_if_best(step, metrics, params)
        return {f"evaluation/{name}": value for name, value in metrics.items()}

    def figure(self, step: int) -> float | None:
        """`evaluation.best` after `step` steps, if that was evaluated last."""
        last, by_mode = self.last
        return by_name(by_mode)[self._settings.best] if last == step else None

    def _keep_if_best(self, step: int, metrics: dict[str, float], params: FlatParams) -> None:
        name = self._settings.best
        if self._best is not None and metrics[name] <= self._best:
            return
        self._best = metrics[name]
        self._export(params, self._workdir / BEST)
        if is_first():
            record = {"step": step, "figure": name, "value": self._best}
            write_atomically(self._workdir / f"{BEST}.json", json.dumps(record, indent=2) + "\n")

    def _read(self) -> float | None:
        """The best value so far, of a run that goes on; on every host what the first one reads."""
        path, text = self._workdir / f"{BEST}.json", ""
        if is_first() and path.exists():
            text = path.read_text(encoding="utf-8")
        record = json.loads(from_first(text) or "{}")
        return record.get("value") if record.get("figure") == self._settings.best else None
