"""`--help-settings`: every setting, its type and default, and what it is for."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from paravt_jax.ranges import ranges_of
from paravt_jax.settings import alternatives, as_text, describe_choices, hints_of, plain_type
from train.settings.effects import TABLE, of_rewards
from train.settings.override import RECIPE_ONLY, UNSET, can_be_set, default_of


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the help says of one setting, or of a section."""

    name: str
    """Its whole dotted name."""
    title: str
    """`name=default`, and what else it can be."""
    text: str
    """What it is for."""


def help_settings(config: Any, prefix: str = "") -> str:
    """Every setting of a configuration, or those whose names begin with `prefix`.

    Args:
      config: a configuration, whose values are shown as defaults, or the class of one, of which
        the fields' defaults are.

    Raises:
      ValueError: no setting begins so.
    """
    listed = [entry for entry in entries(config) if entry.name.startswith(prefix)]
    if not listed:
        sections = dict.fromkeys(entry.name.partition(".")[0] for entry in entries(config))
        raise ValueError(
            f"--help-settings {prefix}: no setting begins so; choose from {', '.join(sections)}"
        )
    width = max(shutil.get_terminal_size().columns, 40)
    return "\n\n".join(_wrapped(entry, width) for entry in listed)


def entries(config: Any, prefix: str = "") -> Iterator[Entry]:
    """All settings of a configuration or a class, each section before its own."""
    kind = config if isinstance(config, type) else type(config)
    hints, texts = hints_of(kind), docstrings(kind)
    for field in (field for field in dataclasses.fields(kind) if field.metadata != UNSET):
        name = prefix + field.name
        value = default_of(field) if config is kind else getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            text = texts.get(field.name) or inspect.getdoc(type(value)) or ""
            yield Entry(name, f"{name}.*", text)
            yield from entries(value, f"{name}.")
            continue
        default = "" if value is dataclasses.MISSING else f"={as_text(value)}"
        only = field.metadata == RECIPE_ONLY or not can_be_set(hints[field.name])
        choices = ["in a recipe only"] if only else _choices(hints[field.name])
        text = [texts.get(field.name, ""), *_effect(name)]
        yield Entry(name, f"{name}{default} ({', '.join(choices)})", "\n\n".join(text))


def docstrings(kind: type) -> dict[str, str]:
    """The text below each field of a dataclass, from its source: Python does not keep it."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, text in itertools.pairwise(body.body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            texts[field.target.id] = inspect.cleandoc(str(text.value.value))
    return texts


def _effect(name: str) -> list[str]:
    """With which other settings it acts, if not with all."""
    rows = [row for row in (*TABLE, *of_rewards()) if row.concerns(name) and row.condition]
    return [f"Acts with {' and '.join(row.condition for row in rows)} only."] if rows else []


def _choices(hint: Any) -> list[str]:
    """What a setting can be, from the type that its field declares."""
    listed = describe_choices(hint)
    words = [listed or _type(plain_type(hint)), *(limits.wording for limits in ranges_of(hint))]
    if typing.get_origin(plain_type(hint)) is tuple:
        words[0] = f"several of {listed}" if listed else f"{words[0]},..."
    return [*words, "or none"] if type(None) in alternatives(hint) else words


def _type(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return _type(plain_type(typing.get_args(kind)[0]))
    if kind is bool:
        return "true or false"
    return {str: "text"}.get(kind, getattr(kind, "__name__", str(kind)))


def _wrapped(entry: Entry, width: int) -> str:
    text, indent = " ".join(entry.text.split()), " " * 4
    lines = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    title = textwrap.wrap(
        entry.title, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join([*title, *lines])
