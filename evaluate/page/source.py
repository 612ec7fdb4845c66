"""What a run left in its workdir, read back for its page."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.recipes import get_recipe
from train.report.rollouts import DETAILS, FOLDER, name_of
from train.workdir.config_file import FILE, flat_settings, flatten, meant

Group = list[dict[str, Any]]
"""Lines of the rollouts of one prompt."""


@dataclasses.dataclass(frozen=True)
class RunSource:
    """The files of a workdir."""

    workdir: Path

    def __post_init__(self) -> None:
        if not (self.workdir / FILE).exists():
            raise ValueError(f"{self.workdir} holds no {FILE}: name the workdir of a run")

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by their dotted names."""
        return flatten(json.loads((self.workdir / FILE).read_text(encoding="utf-8")))

    @functools.cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of `metrics.jsonl`; none of a run that has not finished a step."""
        return list(_lines(self.workdir / "metrics.jsonl"))

    @property
    def evaluation(self) -> dict[str, Any]:
        """`evaluation.json`; empty where nothing was evaluated."""
        path = self.workdir / "evaluation.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @functools.cached_property
    def departures(self) -> list[tuple[str, Any, Any]]:
        """Settings that the recipe says otherwise: name, the recipe's value, the run's. Empty if
        the recipe is gone."""
        try:
            recipe = flat_settings(get_recipe(self.settings["recipe"]))
        except (ValueError, KeyError, OSError):
            return []
        own = self.settings
        return [
            (k, recipe.get(k), own[k]) for k in own if meant(k, own[k]) != meant(k, recipe.get(k))
        ]

    @functools.cached_property
    def steps(self) -> list[int]:
        """Steps whose rollouts are there, of those that `metrics.jsonl` holds."""
        known = {int(record["step"]) for record in self.metrics}
        found = (self.workdir / FOLDER).glob("step_*.jsonl")
        return sorted(known & {int(path.stem.removeprefix("step_")) for path in found})

    def rollouts(self, step: int) -> list[Group]:
        """The rollouts of a step, prompt by prompt."""
        groups: list[Group] = []
        for line in _lines(self.workdir / FOLDER / f"{name_of(step)}.jsonl"):
            if line["rollout"] == 0:
                groups.append([])
            groups[-1].append(line)
        return groups

    def details(self, step: int) -> Iterator[dict[str, Any]]:
        """What is told of each rollout besides, in the same order; nothing for ever after the last
        one, and from the first on if this step is not one of those that are told of."""
        path = self.workdir / DETAILS / f"{name_of(step)}.jsonl"
        return itertools.chain(_lines(path), itertools.repeat({}))

    def sheets(self, step: int) -> list[Path]:
        """The sheets of small frames of a step."""
        return sorted((self.workdir / DETAILS).glob(f"{name_of(step)}_*.jpg"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; a line that is written just now is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
