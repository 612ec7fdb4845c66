"""Accuracies of a set of questions with their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from paravt_jax.estimates import wilson
from paravt_jax.records import RolloutGroup, Row


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
        mean = sum(values) / len(values)
        return cls(mean, *wilson(mean, videos), videos)


def accuracies(
    groups: Sequence[RolloutGroup], strata: Mapping[str, str] = {}
) -> dict[str, Accuracy]:
    """`accuracy` over all rollouts, `accuracy/TYPE` of each type of question and, where `strata`
    names the part that a row id belongs to, `accuracy/TYPE/PART`."""
    by_name: dict[str, list[RolloutGroup]] = {}
    for group in groups:
        for name in accuracies_of(group.row, strata):
            by_name.setdefault(name, []).append(group)
    return {name: _accuracy(by_name[name]) for name in sorted(by_name)}


def accuracies_of(row: Row, strata: Mapping[str, str]) -> list[str]:
    """The names of the accuracies that a question counts for."""
    kind, part = f"accuracy/{row.question_type}", strata.get(row.row_id)
    return ["accuracy", kind, *([f"{kind}/{part}"] if part else [])]


def _accuracy(groups: Sequence[RolloutGroup]) -> Accuracy:
    values = [t.rewards["accuracy"] for group in groups for t in group.trajectories]
    return Accuracy.of(values, len({group.row.video.path for group in groups}))
