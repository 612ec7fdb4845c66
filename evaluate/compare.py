"""Compare two evaluations: `python evaluate/compare.py REPORT_A REPORT_B`.

Of each task, how much higher the second one scores on the questions that both answered, with a 95 %
interval and a p value from a paired bootstrap that draws whole videos. A report is the folder of an
evaluation, or its samples.jsonl.
"""

import os
import os.path
import sys

# Run as a script, `sys.path[0]` is this folder, where `import evaluate` would find
# somebody else's. Swap it for the repository root before any other import.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from evaluate.benchmarks.results import read_run
from evaluate.benchmarks.sample import OK, SampleResult
from paravt_jax.estimates import DRAWS, SEED, paired_bootstrap
from paravt_jax.failures import attempt
from paravt_jax.flags import Parser


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="evaluate/compare.py", description=__doc__)
    add = parser.add_argument
    add("first", metavar="REPORT_A", help="the evaluation to compare with")
    add("second", metavar="REPORT_B", help="the one whose gain is told")
    add("--draws", type=int, default=DRAWS, help=f"of the bootstrap (default: {DRAWS})")
    add("--seed", type=int, default=SEED, help=f"of the draws (default: {SEED})")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = make_parser()
    flags = parser.parse_args(arguments)
    if flags.draws < 100:
        parser.error(f"--draws {flags.draws}: give at least 100, an interval needs them")
    if flags.seed < 0:
        parser.error(f"--seed {flags.seed}: give 0 or more")
    return attempt(lambda: _main(flags))


def _main(flags: argparse.Namespace) -> None:
    (first, a), (second, b) = read_run(flags.first), read_run(flags.second)
    rows = compare(a, b, flags.draws, flags.seed)
    if flags.json:
        print(json.dumps({"first": first, "second": second, "tasks": rows}, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(f"A: {first}\nB: {second}", highlight=False)
    console.print(_table(rows))


def compare(
    first: Iterable[SampleResult], second: Iterable[SampleResult], draws: int, seed: int
) -> list[dict[str, Any]]:
    """One row for each task that both evaluated, scores in percent.

    Raises:
        ValueError: there is no such task, or none of its questions was answered by both.
    """
    a, b = ({(r.task, r.sample_id): r for r in results} for results in (first, second))
    tasks = dict.fromkeys(task for task, _ in a if any(task == other for other, _ in b))
    if not tasks:
        raise ValueError("REPORT_A and REPORT_B have no task in common; evaluate both on the same")
    return [_row(task, a, b, draws, seed) for task in tasks]


Results = dict[tuple[str, str], SampleResult]


def _row(task: str, a: Results, b: Results, draws: int, seed: int) -> dict[str, Any]:
    common = [key for key in a if key[0] == task and key in b]
    pairs = [(a[key], b[key]) for key in common]
    both = [(x, y) for x, y in pairs if x.status == y.status == OK]
    for x, y in both:
        if x.target != y.target:
            raise ValueError(
                f"{task}, question {x.sample_id}: the truth is {x.target!r} in REPORT_A and "
                f"{y.target!r} in REPORT_B; compare evaluations of the same rows"
            )
    before, after = (
        [100 * float(result.score or 0.0) for result in side]
        for side in ([x for x, _ in both], [y for _, y in both])
    )
    gain = paired_bootstrap(before, after, [x.cluster for x, _ in both], draws, seed)
    count = sum(key[0] == task for key in a.keys() | b.keys())
    return {
        "task": task,
        "first": sum(before) / len(both),
        "second": sum(after) / len(both),
        **dataclasses.asdict(gain),
        "left_out": count - len(both),
    }


def _table(rows: Sequence[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    caption = "both: answered in A and B; out: an error in one, or asked in one alone"
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption)
    shown.add_column("task", overflow="fold")
    for title in ("A", "B", "B - A", "95 %", "p", "both", "videos", "out"):
        shown.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row["task"],
            f"{row['first']:.1f}",
            f"{row['second']:.1f}",
            f"{row['value']:+.1f}",
            f"{row['low']:+.1f} to {row['high']:+.1f}",
            f"{row['p']:.4f}",
            str(row["samples"]),
            str(row["clusters"]),
            str(row["left_out"]),
        )
    return shown


if __name__ == "__main__":
    sys.exit(main())
