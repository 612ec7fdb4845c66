"""What is given on a command line or in a recipe must not be empty.

An unset shell variable leaves `--data ""`, which would quietly mean what the demo does without the
flag.
"""

from __future__ import annotations

import argparse

EMPTY = "is empty (an unset shell variable?); give a value, or leave it out"

MAY_BE_EMPTY = ("think_prefix", "constrain", "demand")
"""Settings of which an empty text means that there is none."""
MAY_BE_BLANK = ("stop", "head", "tail", "suffix")
"""Settings of which spaces and line breaks mean something."""


def given(text: str) -> str:
    """The value of a flag, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the value {EMPTY}")
    return text


def is_empty(text: str, name: str) -> bool:
    """Whether a text says nothing, as the value of the setting of this name."""
    return name not in MAY_BE_EMPTY and not (text if name in MAY_BE_BLANK else text.strip())
