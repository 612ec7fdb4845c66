"""What a run writes into its workdir while it goes: metrics, TensorBoard, rollouts, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from evaluate.intervals import Accuracy
from paravt_jax.records import RolloutGroup, Trajectory
from train.workdir.claim import write_whole

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

        self._steps = steps
        self._path = workdir / "metrics.jsonl"
        self._keep_before(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def _keep_before(self, step: int) -> None:
        if not self._path.exists():
            return
        # A run that was killed may have left half a line; it has no line break.
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        kept = [line for number, line in enumerate(lines, 1) if self._is_before(line, number, step)]
        write_whole(self._path, "".join(line + "\n" for line in kept))

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
        width = len(str(self._steps))
        line = f"step {step + 1:>{width}}/{self._steps}  " + "  ".join(shown)
        self.console.print(line, soft_wrap=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self._silent:
            return
        self._file.close()
        self._board.close()


def write_rollouts(folder: Path, step: int, groups: Sequence[RolloutGroup]) -> None:
    """One JSON object per trajectory in `step_NNNNNN.jsonl`, for people and for viewers."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(_describe(group, index, trajectory)) + "\n"
        for group in groups
        for index, trajectory in enumerate(group.trajectories)
    ]
    write_whole(folder / f"step_{step:06d}.jsonl", "".join(lines))


def _describe(group: RolloutGroup, index: int, trajectory: Trajectory) -> dict[str, Any]:
    row = group.row
    return {
        "row_id": row.row_id,
        "video": row.video.path,
        "question": row.question,
        "answer": row.answer,
        "question_type": str(row.question_type),
        "frame_budget": group.frame_budget,
        "rollout": index,
        "text": trajectory.full_text,
        "rewards": trajectory.rewards,
        "stop_reasons": [str(turn.stop_reason) for turn in trajectory.turns],
        "calls": trajectory.calls,
        "executed": trajectory.executed,
        "subagents": [sub.full_text for sub in trajectory.subagents],
        "policy_version": trajectory.policy_version,
        "tokens": trajectory.tokens.tolist(),
        "generated": trajectory.generated.astype(int).tolist(),
        "chosen": trajectory.chosen.astype(int).tolist(),
        "log_probs": [round(value, 5) for value in trajectory.log_probs.tolist()],
    }


TABLE = {
    "accuracy": "accuracy",
    "accuracy/oe": "open",
    "accuracy/tvg": "grounding",
    "accuracy/mcq": "choice",
    "format/compliance": "format",
    "tool/rollouts_with_call": "use crops",
    "tool/calls_per_using_rollout": "crops",
}
"""Figures of the before/after table and their column titles."""


def comparison_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Figures of several evaluations, one row each; narrow enough for 80 columns."""
    present = [name for name in TABLE if any(name in figures for figures in rows.values())]
    table = Table(title=title)
    table.add_column("")
    for name in present:
        table.add_column(TABLE[name], justify="right")
    for row, figures in rows.items():
        cells = [f"{figures[name]:.3f}" if name in figures else "-" for name in present]
        table.add_row(row, *cells)
    return table


INTERVALS = "accuracy in percent, its 95 % interval (Wilson), videos"


def flat(accuracies: Mapping[str, Accuracy]) -> dict[str, float]:
    """Accuracies as figures: of each `NAME`, and `NAME/low`, `NAME/high` and `NAME/videos`."""
    return {
        name if field == "mean" else f"{name}/{field}": float(value)
        for name, accuracy in accuracies.items()
        for field, value in accuracy._asdict().items()
    }


def interval_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Accuracies of several evaluations, one row each, and how sure they are: of the parts that
    question types are told apart by, or of the types where there are none."""
    named = (name for figures in rows.values() for name in figures if name.endswith("/low"))
    every = sorted({name.removesuffix("/low") for name in named})
    parts = [name for name in every if name.count("/") == 2]
    shown = ["accuracy", *(parts or every[1:])]
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("")
    for name in shown:
        videos = max(int(figures.get(f"{name}/videos", 0)) for figures in rows.values())
        kind, _, part = name.removeprefix("accuracy/").partition("/")
        titled = [TABLE.get(f"accuracy/{kind}", "all"), part, f"n={videos}"]
        table.add_column("\n".join(filter(None, titled)), justify="right")
    for row, figures in rows.items():
        table.add_row(row, *(_interval(figures, name) for name in shown))
    return table


def _interval(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "-"
    mean, low, high = (100 * figures[key] for key in (name, f"{name}/low", f"{name}/high"))
    return f"{mean:.1f} {low:.0f}-{high:.0f}"
