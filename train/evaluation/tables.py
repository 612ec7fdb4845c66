"""Tables of evaluations: accuracies with their intervals, and how the tool was used."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.table import Table

from train.evaluation.intervals import Accuracy

TABLE = {
    "accuracy": "accuracy",
    "accuracy/oe": "open",
    "accuracy/tvg": "grounding",
    "accuracy/mcq": "choice",
    "format/compliance": "format",
    "tool/rollouts_with_call": "use crops",
    "tool/calls_per_using_rollout": "crops",
}
"""Metrics of the before/after table and their column titles."""


def comparison_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics of several evaluations, one row each; narrow enough for 80 columns."""
    present = [name for name in TABLE if any(name in metrics for metrics in rows.values())]
    table = Table(title=title)
    table.add_column("")
    for name in present:
        table.add_column(TABLE[name], justify="right")
    for row, metrics in rows.items():
        cells = [f"{metrics[name]:.3f}" if name in metrics else "-" for name in present]
        table.add_row(row, *cells)
    return table


INTERVALS = "accuracy in percent, its 95 % interval (Wilson), videos"


def as_metrics(accuracies: Mapping[str, Accuracy]) -> dict[str, float]:
    """Accuracies as metrics: of each `NAME`, and `NAME/low`, `NAME/high` and `NAME/videos`."""
    return {
        name if field == "mean" else f"{name}/{field}": float(value)
        for name, accuracy in accuracies.items()
        for field, value in accuracy._asdict().items()
    }


def interval_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Accuracies of several evaluations, one row each, and how sure they are: of the parts that
    question types are told apart by, or of the types where there are none."""
    bounds = (name for metrics in rows.values() for name in metrics if name.endswith("/low"))
    every = sorted({name.removesuffix("/low") for name in bounds})
    parts = [name for name in every if name.count("/") == 2]
    shown = ["accuracy", *(parts or every[1:])]
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("")
    for name in shown:
        videos = max(int(metrics.get(f"{name}/videos", 0)) for metrics in rows.values())
        kind, _, part = name.removeprefix("accuracy/").partition("/")
        titled = [TABLE.get(f"accuracy/{kind}", "all"), part, f"n={videos}"]
        table.add_column("\n".join(filter(None, titled)), justify="right")
    for row, metrics in rows.items():
        table.add_row(row, *(_interval(metrics, name) for name in shown))
    return table


def _interval(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    mean, low, high = (100 * metrics[key] for key in (name, f"{name}/low", f"{name}/high"))
    return f"{mean:.1f} {low:.0f}-{high:.0f}"
