"""`config.json` of a workdir: read back, and compared with what a resumed run is told.

Settings are any tree of dataclasses.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from paravt_jax.rewards.judge import WAY_TO_JUDGE
from train.settings.override import based_on, to_dict, typed

Settings = TypeVar("Settings")

FILE = "config.json"

SAME_RESULTS = (
    "mesh",
    "rollout_mesh",
    "model.remat",
    "model.remat_keeps",
    "model.remat_block",
    "data.cache_dir",
    "data.decode_seconds",
    "data.max_bad_rows",
    "data.max_rejected",
    "data.workers",
    "rl.micro_groups",
    "rl.reference_memory",
    "rl.warm_up",
    "sft.micro_rows",
    "agent.decode_threads",
    "agent.subagent_batch",
    "output.",
    *(f"{who}.judge.{name}" for who in ("rewards", "teacher") for name in WAY_TO_JUDGE),
)
"""Settings (or beginnings of their names) that decide where and how fast, not what is learned."""

MAY_CHANGE = (
    *SAME_RESULTS,
    "steps",
    "optimizer.learning_rate",
    "optimizer.decay_steps",
    "evaluation.batch",
    "evaluation.frame_budget",
    "evaluation.split",
)
"""Settings that a resumed run may give anew; a run that diverged needs another learning rate."""

PATHS = (
    *("model.folder", "model.adapter"),
    *("data.path", "data.video_root", "data.mixture", "data.cache_dir"),
)
"""Settings that name files: compared by what they lead to."""

Difference = tuple[Any, Any]
"""A setting as the workdir has it, and as the command line has it."""


def read_settings(
    workdir: Path, kind: type[Settings], but: Collection[str] = ()
) -> Settings | None:
    """The settings of the run in a workdir, of this kind; None if it holds none.

    Settings that are younger than the file take their defaults.

    Args:
      but: sections that are left at their defaults, so that functions of a user's own that they
        name need not be there.

    Raises:
      ValueError: the file is damaged, or holds settings or values that this version refuses.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if but:
            held = {name: value for name, value in held.items() if name not in but}
        return typed(held, kind, "")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be continued: {error}; mend it, use the version that wrote it, or "
            "choose another --workdir"
        ) from error


def younger_settings(workdir: Path, settings: Any) -> list[str]:
    """Settings that the workdir's file does not hold, because it was written before them."""
    held = flatten(json.loads((workdir / FILE).read_text(encoding="utf-8")))
    return sorted(set(flat_settings(settings)) - set(held))


def flat_settings(settings: Any) -> dict[str, Any]:
    """All settings by their dotted names, as JSON values."""
    return flatten(json.loads(json.dumps(to_dict(settings))))


def differences(before: Any, now: Any) -> dict[str, Difference]:
    """Settings that differ, by name."""
    old, new = flat_settings(before), flat_settings(now)
    keys = dict.fromkeys((*old, *new))
    pairs = {key: (old.get(key), new.get(key)) for key in keys}
    return {k: pair for k, pair in pairs.items() if meant(k, pair[0]) != meant(k, pair[1])}


def meant(key: str, value: Any) -> Any:
    """What a setting stands for: of a path, the file that it leads to from here."""
    if key not in PATHS or not value:
        return value
    return [os.path.realpath(p) for p in ([value] if isinstance(value, str) else value)]


def check_same_run(before: Any, now: Any, workdir: Path) -> dict[str, Difference]:
    """What a resumed run gives anew.

    Raises:
      ValueError: it also changes what it may not, naming all of that.
    """
    found = differences(before, now)
    refused = [
        f"{key}={old!r}, not {new!r}"
        for key, (old, new) in found.items()
        # By its beginning, so that `output.` is a whole section.
        if not key.startswith(MAY_CHANGE)
    ]
    if refused:
        raise ValueError(
            f"{workdir} holds a run with {'; '.join(refused)}: choose another --workdir, or leave "
            "out --recipe and what differs, and it goes on with its own settings"
        )
    return found


def with_whole_paths(settings: Settings) -> Settings:
    """The settings with absolute paths, so that a run can be continued from anywhere."""
    given = {key: functools.reduce(getattr, key.split("."), settings) for key in PATHS}
    return based_on(settings, {key: _whole(value) for key, value in given.items() if value})


def _whole(value: Any) -> Any:
    """A path, or several, from the root."""
    if isinstance(value, str):
        return os.path.abspath(value)
    return tuple(map(os.path.abspath, value))


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of a file by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= inner or {f"{prefix}{key}": value}
    return flat
