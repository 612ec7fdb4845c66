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
from train.workdir.config_file import FILE, OWN_FILES, flat_settings, flatten, meant

NEEDED = {"rollout", "question", "answer", "question_type", "video", "text", "rewards", "calls"}
NEEDED |= {"generated", "log_probs"}
"""What every line of rollouts holds, also of runs before there were pages."""
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
        path = self.workdir / FILE
        stored = _object(path.read_text(encoding="utf-8"), str(path))
        return flatten({name: value for name, value in stored.items() if name != OWN_FILES})

    @functools.cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of `metrics.jsonl`; none of a run that has not finished a step."""
        return list(_lines(self.workdir / "metrics.jsonl"))

    @property
    def evaluation(self) -> dict[str, Any]:
        """`evaluation.json`; empty where nothing was evaluated."""
        path = self.workdir / "evaluation.json"
        return _object(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}

    @functools.cached_property
    def departures(self) -> list[tuple[str, Any, Any]]:
        """Settings that the recipe says otherwise: name, the recipe's value, the run's. Empty if
        the recipe is gone."""
        try:
            config = get_recipe(self.settings["recipe"])
        except (ValueError, KeyError, OSError):
            return []
        kind, recipe = type(config), flat_settings(config)
        pairs = [(key, recipe.get(key), value) for key, value in self.settings.items()]
        return [
            (k, old, new) for k, old, new in pairs if meant(kind, k, old) != meant(kind, k, new)
        ]

    @functools.cached_property
    def steps(self) -> list[int]:
        """Steps whose rollouts are there, of those that `metrics.jsonl` holds."""
        recorded = {int(record["step"]) for record in self.metrics}
        files = (self.workdir / FOLDER).glob("step_*.jsonl")
        return sorted(recorded & {int(path.stem.removeprefix("step_")) for path in files})

    def rollouts(self, step: int) -> list[Group]:
        """The rollouts of a step, prompt by prompt."""
        groups: list[Group] = []
        path = self.workdir / FOLDER / f"{name_of(step)}.jsonl"
        for number, line in enumerate(_lines(path), 1):
            missing = NEEDED - set(line)
            if missing:
                raise ValueError(f"{path}, line {number} lacks {', '.join(sorted(missing))}")
            if line["rollout"] == 0 or not groups:
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
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield _object(line, f"{path}, line {number}")


def _object(text: str, place: str) -> dict[str, Any]:
    """A JSON object that stands at a place.

    Raises:
      ValueError: it is none.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise ValueError(f"{place} is damaged: {error}; delete it, or run again") from error
    return value
