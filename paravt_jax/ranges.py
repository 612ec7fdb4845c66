"""Ranges of numeric settings, written as annotations beside the fields that they bound.

    learning_rate: Annotated[float, above(0)] = 2e-6

`paravt_jax.settings` holds sections to them. A number without an annotation must still be finite,
and an integer must fit 32 bits, because it ends up as the size or content of an array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Range:
    """Which numbers a setting takes, and how help and refusals say so."""

    low: float | int
    high: float | int
    wording: str
    """What follows "must be"."""
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float | int) -> bool:
        """Whether the number lies in the range; NaN lies in none."""
        low = value > self.low if self.open_low else value >= self.low
        return low and (value < self.high if self.open_high else value <= self.high)


def above(low: float | int) -> Range:
    """Finite numbers above `low`."""
    return Range(low, math.inf, f"above {low:g}", True, True)


def at_least(low: float | int, why: str = "") -> Range:
    """Finite numbers from `low` on; `why` may say what is wrong with others."""
    reason = f" ({why})" if why else ""
    return Range(low, math.inf, f"at least {low:g}{reason}", False, True)


def within(low: float | int, high: float | int) -> Range:
    """Numbers from `low` to `high`."""
    return Range(low, high, f"between {low:g} and {high:g}")


def below(low: float | int, high: float | int) -> Range:
    """Numbers from `low` up to, not including, `high`."""
    return Range(low, high, f"at least {low:g} and below {high:g}", open_high=True)


def above_to(low: float | int, high: float | int) -> Range:
    """Numbers above `low` up to `high`."""
    return Range(low, high, f"above {low:g} and at most {high:g}", open_low=True)


FINITE = Range(-math.inf, math.inf, "a finite number", True, True)
INTEGER = Range(-INT32_MAX, INT32_MAX, "a number of at most 32 bits")


def ranges_of(hint: Any) -> list[Range]:
    """The ranges in a type's annotation."""
    return [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range)]


def fault(value: Any, hint: Any) -> str | None:
    """What a number, or each of a tuple, must be and is not; None where nothing is wrong."""
    for number in _numbers(value):
        size = INTEGER if isinstance(number, int) else FINITE
        for limits in (size, *ranges_of(hint)):
            if number not in limits:
                return limits.wording
    return None


def _numbers(value: Any) -> Iterator[float | int]:
    for part in value if isinstance(value, tuple) else (value,):
        if isinstance(part, int | float) and not isinstance(part, bool):
            yield part
