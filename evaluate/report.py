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
from typing import NoReturn

from paravt_jax.failures import attempt
from paravt_jax.flags import given


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; `python evaluate/report.py --help` lists the flags\n")


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = Parser(
        prog="evaluate/report.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("type", None, given)  # of flags without a type
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder of a run")
    parser.add_argument("--compare", metavar="OTHER", help="another run, shown beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    flags = make_parser().parse_args(arguments)
    return attempt(lambda: _main(flags))


def _main(flags: argparse.Namespace) -> None:
    from evaluate.page.write import write_page

    other = Path(flags.compare).absolute() if flags.compare else None
    print(write_page(Path(flags.workdir).absolute(), other))


if __name__ == "__main__":
    sys.exit(main())
