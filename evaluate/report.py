"""The page of a run: `python evaluate/report.py WORKDIR [--compare OTHER]`.

Writes WORKDIR/report/, a static folder whose index.html opens from disk in any browser. A run does
so at its end; here it is written anew, also while a run goes on, or beside another one.
"""

import os
import os.path
import sys

# Run as a script, `sys.path[0]` is this folder, where `import evaluate` would find
# somebody else's. Swap it for the repository root before any other import.
if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
from collections.abc import Sequence
from pathlib import Path

from paravt_jax.failures import attempt
from paravt_jax.flags import Parser


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(prog="evaluate/report.py", description=__doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder of a run")
    parser.add_argument("--compare", metavar="OTHER", help="another run, shown beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    flags = make_parser().parse_args(arguments)
    return attempt(lambda: _main(flags))


def _main(flags: argparse.Namespace) -> None:
    from train.report.page.write import write_page

    other = Path(flags.compare).absolute() if flags.compare else None
    print(write_page(Path(flags.workdir).absolute(), other))


if __name__ == "__main__":
    sys.exit(main())
