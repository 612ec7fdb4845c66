"""Before and after: the same held-out questions, sampled, greedy, and forbidden to crop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from paravt_jax.interfaces import Params
from paravt_jax.records import RolloutGroup
from rollout.agent import Item

Run = Callable[[Params, Sequence[Item], int], list[RolloutGroup]]
"""Runs one rollout per item from a seed and returns scored groups."""

Figures = Callable[[Sequence[RolloutGroup]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to put the questions to the agent."""

    name: str
    run: Run
    items: Sequence[Item]


def evaluate(
    params: Params,
    modes: Sequence[Mode],
    figures: Figures,
    *,
    batch: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Figures of each mode over all of its items, `batch` rollouts at a time.

    The seed decides the samples; the same seed before and after training compares the
    two policies under the same random numbers.
    """
    return {mode.name: dict(figures(_rollouts(params, mode, batch, seed))) for mode in modes}


def _rollouts(params: Params, mode: Mode, batch: int, seed: int) -> list[RolloutGroup]:
    groups: list[RolloutGroup] = []
    for start in range(0, len(mode.items), batch):
        groups += mode.run(params, mode.items[start : start + batch], seed)
    return groups
