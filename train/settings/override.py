"""Settings by their dotted names: `--set key=value`, and recipes that say what differs from others.

A recipe that differs in two settings from another:

    based_on(needle_rl(), {"agent.evidence": "frames", "rl.minibatches": 2})
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from paravt_jax.flags import EMPTY
from paravt_jax.plugins import Own
from paravt_jax.settings import (
    Refused,
    alternatives,
    choices,
    describe_choices,
    hints_of,
    is_empty,
    plain_type,
    takes_own,
)

RECIPE_ONLY = {"recipe only": True}
"""Metadata of a field that `--set` cannot reach."""
UNSET = {"unset": True}
"""Metadata of a field that is no setting."""

SWITCH = {"true": True, "1": True, "false": False, "0": False}

Section = TypeVar("Section")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One setting that is set."""

    key: str
    """Its whole dotted name."""
    value: Any
    """What it is set to: a value, or the text of one."""
    text: bool = False
    """Whether it is a text from a command line."""

    @property
    def written(self) -> str:
        """The name as it was written."""
        return f"--set {self.key}" if self.text else self.key


def based_on(config: Section, changes: Mapping[str, Any]) -> Section:
    """The configuration with other values of the settings that are named, e.g. `agent.evidence`.

    All are changed before the result is checked, so settings that only fit together can be given
    in any order. A name may also be that of a section, whose value is then a whole one.

    Raises:
      ValueError: unknown name, a value of the wrong type, or what the result refuses.
    """
    return _apply(config, [Assignment(key, value) for key, value in changes.items()], {})


def override(
    config: Section,
    assignments: list[str],
    flags: Mapping[str, tuple[str, Any]] | None = None,
) -> Section:
    """Apply `key=value` assignments with dotted keys, e.g. `optimizer.learning_rate=1e-4`.

    All are applied before the result is checked; of the same key the last counts.

    Args:
      flags: flags of a command line that set a setting, with their values, by its name; refusals
        name the flag.

    Raises:
      ValueError: unknown key (with the keys that exist there) or a value of the wrong type.
    """
    flags = flags or {}
    changes = [Assignment(key, value) for key, (_, value) in flags.items()]
    written = {key: f"{flag} {value}" for key, (flag, value) in flags.items()}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} is not of the form key=value")
        changes.append(Assignment(key, value, text=True))
        written[key] = assignment
    return _apply(config, changes, written)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All settings with their full names, and their values: of a configuration its own, of a class
    the defaults, where there are some."""
    for field in dataclasses.fields(config):
        value = default_of(field) if isinstance(config, type) else getattr(config, field.name)
        if field.metadata == UNSET or value is dataclasses.MISSING:
            continue
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; `MISSING` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain JSON values."""
    unset = {field.name for field in dataclasses.fields(config) if field.metadata == UNSET}
    return {k: value for k, value in dataclasses.asdict(config).items() if k not in unset}


def _apply(config: Any, assignments: list[Assignment], written: Mapping[str, str]) -> Any:
    changes = _changes(config, assignments, "", written)
    given = _given(config, changes, [each.key for each in assignments])
    return _replaced(config, {**changes, "given": given}, "", written)


def _given(config: Any, changes: Mapping[str, Any], keys: list[str]) -> tuple[str, ...]:
    """The settings that are given: those that are named, and of whole sections what is new."""
    before, after = dict(leaves(config)), {}
    for name, value in changes.items():
        section = dataclasses.is_dataclass(value)
        after |= dict(leaves(value, f"{name}.")) if section else {name: value}
    whole = tuple(f"{key}." for key in keys)
    new = {name for name in after if name.startswith(whole) and after[name] != before.get(name)}
    return tuple(sorted(new | (set(keys) & set(after))))


def _replaced(section: Any, values: dict[str, Any], prefix: str, written: Mapping[str, str]) -> Any:
    try:
        return dataclasses.replace(section, **values)
    except Refused as error:
        raise error.within(prefix, written) from error


def _changes(
    section: Any, assignments: list[Assignment], prefix: str, written: Mapping[str, str]
) -> dict[str, Any]:
    """The new values of the section's own fields."""
    groups: dict[str, list[Assignment]] = {}
    for assignment in assignments:
        name = assignment.key.removeprefix(prefix).partition(".")[0]
        groups.setdefault(name, []).append(assignment)
    return {name: _changed(section, name, group, prefix, written) for name, group in groups.items()}


def _changed(
    section: Any, name: str, group: list[Assignment], prefix: str, written: Mapping[str, str]
) -> Any:
    last, full = group[-1], prefix + name
    fields = {f.name: f for f in dataclasses.fields(section) if f.metadata != UNSET}
    if name not in fields:
        raise ValueError(f"{last.written}: no such key; known here: {', '.join(fields)}")
    if last.text and fields[name].metadata == RECIPE_ONLY:
        raise ValueError(f"{last.written}: this key can be set in a recipe only")
    hint, current = hints_of(type(section))[name], getattr(section, name)
    whole = [assignment for assignment in group if assignment.key == full]
    if dataclasses.is_dataclass(current):
        for assignment in whole:
            if assignment.text or not isinstance(assignment.value, type(current)):
                inner = ", ".join(field.name for field in dataclasses.fields(current))
                raise ValueError(f"{assignment.written} is a section; set one of its keys: {inner}")
            current = assignment.value
        parts = [assignment for assignment in group if assignment.key != full]
        values = _changes(current, parts, f"{full}.", written)
        return _replaced(current, values, f"{full}.", written)
    if last not in whole:
        raise ValueError(f"{last.written}: {name} has no keys of its own")
    return (parse if last.text else typed)(last.value, hint, last.key)


def can_be_set(hint: Any) -> bool:
    """Whether a field of this type takes a text."""
    kind = plain_type(hint)
    if typing.get_origin(kind) is tuple:
        return can_be_set(typing.get_args(kind)[0])
    return kind in (bool, int, float, str, Own) or bool(choices(kind))


def parse(text: str, hint: Any, key: str) -> Any:
    """A value from text, by the type that the field declares.

    Raises:
      ValueError: the text is no such value, or the field is no plain value.
    """
    if not can_be_set(hint):
        raise ValueError(f"--set {key}: this key can be set in a recipe only")
    many = typing.get_origin(plain_type(hint)) is tuple
    if text.lower() in ("none", "null") and (many or type(None) in alternatives(hint)):
        return () if many else None
    inner = typing.get_args(plain_type(hint))[0] if many else hint
    parts = text.split(",") if many else [text]
    if any(is_empty(part, hint) for part in parts):
        raise ValueError(f"--set {key}: the value {EMPTY}, or set it to none if it may be")
    values = [_parsed(part, inner, key, text) for part in parts]
    return tuple(values) if many else values[0]


def _parsed(part: str, hint: Any, key: str, text: str) -> Any:
    """A single value, which is a part of a text."""
    if choices(hint) or takes_own(hint):
        return _choice(part, hint, f"--set {key}={text}")
    kind = plain_type(hint)
    try:
        return SWITCH[part.lower()] if kind is bool else kind(part)
    except (ValueError, KeyError) as error:
        raise ValueError(f"--set {key}={text}: expected {kind.__name__}") from error


def _choice(text: str, hint: Any, written: str) -> Any:
    """One of the values that a type lists, or the name of a function of the user's own."""
    if takes_own(hint) and ":" in text:
        return Own(text)
    for choice in choices(hint):
        if str(choice) == text:
            return choice
    raise ValueError(f"{written}: choose {describe_choices(hint)}")


def typed(value: Any, hint: Any, key: str) -> Any:
    """A value as the field declares it: sections from objects of JSON, lists as tuples, whole
    numbers as floats.

    Raises:
      ValueError: it is of another type, or names a key that the section does not have.
    """
    kind = plain_type(hint)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if value is None and type(None) in alternatives(hint):
        return None
    if takes_own(hint) and origin is not tuple and callable(value):
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _typed_section(value, kind, key)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(typed(item, inner[0], key) for item in value)
    if origin is dict and isinstance(value, dict):
        return {name: typed(item, inner[1], f"{key}.{name}") for name, item in value.items()}
    if (choices(hint) or takes_own(hint)) and origin is not tuple:
        return _choice(str(value), hint, f"{key}={value}")
    if kind is float and type(value) is int:
        return float(value)
    if origin is not None or type(value) is not kind:
        raise ValueError(f"{key}={value!r} is no {getattr(kind, '__name__', kind)}")
    return value


def _typed_section(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{key or 'the whole'} is no section but {value!r}")
    hints = hints_of(kind)
    prefix = f"{key}." if key else ""
    names = {field.name for field in dataclasses.fields(kind) if field.metadata != UNSET}
    unknown = [f"{prefix}{name}" for name in value if name not in names]
    if unknown:
        raise ValueError(f"this version knows no setting {', '.join(unknown)}")
    values = {name: typed(v, hints[name], prefix + name) for name, v in value.items()}
    # What a file holds was given when it was written, and must not act for ever.
    values |= {field.name: () for field in dataclasses.fields(kind) if field.metadata == UNSET}
    try:
        return kind(**values)
    except Refused as error:
        raise error.within(prefix) from error
