"""Accuracies of a set of questions with their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from paravt_jax.records import RolloutGroup

Z = 1.959964
"""Quantile of the standard normal distribution that leaves 2.5 % above it."""


class Accuracy(NamedTuple):
    """A mean accuracy and its 95 % interval."""

    mean: float
    low: float
    high: float
    videos: int

    @classmethod
    def of(cls, values: Sequence[float], videos: int) -> Accuracy:
        """Wilson's score interval of accuracies between 0 and 1, one per question.

        It counts videos, as questions about one video are not independent. Accuracies between 0
        and 1 (overlaps in time) vary less than it assumes, so that it is rather too wide.
        """
        mean, weight = sum(values) / len(values), Z * Z / videos
        centre = (mean + weight / 2) / (1 + weight)
        half = (weight * (mean * (1 - mean) + weight / 4)) ** 0.5 / (1 + weight)
        return cls(mean, max(centre - half, 0.0), min(centre + half, 1.0), videos)


def accuracies(
    groups: Sequence[RolloutGroup], strata: Mapping[str, str] = {}
) -> dict[str, Accuracy]:
    """`accuracy` over all rollouts, `accuracy/TYPE` of each type of question and, where `strata`
    names the part that a row id belongs to, `accuracy/TYPE/PART`."""
    found: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        kind, part = f"accuracy/{group.row.question_type}", strata.get(group.row.row_id)
        for name in ("accuracy", kind, *([f"{kind}/{part}"] if part else [])):
            found.setdefault(name, []).append(group)
    return {name: _accuracy(found[name]) for name in sorted(found)}


def _accuracy(groups: Sequence[RolloutGroup]) -> Accuracy:
    values = [t.rewards["accuracy"] for group in groups for t in group.trajectories]
    return Accuracy.of(values, len({group.row.video.path for group in groups}))
