"""What crops are worth at each number of overview frames: a table, and a picture of it.

    python benchmarks/frame_budgets.py --model runs/demo --workdir runs/frames --picture frames.svg

Runs `evaluate/main.py` on the needle world's test videos for every K and mode, each in a folder of
its own below WORKDIR; the same command goes on where it was ended.
"""

import argparse
import html
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MODES = {"agentic": "crops, parallel", "direct": "no crops", "sequential": "crops, one a turn"}
COLOURS = {"agentic": "#0b6e4f", "sequential": "#c75b12", "direct": "#5b5f97"}
TASK = "needle_test"
WIDTH, HEIGHT, LEFT, TOP, FOOT = 560, 320, 56, 24, 64


class Point(NamedTuple):
    """A mean of scores with its 95 % interval."""

    value: float
    low: float
    high: float
    samples: int
    videos: int


Figures = Mapping[tuple[str, int], Mapping[str, Point]]
"""Of each mode and K its figures by name."""


def folder(workdir: Path, mode: str, frames: int) -> Path:
    """Where the evaluation of a mode and a K lies."""
    return workdir / f"{mode}-{frames}"


def evaluate(model: str, data: str, workdir: Path, questions: int, budgets: Sequence[int]) -> None:
    """Every evaluation that has no report yet."""
    for mode in MODES:
        for frames in budgets:
            own = folder(workdir, mode, frames)
            if (own / "report.json").exists():
                continue
            asked = ["--benchmarks", TASK, "--protocol", "needle", "--mode", mode]
            sizes = ["--frames", str(frames), "--limit", str(questions), "--batch", "128"]
            place = ["--model", model, "--data", data, "--workdir", str(own), "--sight", "0"]
            door = [sys.executable, str(ROOT / "evaluate" / "main.py")]
            subprocess.run([*door, *asked, *sizes, *place], check=True)


def read(workdir: Path, budgets: Sequence[int]) -> Figures:
    """The figures of all evaluations that have been done."""
    found = {}
    for frames in budgets:
        for mode in MODES:
            path = folder(workdir, mode, frames) / "report.json"
            if path.exists():
                rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
                found[mode, frames] = {row["name"]: _point(row) for row in rows}
    return found


def _point(row: Mapping[str, float]) -> Point:
    return Point(*(row[name] for name in ("value", "low", "high", "samples", "clusters")))  # type: ignore[arg-type]


def table(figures: Figures) -> str:
    """Markdown: all questions, open ones and windows."""
    names = {"accuracy": "all", "accuracy/open": "open", "accuracy/grounding": "windows (IoU)"}
    lines = [f"| K | mode | {' | '.join(names.values())} |", "|---|---|" + "---|" * len(names)]
    for (mode, frames), own in sorted(figures.items(), key=lambda item: item[0][1]):
        cells = [
            f"{p.value:.3f} ({p.low:.2f} to {p.high:.2f})" for p in map(own.__getitem__, names)
        ]
        lines.append(f"| {frames} | {MODES[mode]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(figures: Figures) -> str:
    """SVG: accuracy against K, a line for each mode, bars for intervals."""
    budgets = sorted({frames for _, frames in figures})
    parts = [*_axes(budgets)]
    for number, mode in enumerate(MODES):
        points = [(k, figures[mode, k]["accuracy"]) for k in budgets if (mode, k) in figures]
        shift = 5 * (number - 1)
        parts += _line(COLOURS[mode], [(_x(k, budgets) + shift, p) for k, p in points])
        parts += _legend(number, mode)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _x(frames: int, budgets: Sequence[int]) -> float:
    low, high = math.log2(budgets[0]), math.log2(budgets[-1])
    return LEFT + 30 + (WIDTH - LEFT - 70) * (math.log2(frames) - low) / max(high - low, 1)


def _y(value: float) -> float:
    return TOP + (HEIGHT - TOP - FOOT) * (1 - value)


def _axes(budgets: Sequence[int]) -> Iterable[str]:
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(tick)
        yield f'<line x1="{LEFT}" x2="{WIDTH - 16}" y1="{y}" y2="{y}" stroke="#ddd"/>'
        yield _text(LEFT - 8, y + 4, f"{tick:.2f}", "end")
    for frames in budgets:
        yield _text(_x(frames, budgets), _y(0) + 18, str(frames))
    yield _text(LEFT + 200, HEIGHT - 28, "K, frames of the overview")
    yield _text(LEFT, 14, "accuracy, 95 % intervals clustered by video", "start")


def _line(colour: str, points: Sequence[tuple[float, Point]]) -> Iterable[str]:
    path = " ".join(f"{x:.1f},{_y(p.value):.1f}" for x, p in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for x, p in points:
        ends = f'y1="{_y(p.low):.1f}" y2="{_y(p.high):.1f}"'
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" {ends} stroke="{colour}"/>'
        yield f'<circle cx="{x:.1f}" cy="{_y(p.value):.1f}" r="3" fill="{colour}"/>'


def _legend(number: int, mode: str) -> Iterable[str]:
    x, y = LEFT + 160 * number, HEIGHT - 10
    yield f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{COLOURS[mode]}"/>'
    yield _text(x + 8, y, MODES[mode], "start")


def _text(x: float, y: float, said: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(said)}</text>'


def main() -> None:
    parser = argparse.ArgumentParser(description="What crops are worth at each number of frames.")
    parser.add_argument("--model", required=True, help="the workdir of a run of the demo")
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--data", default="data", help="where the needle world's videos are kept")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--frames", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--picture", type=Path, help="write it here")
    a = parser.parse_args()
    evaluate(a.model, a.data, a.workdir, a.questions, a.frames)
    figures = read(a.workdir, a.frames)
    print(table(figures))
    if a.picture:
        a.picture.write_text(picture(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
