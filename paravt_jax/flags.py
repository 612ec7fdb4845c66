"""What is given on a command line or in a recipe must not be empty.

An unset shell variable leaves `--data ""`, which would quietly mean what the demo does without the
flag.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

EMPTY = "is empty (an unset shell variable?); give a value, or leave it out"

MAY_BE_EMPTY = ("think_prefix", "constrain")
"""Settings of which an empty text means that there is none."""


def given(text: str) -> str:
    """The value of a flag, as the `type` of an argument.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"the value {EMPTY}")
    return text


def check_given(settings: Any, prefix: str = "") -> None:
    """Refuse empty texts in this dataclass and those that it holds. Those that are empty by default
    stand for nothing.

    Args:
        prefix: what stands before the names of its fields in error messages, e.g. `data.`.

    Raises:
        ValueError: naming the setting in full.
    """
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_given(value, f"{name}.")
        texts = value if isinstance(value, tuple) else (value,)
        empty = any(isinstance(text, str) and not text.strip() for text in texts)
        if empty and value != field.default and field.name not in MAY_BE_EMPTY:
            raise ValueError(f"{name} {EMPTY}")
