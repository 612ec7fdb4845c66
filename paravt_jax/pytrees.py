"""What records of arrays share: their type on the host or a device, and how they become pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

T = TypeVar("T")

if TYPE_CHECKING:
    ArrayLike = Any
else:
    ArrayLike = jax.Array | np.ndarray
"""A batch is made with numpy on the host and moves to the device as a whole. Type checkers
see `Any`: both kinds, and shapes that stand for them ahead of time, take the same operations."""


def pytree(cls: type[T]) -> type[T]:
    """Register a dataclass of arrays as a pytree.

    Transformations put shapes, shardings or stacked arrays in the place of leaves. Unlike jax's
    own registration this does not run `__init__` then, whose shapes pytest checks.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    def flatten(value: T) -> tuple[list[tuple[Any, Any]], None]:
        return [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in names], None

    def unflatten(_: None, leaves: Iterable[Any]) -> T:
        value = object.__new__(cls)
        for name, leaf in zip(names, leaves, strict=True):
            object.__setattr__(value, name, leaf)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls
