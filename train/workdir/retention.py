"""Which checkpoints of a run stay: the newest, one for every so many minutes, the best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    step: int
    at: float = 0.0
    """Seconds since 1970 by the first host's clock; 0 where an earlier version did not say."""
    figure: float | None = None
    """What the state was evaluated to (`evaluation.best`); None if it was not."""

    @classmethod
    def from_meta(cls, step: int, meta: dict[str, Any]) -> Saved:
        """As the checkpoint itself says."""
        return cls(step, meta.get("saved_at", 0.0), meta.get("figure"))


@dataclasses.dataclass(frozen=True)
class Retention:
    """How many of each kind stay; one that is of any kind stays."""

    newest: int
    minutes: float = 0.0
    """Between those that stay for good; 0: none does."""
    best: int = 0

    def kept(self, saved: Iterable[Saved]) -> set[int]:
        """The steps that stay."""
        ordered = sorted(saved, key=lambda one: one.step)
        newest = ordered[-self.newest :]
        return {one.step for one in (*newest, *self._spaced(ordered), *self._best(ordered))}

    def is_best(self, figure: float, saved: Iterable[Saved]) -> bool:
        """Whether a state of this figure would be among the best."""
        ranked = self._best(saved)
        return len(ranked) < self.best or any(figure > (one.figure or 0.0) for one in ranked)

    def _spaced(self, ordered: list[Saved]) -> list[Saved]:
        """The first one, and each that is old enough by the last that stays: what was kept once is
        kept whatever follows."""
        spaced: list[Saved] = []
        for one in ordered if self.minutes else ():
            if not spaced or one.at - spaced[-1].at >= 60 * self.minutes:
                spaced.append(one)
        return spaced

    def _best(self, saved: Iterable[Saved]) -> list[Saved]:
        """Highest first; of equals the older one."""
        rated = [one for one in saved if one.figure is not None]
        return sorted(rated, key=lambda one: (-(one.figure or 0.0), one.step))[: self.best]
