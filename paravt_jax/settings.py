"""Sections of settings: frozen dataclasses that refuse values without a meaning when they are made.

What a setting takes stands in its type, where pyright, command lines and refusals read it:

    @dataclasses.dataclass(frozen=True)
    class Packing(Settings):
        rows: Annotated[int, at_least(1)] = 32
        fit: Literal["first", "best"] = "first"
        micro_rows: int = 8

        def check_together(self) -> None:
            if self.rows % self.micro_rows:
                raise Refused(self, "{micro_rows} does not divide {rows}; choose a divisor")

Choices that a function of the user's own may replace are `Literal["clip", "soft"] | Own | Loss`,
with the type of the function: it is kept as its name (`paravt_jax.plugins`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

from paravt_jax.flags import EMPTY
from paravt_jax.marks import Mark
from paravt_jax.plugins import Own, named
from paravt_jax.ranges import fault


class Settings:
    """Base of a section. A subclass is a frozen dataclass."""

    place: ClassVar[str | None] = None
    """What stands before the names of its fields; None where only those who hold it know."""

    def __post_init__(self) -> None:
        """Raises Refused for a value without a meaning."""
        _name_own(self)
        _check_values(self)
        self.check_together()

    def check_together(self) -> None:
        """Refuse values that do not fit one another.

        Raises:
            Refused: naming them.
        """


class Refused(ValueError):
    """A setting is refused, under the name and with the value that its user wrote.

    In the message, `{rate}` stands for name and value, `{rate:name}` for the name alone, and
    `{rate:=0.1}` for what to set instead; `{judge.url}` for a setting of a section further down.
    A section does not know where it stands: its names begin with the class, until `within` says.
    """

    def __init__(self, section: Any, message: str, **values: Any) -> None:
        """`values` are named in the message, too, and are no settings."""
        super().__init__()
        self.section, self.message, self.values = section, message, values
        self.place = ""
        place = getattr(section, "place", None)
        self._show(f"{type(section).__name__}." if place is None else place, {})

    def within(self, prefix: str, written: Mapping[str, str] | None = None) -> Refused:
        """The same, from further up.

        Args:
            prefix: what stands there before the names of the section's fields, e.g. `optimizer.`.
            written: what a user wrote, by the settings' full names: `steps` may be `--steps 0`.
        """
        placed = Refused(self.section, self.message, **self.values)
        placed.place = prefix + self.place
        placed._show(placed.place, written or {})
        return placed

    def _show(self, prefix: str, written: Mapping[str, str]) -> None:
        names = [field.name for field in dataclasses.fields(self.section)]
        shown = {name: _Shown(self.section, name, prefix, written) for name in names}
        self.args = (self.message.format(**{**shown, **self.values}),)


@contextlib.contextmanager
def placed(prefix: str) -> Iterator[None]:
    """What is refused in here stands below `prefix`, e.g. `rewards.judge.`."""
    try:
        yield
    except Refused as error:
        raise error.within(prefix) from error


class _Shown:
    """A setting in a message."""

    def __init__(self, section: Any, name: str, prefix: str, written: Mapping[str, str]) -> None:
        self._value, self._name = getattr(section, name), prefix + name
        self._written = written

    # `str.format` looks up what follows a dot in `{judge.url}` as an attribute.
    def __getattr__(self, name: str) -> _Shown:
        return _Shown(self._value, name, f"{self._name}.", self._written)

    def __format__(self, spec: str) -> str:
        text = self._written.get(self._name, f"{self._name}={as_text(self._value)}")
        if not spec:
            return text
        name = text.partition("=")[0].partition(" ")[0]
        return name if spec == "name" else name + spec


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Choices that are looked up where they are needed, as an annotation of a text."""

    names: Callable[[], Iterable[str]]


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a type lists; empty if it lists none."""
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, OneOf):
            return tuple(note.names())
    kind = plain_type(hint)
    if typing.get_origin(kind) is tuple:
        return choices(typing.get_args(kind)[0])
    if isinstance(kind, enum.EnumType):
        return tuple(kind)
    return typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()


def plain_type(hint: Any) -> Any:
    """The type of a setting without annotations, and without what else it may be, such as None."""
    if hasattr(hint, "__metadata__"):
        return plain_type(hint.__origin__)
    return plain_type(alternatives(hint)[0]) if len(alternatives(hint)) > 1 else hint


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of any other type, itself."""
    hint = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def takes_own(hint: Any) -> bool:
    """Whether a function of the user's own may stand here, or among others here."""
    kind = plain_type(hint)
    if typing.get_origin(kind) is tuple:
        return takes_own(typing.get_args(kind)[0])
    return Own in alternatives(hint)


def any_of(names: Iterable[Any]) -> str:
    """`a, b or c`."""
    *others, last = map(str, names)
    return f"{', '.join(others)} or {last}" if others else last


def as_text(value: Any) -> str:
    """A value as a command line takes it."""
    if isinstance(value, tuple):
        return ",".join(map(as_text, value)) if value else "none"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return str(value) if str(value).isprintable() else repr(value)


def marks_of(hint: Any) -> set[Mark]:
    """The marks in a type's annotation."""
    return {note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Mark)}


def marked(kind: type, name: str, *marks: Mark) -> bool:
    """Whether the setting of this dotted name, or a section that it stands in, has one of them.

    Args:
        kind: the section in which the name begins. A name that it does not know has no marks.
    """
    first, _, rest = name.partition(".")
    hint = hints_of(kind).get(first)
    if marks_of(hint) & set(marks):
        return True
    inner = plain_type(hint)
    is_section = isinstance(inner, type) and dataclasses.is_dataclass(inner)
    return bool(rest) and is_section and marked(inner, rest, *marks)


def is_empty(text: str, hint: Any) -> bool:
    """Whether a text says nothing, as the value of a setting of this type."""
    marks = marks_of(hint)
    if Mark.MAY_BE_EMPTY in marks or "" in choices(hint):
        return False
    return not (text if Mark.MAY_BE_BLANK in marks else text.strip())


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The types of a section's fields, with their annotations."""
    return typing.get_type_hints(kind, include_extras=True)


def _name_own(section: Any) -> None:
    """Functions of the user's own are kept as names, so that they can be compared, written to
    config.json and found again."""
    for name, hint in hints_of(type(section)).items():
        if not takes_own(hint):
            continue
        value = getattr(section, name)
        if value is None:
            continue
        many = isinstance(value, tuple)
        try:
            names = tuple(named(part, "") for part in (value if many else (value,)))
        except ValueError as error:
            raise Refused(section, f"{{{name}:name}}{{why}}", why=error) from error
        object.__setattr__(section, name, names if many else names[0])


def _check_values(section: Any) -> None:
    """Refuse numbers out of range, unknown choices and empty texts."""
    hints = hints_of(type(section))
    for field in dataclasses.fields(section):
        name, hint, value = field.name, hints[field.name], getattr(section, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        if limits := fault(value, hint):
            raise Refused(section, f"{{{name}}}: must be {limits}")
        if not all(_is_choice(part, hint) for part in parts):
            raise Refused(section, f"{{{name}}}: choose {{known}}", known=describe_choices(hint))
        empty = any(isinstance(part, str) and is_empty(part, hint) for part in parts)
        if empty and value != field.default:
            raise Refused(section, f"{{{name}:name}} {EMPTY}")


def _is_choice(value: Any, hint: Any) -> bool:
    listed = bool(choices(hint)) or takes_own(hint)
    return not listed or value is None or isinstance(value, Own) or value in choices(hint)


def describe_choices(hint: Any) -> str:
    """What a setting takes, for a sentence; empty where its type lists nothing."""
    listed = [choice for choice in choices(hint) if choice != ""]
    names = any_of(listed) if listed else ""
    function = "a function of your own as path/to/file.py:name" if takes_own(hint) else ""
    return f"{names}, or {function}" if names and function else names or function
