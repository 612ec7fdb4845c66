"""What each correction of the sampler-learner mismatch would do to the rollouts of a run.

    python train/main.py --workdir runs/stale --set output.details_mb=512 \\
        --set rl.staleness=8 --set model.cache_dtype=int8
    python benchmarks/correction.py runs/stale [--first 8]

Reads log-probabilities of both from what the run left (`rollouts/`, and `details/`, which holds as
many steps as `output.details_mb` has room for), and prints a row for each method of
`docs/para_grpo.md`: shares of tokens and of rollouts that it drops, truncates or rejects, and the
effective sample size. So bounds can be chosen without a run for each of them.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from paravt_jax.corrections import CorrectionConfig, CorrectionMetrics, correct
from train.report.rollouts import DETAILS, FOLDER

GEOMETRIC = {"reject": "geometric", "reject_floor": 0.999, "reject_cap": 1.001}
METHODS: dict[str, tuple[dict[str, Any], float | None]] = {
    "as released": ({}, 5.0),
    "TIS": ({"beyond": "truncate"}, 2.0),
    "IcePop": ({"floor": 0.5}, 5.0),
    "Seq-TIS": ({"weights": "product", "beyond": "truncate"}, 2.0),
    "Seq-MIS": ({"weights": "product"}, 2.0),
    "Geo-RS, TIS": ({"beyond": "truncate", **GEOMETRIC}, 2.0),
    "veto": ({"reject": "any", "reject_floor": 1e-4}, 5.0),
}
"""Settings of `objective.correction`, and `objective.behaviour_cap`."""
COLUMNS = {
    "dropped": ("dropped_fraction", "correction/dropped_sequences"),
    "truncated": ("correction/truncated", "correction/truncated_sequences"),
    "rejected": ("correction/rejected", "correction/rejected_sequences"),
    "effective": ("correction/effective_share",),
}


def sequences(workdir: Path, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Log-probabilities of the learned tokens of each rollout, learner's and sampler's."""
    for path in sorted((workdir / DETAILS).glob("step_*.jsonl")):
        if int(path.stem.removeprefix("step_")) < first:
            continue
        drawn = (workdir / FOLDER / path.name).read_text(encoding="utf-8").splitlines()
        told = path.read_text(encoding="utf-8").splitlines()
        for one, other in zip(drawn, told, strict=True):
            yield _learned(json.loads(one), json.loads(other)["values"]["log_probs"])


def _learned(drawn: dict[str, Any], told: list[float]) -> tuple[np.ndarray, np.ndarray]:
    generated = np.array(drawn["generated"], bool)
    chosen = np.array(drawn["chosen"], bool)[generated]
    learner, sampler = np.array(told), np.array(drawn["log_probs"])[generated]
    return learner[chosen], sampler[chosen]


def measure(
    pairs: list[tuple[np.ndarray, np.ndarray]], settings: dict[str, Any], cap: float | None
) -> dict[str, float]:
    """What a method would do, under the names of the metrics file."""
    size = max(len(learner) for learner, _ in pairs)

    def rows(values: list[np.ndarray]) -> jnp.ndarray:
        return jnp.asarray(np.stack([np.pad(x, (0, size - len(x))) for x in values]), jnp.float32)

    learner, sampler = (rows(list(values)) for values in zip(*pairs, strict=True))
    trained = rows([np.ones(len(x)) for x, _ in pairs])
    found = correct(learner, sampler, trained, CorrectionConfig(**settings), cap)
    means = CorrectionMetrics.of(found, trained > 0).means(trained.sum())
    return {name: float(value) for name, value in means.items()}


def table(pairs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """A row for each method, in Markdown."""
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, (settings, cap) in METHODS.items():
        found = measure(pairs, settings, cap)
        cells = [", ".join(f"{found[own]:.4f}" for own in names) for names in COLUMNS.values()]
        lines.append(" | ".join([f"| {name}", *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--first", type=int, default=0, help="the first step that counts")
    arguments = parser.parse_args()
    pairs = list(sequences(arguments.workdir, arguments.first))
    if not pairs:
        parser.error(
            f"{arguments.workdir} holds no details of steps from {arguments.first} on; give the "
            "run more room by output.details_mb"
        )
    gaps = np.concatenate([np.abs(learner - sampler) for learner, sampler in pairs])
    print(
        f"{len(pairs)} rollouts, {gaps.size} tokens, gap {gaps.mean():.2e}, most {gaps.max():.2e}"
    )
    print("Shares of tokens, and of rollouts with any of them:\n")
    print(table(pairs))


if __name__ == "__main__":
    main()
