"""What a run writes into its workdir while it goes: metrics, TensorBoard, progress."""

from __future__ import annotations

import collections
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from train.workdir.files import write_atomically

SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("reward/total", "reward", "{:.2f}"),
    ("reward/accuracy", "accuracy", "{:.2f}"),
    ("format/compliance", "format", "{:.2f}"),
    ("tool/calls_per_rollout", "calls", "{:.2f}"),
    ("kl", "kl", "{:.4f}"),
    ("logprob/gap_max", "gap", "{:.1e}"),
    ("time/step", "s", "{:.1f}"),
)
"""Metric, column title and format of the progress line."""


METRICS = "metrics.jsonl"
"""File of a workdir: a line of figures for each step."""
RECENT = 20
"""Steps whose median time says how long the remaining ones take."""


class RunLog:
    """Metrics of one run: `metrics.jsonl`, TensorBoard files and one progress line per step.

    After a resume the lines of steps that are run again are dropped first, so the file
    holds every step once. With `silent` (all hosts but the first) nothing is written.
    """

    def __init__(self, workdir: Path, steps: int, first_step: int = 0, silent: bool = False):
        self.console = Console(file=sys.stdout, highlight=False, quiet=silent)
        self._silent = silent
        if silent:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        # Imported here: it takes seconds where torch is installed, for which no error need wait.
        from tensorboardX import SummaryWriter

        self._steps, self._seconds = steps, collections.deque[float](maxlen=RECENT)
        self._path = workdir / METRICS
        self._keep_before(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def _keep_before(self, step: int) -> None:
        if not self._path.exists():
            return
        # A run that was killed may have left half a line; it has no line break.
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        lines = [x for number, x in enumerate(lines, 1) if self._is_before(x, number, step)]
        write_atomically(self._path, "".join(line + "\n" for line in lines))

    def _is_before(self, line: str, number: int, step: int) -> bool:
        try:
            return json.loads(line)["step"] < step
        except (ValueError, KeyError, TypeError):
            self.console.print(f"{self._path}: line {number} is damaged and is left out")
            return False

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step."""
        if self._silent:
            return
        record = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self._path} could not be written: {error.strerror}") from error
        for name, value in metrics.items():
            self._board.add_scalar(name, float(value), step)
        shown = [
            f"{title} {form.format(record[name])}" for name, title, form in SHOWN if name in record
        ]
        self._seconds.append(record.get("time/step", 0.0))
        shown += self._left(self._steps - step - 1)
        width = len(str(self._steps))
        line = f"step {step + 1:>{width}}/{self._steps}  " + "  ".join(shown)
        self.console.print(line, soft_wrap=True)

    def _left(self, steps: int) -> list[str]:
        """How long the steps to come take, by the median of the last ones."""
        seconds = steps * statistics.median(self._seconds)
        # The first step compiles, and says nothing of the others.
        if len(self._seconds) < 2 or seconds < 1:
            return []
        return [f"left {seconds / 60:.0f} min" if seconds >= 100 else f"left {seconds:.0f} s"]

    def close(self) -> None:
        """Flush and close the files."""
        if self._silent:
            return
        self._file.close()
        self._board.close()
