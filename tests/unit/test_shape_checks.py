"""Calls are checked under pytest: axes by jaxtyping, all else by beartype alone."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from jaxtyping import Float

from paravt_jax.shapes import bucket
from tests.support import shape_checks

if TYPE_CHECKING:
    from nowhere import Unknown

Array = np.ndarray


def checked(what: Any) -> Any:
    """As the import hook has it."""
    import beartype

    return shape_checks.checked(what, beartype.beartype)


@checked
@dataclasses.dataclass
class Pair:
    one: Float[Array, "n"]
    two: Float[Array, "n"]


@checked
@dataclasses.dataclass
class Plain:
    count: int


@checked
def added(one: "Float[Array, 'n']", others: "list[Float[Array, 'n']] | None" = None) -> int:
    return len(one) + len(others or ())


@checked
def told(count: int, what: "Unknown" = None, *rest: str, named: float = 1.0) -> str:
    return "text" if count else what


class Namer:
    @staticmethod
    @checked
    def twice(text: str) -> str:
        return 2 * text

    @property
    @checked
    def name(self) -> str:
        return 3  # pyright: ignore[reportReturnType]


LONG, SHORT = np.zeros(3), np.zeros(2)


def test_the_rooms_are_checked():
    with pytest.raises(Exception, match="hint"):
        bucket("three")


@pytest.mark.parametrize(
    "call",
    [
        lambda: Pair(LONG, SHORT),
        lambda: Plain("three"),
        lambda: added(LONG, [SHORT]),
        lambda: added(LONG, LONG),
        lambda: told("three"),
        lambda: told(1, None, 2),
        lambda: told(1, named="x"),
        lambda: told(0, 5),
        lambda: Namer.twice(2),
        lambda: Namer().name,
    ],
)
def test_what_does_not_fit_is_refused(call):
    with pytest.raises(Exception, match=r"hint|Type-check"):
        call()


def test_what_fits_passes():
    assert (Pair(LONG, LONG), Plain(3)) is not None
    assert added(LONG) == 3 and added(LONG, [LONG, LONG]) == 5
    assert told(1, object(), "more", named=2.0) == "text" and Namer.twice("a") == "aa"
