"""Evaluate a model: `python evaluate/main.py --model MODEL --benchmarks NAMES --data ROOT`.

Samples are answered side by side, a line each in WORKDIR. The same command goes on after whatever
ended it, and --shard 1/4 to 4/4 in one WORKDIR share the work; the report comes with the last.
"""

import os
import os.path
import sys

# Run as a script, `sys.path[0]` is this folder, where `import models` would find
# somebody else's. Swap it for the repository root before any other import.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import re
import time
from pathlib import Path

from paravt_jax.failures import attempt
from paravt_jax.flags import Parser


def shard(text: str) -> tuple[int, int]:
    """`2/4` as a number from 1 and a count.

    Raises:
      argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2])
    raise argparse.ArgumentTypeError(f"{text!r}: give a number and a count, 1/4 to 4/4")


def count(text: str) -> int:
    """A number of 0 or more.

    Raises:
      argparse.ArgumentTypeError: it is none.
    """
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give 0 or more")


def positive(text: str) -> int:
    """A number of 1 or more.

    Raises:
      argparse.ArgumentTypeError: it is none.
    """
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: give 1 or more")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="evaluate/main.py", description=__doc__)
    add = parser.add_argument
    add("--benchmarks", required=True, help="tasks by lmms-eval's names, or files, with commas")
    add("--model", help="Hugging Face folder, or workdir of a run (default: the demo's cold start)")
    add("--protocol", default="paravt", help="its name, or a .toml file (default: %(default)s)")
    add("--mode", help="one of the protocol's (default: its first)")
    add(
        "--data",
        default="data",
        metavar="ROOT",
        help="folder of the local copies, and of videos of own files (default: data)",
    )
    add("--frames", type=positive, metavar="K", help="show so many instead of the protocol's")
    add("--limit", type=positive, metavar="N", help="most questions of each task")
    add("--batch", type=positive, default=16, metavar="N", help="under way (default: %(default)s)")
    add("--workdir", help="where lines and report go (default: runs/evaluation-TIME)")
    add("--shard", type=shard, default=(1, 1), metavar="I/N", help="do this part of the samples")
    add("--mesh", help="device mesh, e.g. tensor:4 (default: all devices on data)")
    add("--recipe", help="take the settings of this recipe, not those that go with the model")
    add("--attention", metavar="KERNEL", help="what computes it (default: the settings')")
    add("--judge", metavar="URL", help="API of a judge, https://host/v1, where protocols ask one")
    add("--judge-model", metavar="NAME", help="the judge's name there")
    add("--judge-key", metavar="VARIABLE", help="environment variable that holds its API key")
    add("--retry-errors", action="store_true", help="ask again what ended in an error")
    sees = "of N questions of each kind measure whether the model sees (default: %(default)s)"
    add("--sight", type=count, default=8, metavar="N", help=sees)
    add("--parts", action="store_true", help="print the figures of parts of the questions, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()
    flags = parser.parse_args(argv)
    if bool(flags.judge) != bool(flags.judge_model):
        parser.error("--judge and --judge-model: give both of them, or none")
    if flags.judge_key and not flags.judge:
        parser.error("--judge-key: name the judge with --judge and --judge-model")
    if flags.shard[1] > 1 and not flags.workdir:
        parser.error("--shard: name the --workdir that all shards share")
    less = f"lower --batch={flags.batch}, --frames, or pixels in a copy of the protocol"
    return attempt(lambda: evaluate(flags), memory_remedies=[less])


def evaluate(flags: argparse.Namespace) -> None:
    """Answer what is left, and write the report if nothing is.

    Raises:
      ValueError: something that was given cannot be used.
    """
    from evaluate.benchmarks.protocol import load

    # Before the model, whose imports alone take seconds.
    protocol = load(flags.protocol)
    import dataclasses

    import jax
    from rich.console import Console

    from evaluate.evaluation import Evaluation, check_workdir, open_asked
    from evaluate.model import open_model, settings_of
    from paravt_jax.mesh import make_mesh, parse_mesh
    from train.compile.cache import keep_compiled

    own = flags.model, flags.recipe
    config, judge = settings_of(*own, flags.attention), open_judge(flags)
    data = dataclasses.replace(config.data, cache_dir=flags.data)
    names = [name for name in flags.benchmarks.split(",") if name]
    plan = open_asked(
        protocol, names, flags.mode or "", flags.data, flags.limit, data, flags.frames
    )
    plan = dataclasses.replace(plan, guarded=flags.sight).judged_by(flags.judge_model or "")
    keep_compiled(config.output.compile_cache, config.output.compile_cache_gb)
    workdir = Path(flags.workdir or f"runs/evaluation-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
    check_workdir(workdir, plan, config.model.folder or "", config.recipe)
    mesh = make_mesh(parse_mesh(flags.mesh, jax.device_count()))
    console = Console()
    model = open_model(*own, lambda rules: rules, mesh, flags.attention)
    how = f"{plan.protocol.name}, {plan.mode}"
    print(f"{len(plan.samples)} questions to {model.name}, {how}")
    print(f"workdir   {workdir}", flush=True)
    with jax.set_mesh(mesh):
        evaluation = Evaluation(plan, model, workdir, flags.shard)
        evaluation.run(flags.batch, judge, console, flags.retry_errors)
        tell(evaluation, flags, console)


def open_judge(flags: argparse.Namespace):
    """The judge of `--judge`, if it is given."""
    if not flags.judge:
        return None
    from paravt_jax.rewards.judge import JudgeSettings
    from paravt_jax.rewards.judge import open_judge as opened
    from paravt_jax.settings import placed

    with placed("--judge: "):
        return opened(JudgeSettings(flags.judge, flags.judge_model, flags.judge_key or ""))


def tell(evaluation, flags: argparse.Namespace, console) -> None:
    """Print the report, or what is left."""
    from evaluate.benchmarks.report import remarks, table

    report, missing = evaluation.report()
    if report is None:
        print(f"this shard is done; {missing} questions are left to others")
        return
    console.print(table(report, flags.parts))
    for task, line in evaluation.usage().items():
        print(f"{task}: {line}")
    for line in remarks(report):
        print(line)
    if any(task["errors"] for task in report["tasks"].values()):
        print("errors are no answers; the same command with --retry-errors asks them again")
    if flags.judge and not report["judge"]:
        print("--judge: no question was its: this protocol scores all of these by rules")
    waits = evaluation.waits
    if waits.total:
        share = waits.idle / waits.total
        print(f"{waits.total:.1f} s, the device waited for prompts and crops {share:.1%} of it")


if __name__ == "__main__":
    sys.exit(main())
