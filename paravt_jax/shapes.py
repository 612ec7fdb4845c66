"""Static shapes: few sizes to compile for, whatever the data."""

from __future__ import annotations


def bucket(count: int, minimum: int = 1) -> int:
    """Smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is >= `count` and >= `minimum`."""
    power = 1
    while True:
        for size in (power, power + power // 2):
            if size >= max(count, minimum):
                return size
        power *= 2
