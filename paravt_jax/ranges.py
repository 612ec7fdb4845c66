"""Ranges of numeric settings, written as annotations beside the fields that they bound.

    learning_rate: Annotated[float, above(0)] = 2e-6

`check_ranges` holds a whole configuration to them. A number without an annotation must still be
finite, and an integer must fit 32 bits, because it ends up as the size or content of an array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from typing import Any

INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a setting takes, and how an error message says so."""

    low: float | int
    high: float | int
    said: str
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float | int) -> bool:
        """Whether the number lies in the range; NaN lies in none."""
        low = value > self.low if self.open_low else value >= self.low
        return low and (value < self.high if self.open_high else value <= self.high)


def above(low: float | int) -> Range:
    """Finite numbers above `low`."""
    return Range(low, math.inf, f"must be above {low:g} and finite", True, True)


def at_least(low: float | int) -> Range:
    """Finite numbers from `low` on."""
    return Range(low, math.inf, f"must be at least {low:g} and finite", False, True)


def within(low: float | int, high: float | int) -> Range:
    """Numbers from `low` to `high`."""
    return Range(low, high, f"must be between {low:g} and {high:g}")


def below(low: float | int, high: float | int) -> Range:
    """Numbers from `low` up to, not including, `high`."""
    return Range(low, high, f"must be at least {low:g} and below {high:g}", open_high=True)


INTEGER = Range(-INT32_MAX, INT32_MAX, "does not fit 32 bits")
FINITE = Range(-math.inf, math.inf, "must be a finite number", True, True)


def check_ranges(settings: Any, prefix: str = "") -> None:
    """Refuse numbers outside of their ranges, in this dataclass and those that it holds.

    Args:
      prefix: what stands before the names of its fields in error messages, e.g. `optimizer.`.

    Raises:
      ValueError: naming the setting in full, its value and its range.
    """
    hints = _hints(type(settings))
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, f"{name}.")
            continue
        for number in _numbers(value):
            for limits in (*_ranges(hints[field.name]), _default(number)):
                if number not in limits:
                    raise ValueError(f"{name}={_shown(value)}: {limits.said}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _numbers(value: Any) -> Iterator[float | int]:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int | float) and not isinstance(part, bool):
            yield part


def _ranges(hint: Any) -> list[Range]:
    return [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range)]


def _default(number: float | int) -> Range:
    return INTEGER if isinstance(number, int) else FINITE


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
