"""Every number that a user can set is refused where it has no meaning, under its full name."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import pytest

from paravt_jax.ranges import above, at_least, below, check_ranges, within
from train.recipes import get_recipe
from train.settings.override import override


def numbers(section: Any, prefix: str = "") -> Iterator[str]:
    """Full names of the numeric settings."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif any(kind in str(hints[field.name]) for kind in ("int", "float")):
            yield prefix + field.name


def text_of(setting: str, value: str) -> str:
    """As many numbers as the setting holds."""
    return ",".join([value] * (2 if setting == "rewards.iou_scale" else 1))


RECIPES = {name: get_recipe(name) for name in ("needle_rl", "paravt_sft")}
SETTINGS = [(recipe, name) for recipe, config in RECIPES.items() for name in numbers(config)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e400"])
@pytest.mark.parametrize(("recipe", "setting"), SETTINGS)
def test_no_number_without_meaning(recipe, setting, value):
    with pytest.raises(ValueError) as refusal:
        override(RECIPES[recipe], [f"{setting}={text_of(setting, value)}"])
    section = setting.rpartition(".")[0]
    assert section in str(refusal.value)


@pytest.mark.parametrize(
    "assignment",
    [
        "optimizer.learning_rate=0",
        "optimizer.clip_norm=0",
        "optimizer.clip_norm=-1",
        "optimizer.b1=1",
        "optimizer.b2=2",
        "optimizer.eps=0",
        "optimizer.weight_decay=-1",
        "optimizer.warmup_steps=-1",
        "optimizer.final_fraction=1.5",
        "data.crop_fps=-1",
        "data.crop_fps=0",
        "data.min_pixels=0",
        "data.train_videos=0",
        "evaluation.frame_budget=0",
        "output.checkpoint_every=-1",
        "advantages.reward_scale=0",
        "agent.sampling.temperature=-1",
        "agent.subagent_sampling.temperature=-1",
        "agent.subagent_sampling.top_p=0",
        "rewards.judge.retries=-1",
    ],
)
def test_refusals_name_the_setting_in_full(assignment):
    name = assignment.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        override(get_recipe("needle_rl"), [assignment])


@dataclasses.dataclass(frozen=True)
class Inner:
    share: Annotated[float, within(0, 1)] = 0.5
    sizes: Annotated[tuple[int, ...], at_least(1)] = (1, 2)
    limit: Annotated[float | None, above(0)] = None


@dataclasses.dataclass(frozen=True)
class Outer:
    rate: Annotated[float, below(0, 1)] = 0.0
    inner: Inner = Inner()
    flag: bool = True


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Outer(rate=1.0), "rate=1.0: must be at least 0 and below 1"),
        (Outer(inner=Inner(share=2.0)), "inner.share=2.0: must be between 0 and 1"),
        (Outer(inner=Inner(sizes=(4, 0))), "inner.sizes=4,0: must be at least 1"),
        (Outer(inner=Inner(sizes=(2**40,))), "32 bits"),
        (Outer(inner=Inner(limit=0.0)), "inner.limit=0.0: must be above 0"),
    ],
)
def test_ranges_by_hand(settings, said):
    check_ranges(Outer())
    with pytest.raises(ValueError, match=said):
        check_ranges(settings)
