"""Command lines: their errors are one line, and what is given there or in a recipe is not empty.

An unset shell variable leaves `--data ""`, which would quietly mean what the demo does without the
flag.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

EMPTY = "is empty (an unset shell variable?); give a value, or leave it out"


def given(text: str) -> str:
    """The value of a flag, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the value {EMPTY}")
    return text


class Parser(argparse.ArgumentParser):
    """What every command of ours reads its flags with: whole names, no empty values, errors of one
    line and exit code 2."""

    def __init__(self, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **settings)
        self.register("type", None, given)  # of flags without a type

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        self.exit(2, f"error: {message}; `python {self.prog} --help` lists the flags\n")
