"""Settings by their dotted names: `--set key=value`, and recipes that say what differs from others.

A recipe that differs in two settings from another:

    based_on(needle_rl(), {"agent.evidence": "frames", "rl.minibatches": 2})
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from paravt_jax.flags import EMPTY, MAY_BE_EMPTY

RECIPE_ONLY = {"recipe only": True}
"""Metadata of a field that `--set` cannot reach."""

Section = TypeVar("Section")


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One setting that is set."""

    key: str
    """Its whole dotted name."""
    path: list[str]
    """The part of the name that is still to follow."""
    value: Any
    """What it is set to: a value, or the text of one."""
    text: bool = False
    """Whether it is a text from a command line."""

    def inner(self) -> Assignment:
        """The same from one section further down."""
        return dataclasses.replace(self, path=self.path[1:])


def based_on(config: Section, changes: Mapping[str, Any]) -> Section:
    """The configuration with other values of the settings that are named, e.g. `agent.evidence`.

    All are changed before the result is checked, so settings that only fit together can be given
    in any order. A name may also be that of a section, whose value is then a whole one.

    Raises:
      ValueError: unknown name, a value of the wrong type, or what the result refuses.
    """
    given = [Assignment(key, key.split("."), value) for key, value in changes.items()]
    return _set(config, given)


def override(config: Section, assignments: list[str]) -> Section:
    """Apply `key=value` assignments with dotted keys, e.g. `optimizer.learning_rate=1e-4`.

    All are applied before the result is checked; of the same key the last counts.

    Raises:
      ValueError: unknown key (with the keys that exist there) or a value of the wrong type.
    """
    given = []
    for assignment in assignments:
        key, found, value = assignment.partition("=")
        if not found:
            raise ValueError(f"--set {assignment!r} is not of the form key=value")
        given.append(Assignment(key, key.split("."), value, text=True))
    return _set(config, given)


def named_in_full(message: str, section: Any, prefix: str) -> str:
    """A section's refusal with its settings' full names: it does not know where it stands."""
    names = "|".join(field.name for field in dataclasses.fields(section))
    return re.sub(rf"(?<![\w.])(?:{names})(?=[=.])", lambda name: prefix + name[0], message)


def _set(section: Any, assignments: list[Assignment], prefix: str = "") -> Any:
    groups: dict[str, list[Assignment]] = {}
    for own in assignments:
        groups.setdefault(own.path[0], []).append(own)
    values = {name: _new_value(section, name, group, prefix) for name, group in groups.items()}
    try:
        return dataclasses.replace(section, **values)
    except ValueError as error:
        raise ValueError(named_in_full(str(error), section, prefix)) from error


def _new_value(section: Any, name: str, group: list[Assignment], prefix: str) -> Any:
    last = group[-1].inner()
    fields = {field.name: field for field in dataclasses.fields(section)}
    if name not in fields:
        raise ValueError(f"{_said(last)}: no such key; known here: {', '.join(fields)}")
    if last.text and fields[name].metadata == RECIPE_ONLY:
        raise ValueError(f"{_said(last)}: this key can be set in a recipe only")
    kind, current = typing.get_type_hints(type(section))[name], getattr(section, name)
    if dataclasses.is_dataclass(current):
        return _new_section(current, [own.inner() for own in group], f"{prefix}{name}.")
    if last.path:
        raise ValueError(f"{_said(last)}: {name} has no keys of its own")
    return parse(last.value, kind, last.key) if last.text else typed(last.value, kind, last.key)


def _new_section(current: Any, group: list[Assignment], prefix: str) -> Any:
    for own in group:
        if own.path:
            continue
        if own.text or not isinstance(own.value, type(current)):
            inner = ", ".join(field.name for field in dataclasses.fields(current))
            raise ValueError(f"{_said(own)} is a section; set one of its keys: {inner}")
        current = own.value
    return _set(current, [own for own in group if own.path], prefix)


def _said(own: Assignment) -> str:
    return f"--set {own.key}" if own.text else own.key


def plain_type(kind: Any) -> Any:
    """The type of a setting that may also be something else, such as None or a function: the first
    of them."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def parse(text: str, kind: Any, key: str) -> Any:
    """A value from text, by the type that the field declares.

    Raises:
      ValueError: the text is no such value, or the field is no plain value.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if not text.strip() and key.rpartition(".")[2] not in MAY_BE_EMPTY:
        raise ValueError(f"--set {key}: the value {EMPTY}, or set it to none if it may be")
    if plain_type(kind) is not kind:
        return None if text.lower() in ("none", "null") else parse(text, plain_type(kind), key)
    if origin is tuple and can_be_set(kind):
        parts = [] if text.lower() == "none" else text.split(",")
        return tuple(parse(part, plain_type(inner[0]), key) for part in parts)
    if kind is bool:
        kind = {"true": True, "1": True, "false": False, "0": False}.__getitem__
    elif not (kind in (int, float, str) or isinstance(kind, enum.EnumType)):
        raise ValueError(f"--set {key}: this key can be set in a recipe only")
    try:
        return kind(text.lower() if text in ("True", "False") else text)
    except (ValueError, KeyError) as error:
        name = getattr(kind, "__name__", str(kind)).replace("__getitem__", "bool")
        raise ValueError(f"--set {key}={text}: expected {name}") from error


def typed(value: Any, kind: Any, key: str) -> Any:
    """A value as the field declares it: sections from objects of JSON, lists as tuples, whole
    numbers as floats.

    Raises:
      ValueError: it is of another type, or names a key that the section does not have.
    """
    if plain_type(kind) is not kind:
        own = callable(value) and any(map(_is_callable, typing.get_args(kind)))
        return value if own or value is None else typed(value, plain_type(kind), key)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else _typed_section(value, kind, key)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(typed(item, inner[0], key) for item in value)
    if origin is dict and isinstance(value, dict):
        return {name: typed(item, inner[1], f"{key}.{name}") for name, item in value.items()}
    if isinstance(kind, enum.EnumType):
        return kind(value)
    if kind is float and type(value) is int:
        return float(value)
    if origin is not None or type(value) is not kind:
        raise ValueError(f"{key}={value!r} is no {getattr(kind, '__name__', kind)}")
    return value


def _is_callable(kind: Any) -> bool:
    return typing.get_origin(kind) is collections.abc.Callable


def _typed_section(value: Any, kind: Any, key: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{key or 'the whole'} is no section but {value!r}")
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    prefix = f"{key}." if key else ""
    unknown = [f"{prefix}{name}" for name in value if name not in names]
    if unknown:
        raise ValueError(f"this version knows no setting {', '.join(unknown)}")
    return kind(**{name: typed(v, hints[name], prefix + name) for name, v in value.items()})


def can_be_set(kind: Any) -> bool:
    """Whether a field of this type takes a text."""
    kind = plain_type(getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind)
    if typing.get_origin(kind) is tuple:
        return can_be_set(typing.get_args(kind)[0])
    return kind in (bool, int, float, str) or isinstance(kind, enum.EnumType)


def shown(value: Any) -> str:
    """A value as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(shown, value)) if value else "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value) if str(value).isprintable() else repr(value)
