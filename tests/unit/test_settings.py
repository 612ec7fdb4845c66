"""Sections of settings: what they refuse, how it is said, and functions of the user's own."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

import pytest

from paravt_jax.plugins import Own, load, reference
from paravt_jax.ranges import above, at_least, below, within
from paravt_jax.settings import OneOf, Refused, Settings, as_text, choices, hints_of, placed


@dataclasses.dataclass(frozen=True)
class Inner(Settings):
    share: Annotated[float, within(0, 1)] = 0.5
    sizes: Annotated[tuple[int, ...], at_least(1)] = (1, 2)
    limit: Annotated[float | None, above(0)] = None
    fit: Literal["first", "best"] | None = None
    kinds: tuple[Literal["a", "b"], ...] = ()
    found: Annotated[str, OneOf(lambda: ["x", "y"])] = "x"
    name: str = "a"

    def check_together(self) -> None:
        if self.share == 0.25:
            raise Refused(self, "{share} with {limit:name}: set {limit:=1} or {why}", why="{so}")


@dataclasses.dataclass(frozen=True)
class Outer(Settings):
    rate: Annotated[float, below(0, 1)] = 0.0
    inner: Inner = Inner()
    flag: bool = True

    def check_together(self) -> None:
        if not self.flag:
            raise Refused(self, "{flag} with {inner.share} and {inner.sizes}")


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (Outer, {"rate": 1.0}, "Outer.rate=1: must be at least 0 and below 1"),
        (Outer, {"rate": math.nan}, "Outer.rate=nan: must be a finite number"),
        (Inner, {"share": 2.0}, "Inner.share=2: must be between 0 and 1"),
        (Inner, {"sizes": (4, 0)}, "Inner.sizes=4,0: must be at least 1"),
        (Inner, {"sizes": (2**40,)}, "Inner.sizes=1099511627776: must be .* 32 bits"),
        (Inner, {"limit": 0.0}, "Inner.limit=0: must be above 0"),
        (Inner, {"fit": "worst"}, "Inner.fit=worst: choose first or best"),
        (Inner, {"kinds": ("a", "c")}, "Inner.kinds=a,c: choose a or b"),
        (Inner, {"found": "z"}, "Inner.found=z: choose x or y"),
        (Inner, {"name": " "}, "Inner.name is empty"),
        (Inner, {"share": 0.25}, "Inner.share=0.25 with Inner.limit: set Inner.limit=1 or {so}"),
        (Outer, {"flag": False}, "Outer.flag=false with Outer.inner.share=0.5 and .*sizes=1,2"),
    ],
)
def test_values_without_meaning_are_refused(kind, settings, said):
    with pytest.raises(Refused, match=f"^{said}"):
        kind(**settings)


def test_a_refusal_is_named_in_full_and_as_it_was_written():
    with pytest.raises(Refused) as refusal:
        Inner(share=0.25)
    full = refusal.value.within("inner.").within("outer.", {"outer.inner.share": "--share 25%"})
    assert str(full) == "--share 25% with outer.inner.limit: set outer.inner.limit=1 or {so}"
    with pytest.raises(Refused, match=r"^run\.rate=2: must be"), placed("run."):
        Outer(rate=2.0)


def test_choices_are_read_from_types():
    hints = hints_of(Inner)
    known = {name: choices(hints[name]) for name in hints}
    assert known["fit"] == ("first", "best") and known["kinds"] == ("a", "b")
    assert known["found"] == ("x", "y") and known["name"] == known["sizes"] == ()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (1e-5, "1e-05"),
        (None, "none"),
        (True, "true"),
        ((1, 2.5), "1,2.5"),
        ((), "none"),
    ],
)
def test_values_are_told_as_a_command_line_takes_them(value, text):
    assert as_text(value) == text


def double(x: float) -> float:
    """A function of the user's own."""
    return 2 * x


@dataclasses.dataclass(frozen=True)
class Plugged(Settings):
    loss: Literal["plain"] | Own | Callable[..., float] = "plain"
    reader: Own | Callable[..., float] | None = None
    tools: tuple[Literal["crop"] | Own | Callable[..., float], ...] = ("crop",)


def test_functions_of_the_users_own_are_kept_by_name():
    own = Plugged(loss=double, reader=double, tools=("crop", double))
    assert own.loss == own.reader == own.tools[1] == reference(double)
    assert all(isinstance(kept, Own) for kept in (own.loss, own.reader, own.tools[1]))
    assert load(own.loss) is double and own == Plugged(own.loss, own.reader, own.tools)
    assert dataclasses.asdict(Plugged()) == {"loss": "plain", "reader": None, "tools": ("crop",)}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "soft"}, "Plugged.loss=soft: choose plain, or a function of your own as path/to"),
        ({"loss": "no.py:f"}, "Plugged.loss=no.py: no such file"),
        ({"loss": lambda x: x}, "Plugged.loss=.* cannot be named in config.json"),
        ({"reader": "mine"}, "Plugged.reader=mine: choose a function of your own as path/to"),
        ({"tools": ("zoom",)}, "Plugged.tools=zoom: choose crop, or a function of your own"),
    ],
)
def test_what_is_no_function_of_the_users_own_is_refused(settings, said):
    with pytest.raises(Refused, match=f"^{said}"):
        Plugged(**settings)
