"""The door: `python train/main.py [--recipe NAME] [--mesh data:2,fsdp:4] ...`.

No flag at all runs the embedded default, PARA-GRPO on the needle world. Errors are one line;
`PARAVT_TRACEBACK=1` in the environment shows where a failing run stood.
"""

import os
import os.path
import sys

# Run as a script, `sys.path[0]` is this folder, where `import models` would find
# somebody else's. Swap it for the repository root before any other import.
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from paravt_jax.failures import complain  # noqa: E402
from paravt_jax.flags import Parser  # noqa: E402
from paravt_jax.remote import is_remote  # noqa: E402
from train.hosts.interrupt import SIGNALS_OF_RUN, Interrupted, end_process  # noqa: E402
from train.hosts.notice import watch_for_notices  # noqa: E402
from train.hosts.watch import WATCH  # noqa: E402
from train.recipes import check_name, summaries  # noqa: E402

DEFAULT_RECIPE = "needle_rl"

FLAGS = {
    **{"model": "model.folder", "data": "data.path"},
    **{name: name.replace("-", "_") for name in ("mesh", "rollout-mesh", "rollout-devices")},
    **{name: name for name in ("steps", "seed")},
}
"""Flags that set a setting, and its name."""


def make_parser() -> argparse.ArgumentParser:
    """The flags. They are a public contract, held by a test."""
    parser = Parser(
        prog="train/main.py",
        description=__doc__,
        epilog=_recipes(),
    )
    add = parser.add_argument
    add(
        "--recipe",
        help="a complete configuration, by its name or as path/to/file.py:function "
        "(default: the workdir's own, or needle_rl)",
    )
    _add_devices(add)
    add("--workdir", help="folder or URL where the run writes, or did (default: runs/RECIPE-TIME)")
    add("--model", help="Hugging Face folder of a Qwen3-VL model to start from")
    add(
        "--data",
        help="folder, CSV, JSONL or parquet file of questions about videos, or of "
        "conversations for supervised recipes",
    )
    add("--steps", type=int, help="batches to learn from, see --help-settings steps")
    add("--seed", type=int, help="seed of data order, frame budgets and sampling")
    add(
        "--resume",
        choices=("auto", "never", "must"),
        default="auto",
        help="continue from the workdir's last checkpoint if there is one (default: %(default)s)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override any setting")
    add("--dry-run", action="store_true", help="print the resolved run and its memory, then end")
    add(
        "--compile-only",
        metavar="TOPOLOGY[,TOPOLOGY...]",
        help="compile every program of the run for TPU topologies, e.g. v5p:2x2x2,v5e:4x8, or for "
        "the devices of this machine (here), and tell memory, work and seconds at the roofline",
    )
    add(
        "--programs",
        metavar="NAME[,NAME...]",
        help="those that --compile-only compiles, in this order, e.g. 'step,decode main' "
        "(default: all)",
    )
    add(
        "--help-settings",
        metavar="PREFIX",
        nargs="?",
        const=True,
        help="print every setting, or those that begin so, with types and defaults, then end",
    )
    add("--list-recipes", action="store_true", help="print the recipes, then end")
    return parser


def _add_devices(add: Callable[..., object]) -> None:
    """The flags that say which devices do what."""
    add(
        "--mesh",
        help="device mesh of data, fsdp, expert, context and tensor, e.g. data:2,fsdp:4,tensor:2; "
        "one axis may be -1",
    )
    add(
        "--rollout-mesh",
        metavar="MESH",
        help="mesh of the rollouts over the same devices, e.g. data:2,tensor:4 "
        "(default: the fastest token that fits)",
    )
    add(
        "--rollout-devices",
        type=int,
        metavar="N",
        help="devices that roll out while the others learn, see --help-settings rollout_devices",
    )


def _recipes() -> str:
    """The recipes, a line each."""
    recipes = summaries()
    width = max(map(len, recipes))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in recipes.items()]
    return "\n".join(["recipes (each is a function in train/recipes/):", *lines])


def resolve(arguments: argparse.Namespace):
    """The complete configuration: the recipe, then the flags, then `--set`. Without `--recipe`, a
    workdir that holds a run says all that the command line does not.

    Raises:
      ValueError: anything that the recipe, the flags or the overrides refuse.
    """
    from train.config import Config
    from train.recipes import get_recipe
    from train.settings.override import override
    from train.workdir.config_file import read_settings, with_whole_paths

    config = None
    if arguments.recipe is None and arguments.workdir is not None:
        config = read_settings(Path(arguments.workdir), Config)
    config = config or get_recipe(arguments.recipe or DEFAULT_RECIPE)
    flags = {
        key: (f"--{name}", getattr(arguments, name.replace("-", "_")))
        for name, key in FLAGS.items()
    }
    changes = {key: flag for key, flag in flags.items() if flag[1] is not None}
    return with_whole_paths(override(config, arguments.set, changes))


def tell(arguments: argparse.Namespace) -> None:
    """Print what `--list-recipes` or `--help-settings` asks for: defaults are those of `--recipe`,
    or without one those of the settings' own classes.

    Raises:
      ValueError: no recipe has this name, or no setting begins so.
    """
    if arguments.list_recipes:
        return _print(_recipes())
    if arguments.recipe is not None:
        check_name(arguments.recipe)
    from train.config import Config
    from train.recipes import get_recipe
    from train.settings.help import help_settings

    prefix = arguments.help_settings
    config = Config if arguments.recipe is None else get_recipe(arguments.recipe)
    _print(help_settings(config, "" if prefix is True else prefix))


def _print(text: str) -> None:
    """Print to a reader that may have seen enough, such as `head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    config = workdir = mirror = place = None
    code = 2  # until the run begins
    try:
        if arguments.list_recipes or arguments.help_settings is not None:
            tell(arguments)
            return 0
        check_name(DEFAULT_RECIPE if arguments.recipe is None else arguments.recipe)
        if arguments.programs and not arguments.compile_only:
            raise ValueError("--programs names what is compiled: give --compile-only as well")
        if not (arguments.dry_run or arguments.compile_only):
            # At once: what is imported next takes seconds.
            subject = arguments.recipe or arguments.workdir or DEFAULT_RECIPE
            print(f"{subject}: importing JAX and reading the configuration", flush=True)
        mirror = _open_mirror(arguments)
        config = resolve(arguments)
        from train import checks, run
        from train.hosts import cluster

        cluster.start()
        checks.check(config, not arguments.compile_only, planned=arguments.dry_run)
        workdir = run.name_workdir(config, arguments.workdir)
        place = mirror.url if mirror else str(workdir)
        SIGNALS_OF_RUN.remedy = f"continue with --workdir {place}"
        code = 1
        for note in checks.notes(config) if cluster.is_first() else ():
            print(f"note: {note}")
        if arguments.dry_run:
            checks.describe(config)
        elif arguments.compile_only:
            target = workdir / "compile.json"
            options = arguments.compile_only, target, _print, arguments.programs
            checks.compile_only(config, *options)
        else:
            run.train(config, workdir, arguments.resume, mirror)
        WATCH.finish()
    except Exception as error:
        error = mirror.named_in(error) if mirror else error
        way_on = _way_on(workdir, mirror) if workdir and code == 1 else ""
        WATCH.report(error, code, _memory_remedies(config), way_on)
        return code
    except Interrupted as error:
        more = f"; continue with --workdir {place}" if place else ""
        WATCH.claim()
        line = complain(f"interrupted{more}", prefix=error.number.name)
        SIGNALS_OF_RUN.told = True
        WATCH.finish() if error.synced else WATCH.announce(line, error.code)
        return error.code
    except KeyboardInterrupt:
        complain(f"interrupted; continue with --workdir {place}" if place else "interrupted")
        return 130
    return 0


def _open_mirror(arguments: argparse.Namespace):
    """What stands for a `--workdir` in a bucket, whose place on this host it gives the flag; None
    for a folder.

    Raises:
      ValueError: a package is missing, or programs are to be compiled into a bucket.
      OSError: the store does not answer.
    """
    if not is_remote(arguments.workdir):
        return None
    if arguments.compile_only:
        raise ValueError(f"--workdir {arguments.workdir}: --compile-only writes to a folder only")
    from train.workdir.mirror import Mirror

    mirror = Mirror(arguments.workdir)
    arguments.workdir = str(mirror.folder)
    return mirror


def _way_on(workdir: Path, mirror: Any) -> str:
    """How to go on with what a run has saved, or to begin again; empty if there is no run yet."""
    from train.workdir.config_file import FILE

    saved = mirror.saved if mirror else any((workdir / "checkpoints").glob("[0-9]*"))
    place = mirror.url if mirror else workdir
    if saved:
        return f"what was saved goes on with --workdir {place}"
    begun = (workdir / FILE).exists()
    return f"nothing was saved yet; --workdir {place} begins again" if begun else ""


def _memory_remedies(config: Any) -> list[str]:
    """What a run would need less memory with, if it had begun."""
    if config is None:
        return []
    from train.checks import memory_remedies

    return memory_remedies(config)


def run_command() -> int:
    """`main` in a process of its own, which ends with it."""
    SIGNALS_OF_RUN.install()
    watch_for_notices()
    try:
        code = main()
    except Interrupted as error:  # before there was a workdir
        code = error.code
    WATCH.leave(code)
    end_process(code)
    return code


if __name__ == "__main__":
    sys.exit(run_command())
