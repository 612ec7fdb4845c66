"""Windows of time as sets: what two lists of windows have in common."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from paravt_jax.protocol import Window, call_times
from paravt_jax.records import ToolCall

LATEST = 1e7
"""Seconds, some 16 weeks. Windows that end later are taken for none: no video is so long, and
squares of times stay far from overflow."""
_ROUNDING = 1e-6
"""Seconds that sums of times may be off."""


def asked_window(call: ToolCall) -> Window | None:
    """The window that a call asks for, as asked: a negative start becomes 0, an end beyond the
    video stays. None if it asks for none. Reads `start_time` and `end_time` or `start` and `end`.
    """
    times = call_times(call)
    return None if isinstance(times, str) else proper(*times)


def proper(start: float | None, end: float | None) -> Window | None:
    """The window `(start, end)` from 0 on, or None if that is no window of a video."""
    if start is None or end is None or not max(start, 0.0) < end <= LATEST:
        return None
    return max(start, 0.0), end


def merged(windows: Iterable[Window]) -> list[Window]:
    """The same set of times as windows that do not touch, in order."""
    result: list[Window] = []
    for start, end in sorted(window for window in windows if window[0] < window[1]):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def length(windows: Iterable[Window]) -> float:
    """Seconds that the windows cover together."""
    return math.fsum(end - start for start, end in merged(windows))


def stale_calls(calls: Sequence[ToolCall], fresh_seconds: float | int) -> int:
    """How many calls look at less than `fresh_seconds` of what no call before them looked at.

    Of those that ask for no window, how many repeat an earlier call. Ends beyond the video count as
    asked; a tool refuses windows that begin there.
    """
    windows: list[Window] = []
    stale = 0
    for at, call in enumerate(calls):
        window = asked_window(call)
        if window is None:
            stale += call in calls[:at]
        else:
            stale += length([*windows, window]) - length(windows) < fresh_seconds - _ROUNDING
            windows.append(window)
    return stale


def hull(windows: Sequence[Window]) -> Window:
    """The shortest window that holds all of them, of which there is at least one."""
    return min(start for start, _ in windows), max(end for _, end in windows)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """How two sets of windows lie to each other. All figures are 0 if one of the sets is empty."""

    iou: float = 0.0
    """Intersection over union, in [0, 1]."""
    iop: float = 0.0
    """Share of the prediction that is right (intersection over prediction), in [0, 1]."""
    iog: float = 0.0
    """Share of the ground truth that is found (intersection over ground truth), in [0, 1]."""
    diou: float = 0.0
    """IoU minus the squared distance of the centres over the squared length of the common hull
    (distance IoU, arXiv 1911.08287), in (-1, 1]; centres are those of each side's hull."""
    hull_iou: float = 0.0
    """Intersection over the length of the common hull, in [0, 1]. For two single windows that is
    the IoU."""


def overlap(predicted: Sequence[Window], expected: Sequence[Window]) -> Overlap:
    """Compare two sets of windows by measure; windows of one side that overlap count once."""
    a, b = merged(predicted), merged(expected)
    if not a or not b:
        return Overlap()
    together = length([*a, *b])
    common = max(length(a) + length(b) - together, 0.0)
    (start_a, end_a), (start_b, end_b) = hull(a), hull(b)
    whole = max(end_a, end_b) - min(start_a, start_b)
    apart = ((start_a + end_a) - (start_b + end_b)) / (2 * whole)
    iou = min(common / together, 1.0)
    return Overlap(
        iou=iou,
        iop=min(common / length(a), 1.0),
        iog=min(common / length(b), 1.0),
        diou=iou - apart * apart,
        hull_iou=min(common / whole, 1.0),
    )


def distance(time: float, windows: Sequence[Window]) -> float:
    """Seconds from a time to the nearest of the windows, 0 inside one."""
    return min(max(start - time, time - end, 0.0) for start, end in windows)
