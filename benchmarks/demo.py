"""The demo over several seeds: one row of `results.md` each.

    python benchmarks/demo.py --seeds 0 1 2

Runs `train/main.py` as a user would and reads `evaluation.json` and `metrics.jsonl`.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TWO = "accuracy/oe/2 events"
COLUMNS = (
    "commit | seed | command | hardware | minutes | sampled before -> after"
    " | greedy before -> after | two events, open: sampled | greedy | no crops after | compliance"
    " | crops per using rollout"
    " | gap max | seconds per step"
)


def commit() -> str:
    """The checkout's commit, marked if the tree differs from it."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def hardware() -> str:
    """Processor and number of cores."""
    import os

    return f"{platform.machine()}, {os.cpu_count()} cores"


def interval(figures: dict[str, float], name: str) -> str:
    """A figure with its 95 % interval."""
    return f"{figures[name]:.3f} ({figures[f'{name}/low']:.2f} to {figures[f'{name}/high']:.2f})"


def run(seed: int, extra: list[str]) -> str:
    """Run one seed and describe it as a row of the table."""
    workdir = Path(tempfile.mkdtemp(prefix=f"demo-{seed}-")) / "run"
    began = time.time()
    arguments = ["--seed", str(seed), *extra]
    subprocess.run(
        [sys.executable, "train/main.py", "--workdir", str(workdir), *arguments],
        cwd=ROOT,
        check=True,
    )
    minutes = (time.time() - began) / 60
    figures = json.loads((workdir / "evaluation.json").read_text())
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    before, after = figures["before"], figures["after"]
    arrow = lambda mode: f"{before[mode]['accuracy']:.3f} -> {after[mode]['accuracy']:.3f}"  # noqa: E731
    span = lambda mode: " -> ".join(interval(part[mode], TWO) for part in (before, after))  # noqa: E731
    seconds = sorted(step["time/step"] for step in steps)[len(steps) // 2]
    cells = [
        commit(),
        str(seed),
        f"`python train/main.py {' '.join(arguments)}`",
        hardware(),
        f"{minutes:.1f}",
        arrow("sampled"),
        arrow("greedy"),
        span("sampled"),
        span("greedy"),
        f"{after['no crops']['accuracy']:.3f}",
        f"{after['sampled']['format/compliance']:.3f}",
        f"{after['sampled']['tool/calls_per_using_rollout']:.2f}",
        f"{max(step['logprob/gap_max'] for step in steps):.1e}",
        f"{seconds:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run all seeds, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments, extra = parser.parse_known_args()
    rows = [run(seed, extra) for seed in arguments.seeds]
    print(f"| {COLUMNS} |\n|" + "---|" * len(COLUMNS.split("|")))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
