"""The demo with rollouts that are drawn ahead, over several seeds: rows of `results.md`.

    python benchmarks/staleness.py --staleness 0 1 2 --seeds 0 1 2
    python benchmarks/staleness.py --staleness 0 1 2 1/1/6 2/1/6 --seeds 0

Whether weights that are some steps old reach the same held-out accuracy, and how much of the
rollouts runs beside the learner. `2/1/6` is a staleness of 2 with `rl.in_flight_updates=1` and
`rl.in_flight_calls=6`. What else is given goes to `train/main.py`, for instance
`--steps 20 --set model.cache_dtype=int8`, or `--set evaluation.rows=0` for seconds alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from subprocess import run

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.demo import commit, hardware, interval  # noqa: E402

COLUMNS = (
    "commit | staleness | seed | hardware | sampled before | sampled after | greedy after"
    " | mean age | gap mean | dropped | seconds per step | waiting for rollouts"
    " | rollouts beside learning | share beside | waiting for weights"
)
NAMES = "rl.staleness", "rl.in_flight_updates", "rl.in_flight_calls"
ACCURACIES = ("before", "sampled"), ("after", "sampled"), ("after", "greedy")


def train(staleness: str, seed: int, extra: list[str]) -> str:
    """Run it once; its row of the table."""
    name = staleness.replace("/", "-")
    workdir = Path(tempfile.mkdtemp(prefix=f"staleness-{name}-{seed}-")) / "run"
    values = zip(NAMES, staleness.split("/"), strict=False)
    settings = [part for key, value in values for part in ("--set", f"{key}={value}")]
    door = [sys.executable, "train/main.py", "--workdir", str(workdir)]
    run([*door, "--seed", str(seed), *settings, *extra], cwd=ROOT, check=True)
    return describe(workdir, staleness, seed)


def describe(workdir: Path, staleness: str, seed: int) -> str:
    """A run as a row of the table; seconds are medians of the steps."""
    evaluated = workdir / "evaluation.json"
    told = json.loads(evaluated.read_text()) if evaluated.exists() else None
    steps = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]

    def middle(name: str) -> float:
        return statistics.median(step.get(name, 0.0) for step in steps)

    beside, waited = middle("time/overlap"), middle("time/rollout")
    cells = [
        commit(),
        staleness,
        str(seed),
        hardware(),
        *(interval(told[when][mode], "accuracy") if told else "-" for when, mode in ACCURACIES),
        f"{middle('rollout/staleness'):.2f}",
        f"{middle('logprob/gap_mean'):.1e}",
        f"{middle('dropped_fraction'):.4f}",
        *(f"{seconds:.2f}" for seconds in (middle("time/step"), waited, beside)),
        f"{beside / (beside + waited):.2f}",
        f"{middle('time/weights_wait'):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all of them, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--staleness", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    own, extra = parser.parse_known_args()
    rows = [train(age, seed, extra) for seed in own.seeds for age in own.staleness]
    print(f"| {COLUMNS} |\n|" + "---|" * len(COLUMNS.split("|")))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
