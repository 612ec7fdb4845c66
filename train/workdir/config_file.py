"""`config.json` of a workdir: read back, and compared with what a resumed run is told.

Settings are any tree of dataclasses. Beside them the file holds checksums of the files that
functions of the user's own come from.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

from paravt_jax.marks import Mark
from paravt_jax.plugins import Own, is_reference, source_of
from paravt_jax.remote import absolute, real
from paravt_jax.settings import marked
from train.settings.override import based_on, leaves, to_dict, typed

Settings = TypeVar("Settings")

FILE = "config.json"
OWN_FILES = "own_files"
"""Its one key that is no setting."""

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
        stored = json.loads(path.read_text(encoding="utf-8"))
        left_out = {OWN_FILES, *but}
        if isinstance(stored, dict):
            stored = {name: value for name, value in stored.items() if name not in left_out}
        return typed(stored, kind, "")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be continued: {error}; mend it, use the version that wrote it, or "
            "choose another --workdir"
        ) from error


def as_file(settings: Any) -> str:
    """What `config.json` holds of a run with these settings."""
    files = own_files(settings)
    # Only where there are some: older versions refuse a key that they do not know.
    content = {**to_dict(settings), **({OWN_FILES: files} if files else {})}
    return json.dumps(content, indent=2) + "\n"


def own_files(settings: Any) -> dict[str, str]:
    """The files that the recipe and functions of the user's own come from, with their sha256."""
    values = [value for _, value in leaves(settings)]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else [value])]
    names = [part for part in parts if isinstance(part, Own)]
    names += [name for name in [getattr(settings, "recipe", "")] if is_reference(name)]
    return dict(sorted(filter(None, map(source_of, names))))


def changed_own_files(workdir: Path, settings: Any) -> list[str]:
    """Files of the user's own whose content is another than when the workdir's run began, or was
    last continued."""
    stored = json.loads((workdir / FILE).read_text(encoding="utf-8")).get(OWN_FILES, {})
    # A file that the run did not use then is no change of that file.
    return [file for file, now in own_files(settings).items() if stored.get(file, now) != now]


def younger_settings(workdir: Path, settings: Any) -> list[str]:
    """Settings that the workdir's file does not hold, because it was written before them."""
    stored = flatten(json.loads((workdir / FILE).read_text(encoding="utf-8")))
    return sorted(set(flat_settings(settings)) - set(stored))


def flat_settings(settings: Any) -> dict[str, Any]:
    """All settings by their dotted names, as JSON values."""
    return flatten(json.loads(json.dumps(to_dict(settings))))


def evaluated_settings(settings: Any) -> dict[str, Any]:
    """Those that decide what an evaluation finds, by their dotted names."""
    kind, flat = type(settings), flat_settings(settings)
    deciding = {key for key in flat if marked(kind, key, Mark.EVALUATED)}
    return {k: flat[k] for k in flat if k in deciding and not marked(kind, k, Mark.SAME_RESULTS)}


def differences(before: Any, now: Any) -> dict[str, Difference]:
    """Settings that differ, by name."""
    old, new = flat_settings(before), flat_settings(now)
    keys = dict.fromkeys((*old, *new))
    pairs = {key: (old.get(key), new.get(key)) for key in keys}
    kind = type(now)
    return {k: p for k, p in pairs.items() if meant(kind, k, p[0]) != meant(kind, k, p[1])}


def meant(kind: type, key: str, value: Any) -> Any:
    """What a setting of this kind of settings stands for: of a path, the file that it leads to from
    here."""
    if not value or not marked(kind, key, Mark.PATH):
        return value
    return [real(p) for p in ([value] if isinstance(value, str) else value)]


def check_same_run(before: Any, now: Any, workdir: Path) -> dict[str, Difference]:
    """What a resumed run gives anew.

    Raises:
      ValueError: it also changes what it may not, naming all of that.
    """
    changes = differences(before, now)
    refused = [
        f"{key}={old!r}, not {new!r}"
        for key, (old, new) in changes.items()
        if not marked(type(now), key, Mark.SAME_RESULTS, Mark.MAY_CHANGE)
    ]
    if refused:
        raise ValueError(
            f"{workdir} holds a run with {'; '.join(refused)}: choose another --workdir, or leave "
            "out --recipe and what differs, and it goes on with its own settings"
        )
    return changes


def with_whole_paths(settings: Settings) -> Settings:
    """The settings with absolute paths, so that a run can be continued from anywhere."""
    kind = type(settings)
    paths = {key: value for key, value in leaves(settings) if marked(kind, key, Mark.PATH)}
    return based_on(settings, {key: _whole(value) for key, value in paths.items() if value})


def _whole(value: Any) -> Any:
    """A path, or several, from the root."""
    if isinstance(value, str):
        return absolute(value)
    return tuple(map(absolute, value))


def flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of a file by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
        flat |= inner or {f"{prefix}{key}": value}
    return flat
