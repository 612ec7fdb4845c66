"""`--help-settings`: every setting, its type and default, and what it is for."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from paravt_jax.ranges import Range
from train.settings.override import RECIPE_ONLY, can_be_set, plain_type, shown


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the help says of one setting, or of a section."""

    name: str
    """Its whole dotted name."""
    title: str
    """`name=default`, and what else it can be."""
    text: str
    """What it is for."""


def help_settings(config: Any, prefix: str = "", width: int | None = None) -> str:
    """Every setting of a configuration, or those whose names begin with `prefix`.

    Args:
      config: a configuration, whose values are shown as defaults, or the class of one, of which
        the fields' defaults are.
      width: columns of a line; None takes the terminal's.

    Raises:
      ValueError: no setting begins so.
    """
    found = [entry for entry in entries(config) if entry.name.startswith(prefix)]
    if not found:
        sections = dict.fromkeys(entry.name.partition(".")[0] for entry in entries(config))
        raise ValueError(
            f"--help-settings {prefix}: no setting begins so; choose from {', '.join(sections)}"
        )
    width = max(width or shutil.get_terminal_size().columns, 40)
    return "\n\n".join(_wrapped(entry, width) for entry in found)


def entries(config: Any, prefix: str = "") -> Iterator[Entry]:
    """All settings of a configuration or a class, each section before its own."""
    kind = config if isinstance(config, type) else type(config)
    hints, texts = typing.get_type_hints(kind, include_extras=True), docstrings(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        value = _default(field) if config is kind else getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            text = texts.get(field.name) or inspect.getdoc(type(value)) or ""
            yield Entry(name, f"{name}.*", text)
            yield from entries(value, f"{name}.")
            continue
        known = "" if value is dataclasses.MISSING else f"={shown(value)}"
        only = field.metadata == RECIPE_ONLY or not can_be_set(hints[field.name])
        said = ["in a recipe only"] if only else _choices(hints[field.name])
        yield Entry(name, f"{name}{known} ({', '.join(said)})", texts.get(field.name, ""))


def docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, from its source: Python does not keep it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(body.body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _choices(hint: Any) -> list[str]:
    """What a setting can be, from the type that its field declares."""
    ranges = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range)]
    kind = hint.__origin__ if ranges else hint
    said = [_type(plain_type(kind)), *(limits.said.removeprefix("must be ") for limits in ranges)]
    return [*said, "or none"] if type(None) in typing.get_args(kind) else said


def _type(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(map(str, inner))
    if isinstance(kind, enum.EnumType):
        return " or ".join(map(str, kind))
    if kind is bool:
        return "true or false"
    if origin is tuple:
        return f"{_type(plain_type(inner[0]))},..."
    return {str: "text"}.get(kind, getattr(kind, "__name__", str(kind)))


def _wrapped(entry: Entry, width: int) -> str:
    own, indent = " ".join(entry.text.split()), " " * 4
    lines = textwrap.wrap(
        own, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    title = textwrap.wrap(
        entry.title, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join([*title, *lines])
