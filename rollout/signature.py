"""A Python function as a tool: the schema that the model reads, and its arguments from a call.

    def zoom_image(time: float, box: tuple[float, float, float, float], context: ToolContext):
        '''Enlarge a part of the frame at one moment.

        Args:
            time: Seconds from the start of the video.
            box: Left, top, right and bottom edge, as shares of width and height.
        '''

Types and defaults of the signature, the first line of the docstring and its `Args` make up the
schema. A parameter called `context` is ours to give and the model never hears of it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

CONTEXT = "context"
"""The parameter that gets the `ToolContext`."""

_LONGEST_QUOTE = 40


class WrongArguments(ValueError):
    """What is wrong with the arguments of a call, in words for the model."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Values of one type."""

    schema: dict[str, Any]
    words: str
    """What such a value is called: `a number`."""
    take: Callable[[Any], Any]
    """From a JSON value to what the function gets; raises ValueError for others."""


@dataclasses.dataclass(frozen=True)
class Signature:
    """What calls of a function look like."""

    name: str
    description: str
    parameters: Mapping[str, inspect.Parameter]
    kinds: Mapping[str, _Kind]
    words: Mapping[str, str]
    """What the docstring says of each parameter."""
    takes_context: bool

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Signature:
        """
        Raises:
            ValueError: something that a schema cannot say, or that the docstring does not.
        """
        name, parameters = function.__name__, dict(inspect.signature(function).parameters)
        takes_context = parameters.pop(CONTEXT, None) is not None
        hints = typing.get_type_hints(function)
        first, words = _docstring(inspect.getdoc(function) or "")
        if not first:
            raise ValueError(f"tool {name}: write a docstring; its first line is what models read")
        for key, parameter in parameters.items():
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise ValueError(f"tool {name}: {parameter} cannot be given by name; spell it out")
            if key not in hints or key not in words:
                raise ValueError(
                    f"tool {name}: parameter {key} needs a type and a line below `Args:` in "
                    "the docstring, which models read"
                )
        kinds = {key: _kind(hints[key], f"tool {name}: parameter {key}") for key in parameters}
        return cls(name, first, parameters, kinds, words, takes_context)

    @functools.cached_property
    def schema(self) -> dict[str, Any]:
        """In the form that chat templates take."""
        properties = {}
        for name, parameter in self.parameters.items():
            properties[name] = {**self.kinds[name].schema, "description": self.words[name]}
            if parameter.default is not parameter.empty:
                properties[name]["default"] = parameter.default
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": [name for name in self.parameters if self._required(name)],
            },
        }
        return {"type": "function", "function": function}

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call as the function takes them.

        Raises:
            WrongArguments: one is missing, unknown, or of another type.
        """
        for name in values:
            if name not in self.parameters:
                names = ", ".join(self.parameters)
                raise WrongArguments(f"no argument {_quoted(name)}; {self.name} takes: {names}")
        for name in self.parameters:
            if name not in values and self._required(name):
                raise WrongArguments(f'"{name}" is missing: it must be {self.kinds[name].words}')
        return {name: self._argument(name, value) for name, value in values.items()}

    def _required(self, name: str) -> bool:
        return self.parameters[name].default is inspect.Parameter.empty

    def _argument(self, name: str, value: Any) -> Any:
        try:
            return self.kinds[name].take(value)
        except (ValueError, OverflowError) as error:
            words = self.kinds[name].words
            raise WrongArguments(f'"{name}" must be {words}, not {_quoted(value)}') from error


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """First line, and what stands below `Args:` about each parameter (Google style)."""
    first, _, rest = text.partition("\n")
    lines = rest.partition("Args:\n")[2].splitlines()
    indented = list(itertools.takewhile(lambda line: line[:1].isspace(), lines))
    depth = min((len(line) - len(line.lstrip()) for line in indented), default=0)
    words, name = dict[str, str](), ""
    for line in indented:
        match = re.match(r"(\w+)(?: \([^)]*\))?: *(.*)", line[depth:])
        if match:
            name, line = match[1], match[2]
        if name:
            words[name] = f"{words.get(name, '')} {line.strip()}".strip()
    return first.strip(), {name: description for name, description in words.items() if description}


def _kind(hint: Any, where: str) -> _Kind:
    """Values of a type hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin is typing.Literal and all(isinstance(value, str) for value in inner):
        return _choice(inner)
    if origin in (typing.Union, types.UnionType) and len(inner) == 2 and type(None) in inner:
        (other,) = (part for part in inner if part is not type(None))
        return _or_null(_kind(other, where))
    if origin is list and inner:
        return _list(_kind(inner[0], where), list)
    if origin is tuple and inner and inner[1:] == (...,):
        return _list(_kind(inner[0], where), tuple)
    if origin is tuple and len(set(inner)) == 1:
        return _list(_kind(inner[0], where), tuple, len(inner))
    raise ValueError(
        f"{where} has the type {hint}: use str, int, float, bool, a Literal of texts, "
        "list[...] or tuple[...] of one of them, or any of these `| None`"
    )


def _exactly(kind: type) -> Callable[[Any], Any]:
    def take(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError
        return value

    return take


def _number(value: Any) -> float:
    # JSON's true is no number, though Python's True is 1.
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    if _number(value) != int(value):
        raise ValueError
    return int(value)


_SIMPLE: dict[Any, _Kind] = {
    str: _Kind({"type": "string"}, "a text", _exactly(str)),
    bool: _Kind({"type": "boolean"}, "true or false", _exactly(bool)),
    int: _Kind({"type": "integer"}, "a whole number", _whole),
    float: _Kind({"type": "number"}, "a number", _number),
}


def _choice(choices: tuple[str, ...]) -> _Kind:
    def take(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return _Kind({"type": "string", "enum": list(choices)}, f"one of {', '.join(choices)}", take)


def _or_null(kind: _Kind) -> _Kind:
    schema = {**kind.schema, "type": [kind.schema["type"], "null"]}
    if "enum" in schema:
        schema["enum"] = [*schema["enum"], None]
    return _Kind(
        schema, f"{kind.words} or null", lambda value: None if value is None else kind.take(value)
    )


def _list(item: _Kind, make: Callable[[Any], Any], count: int | None = None) -> _Kind:
    schema: dict[str, Any] = {"type": "array", "items": item.schema}
    words = f"a list, each {item.words}"
    if count is not None:
        schema |= {"minItems": count, "maxItems": count}
        words = f"a list of {count}, each {item.words}"

    def take(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != (len(value) if count is None else count):
            raise ValueError
        return make(map(item.take, value))

    return _Kind(schema, words, take)


def _quoted(value: Any) -> str:
    """What a model wrote, short and in ASCII: it may hold anything."""
    return ascii(value)[:_LONGEST_QUOTE]
