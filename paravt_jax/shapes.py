"""Static shapes: few sizes to compile for, whatever the data.

One rule for rows, frames and tokens: 1, 2, 3, 4, 6, 8, 12, 16, 24, ... times a unit. Padding takes
at most half as much again, and so many sizes double what they hold that few of them occur.
"""

from __future__ import annotations


def bucket(count: int, unit: int = 1, most: int | None = None, coarse: bool = False) -> int:
    """The smallest static size that holds `count`.

    Args:
      count: what is to be held.
      unit: sizes are multiples of it.
      most: no size is larger. `count` must not be, either.
      coarse: take every other size (1, 2, 4, 8, ... units), where sizes of several things multiply
        to the number of programs.
    """
    size = unit
    while size < count:
        half = size + size // 2
        # Half a unit is no size.
        if not coarse and size > unit and half >= count:
            size = half
        else:
            size *= 2
    return size if most is None else min(size, most)


def ladder(least: int, most: int, unit: int, parts: int) -> list[int]:
    """Sizes from `least` to `most`, multiples of `unit`, each larger than the one before by a share
    of `1 / parts` or by a unit: where `bucket` would pad too much."""
    sizes, last = [-(-least // unit) * unit], -(-most // unit) * unit
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] + max(sizes[-1] // parts // unit, 1) * unit, last))
    return sizes
