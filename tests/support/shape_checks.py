"""Shapes and types checked at every call, quickly.

jaxtyping's import hook wraps each function of the rooms in `jaxtyping.jaxtyped`, which binds
arguments to a signature and opens a scope of axis names at every call. Where no array is
annotated there are no axes, and beartype alone says the same ten times as fast: a quarter of the
suite's time went into those scopes.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

_with_axes = jaxtyping.jaxtyped
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
"""An int counts as a float, as in PEP 484."""


def install() -> None:
    """Have modules that are imported from now on checked quickly."""
    jaxtyping.jaxtyped = _jaxtyped  # pyright: ignore[reportAttributeAccessIssue]


def _jaxtyped(**_: Any) -> Callable:
    """What the import hook calls in the place of `jaxtyping.jaxtyped`."""
    return functools.partial(checked, typechecker=_check)


def checked(what: Any, typechecker: Callable) -> Any:
    """A function, descriptor or class of which calls are checked."""
    if isinstance(what, type):
        if dataclasses.is_dataclass(what) and "__init__" in vars(what):
            what.__init__ = checked(what.__init__, typechecker)
        return what
    if isinstance(what, classmethod | staticmethod):
        return type(what)(checked(what.__func__, typechecker))
    if not hasattr(what, "__code__") or hasattr(what, "__wrapped__"):
        return _with_axes(what, typechecker=typechecker)
    hints = {name: _resolved(hint, what) for name, hint in what.__annotations__.items()}
    if any(map(_has_axes, hints.values())):
        return _with_axes(what, typechecker=typechecker)
    what.__annotations__ = hints
    return typechecker(what)


def _resolved(hint: Any, function: Any) -> Any:
    """A hint that was written as a text; Any where its names are known to type checkers alone."""

    def holder() -> None: ...

    holder.__annotations__ = {"value": hint}
    try:
        return typing.get_type_hints(holder, function.__globals__, include_extras=True)["value"]
    except Exception:  # as jaxtyping has it: whatever evaluating a text raises
        return Any


_AXES = type(jaxtyping.AbstractArray), type(jaxtyping.PyTree)
"""Of what kind the types of arrays with named axes are."""


def _has_axes(hint: Any) -> bool:
    """Whether an array with named axes stands anywhere in a hint."""
    parts = hint if isinstance(hint, list | tuple) else typing.get_args(hint)
    return isinstance(hint, _AXES) or any(map(_has_axes, parts))
