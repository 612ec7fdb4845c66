"""Every number that a user can set is refused where it has no meaning, under its full name."""

import re

import pytest

from train.config import Config
from train.recipes import get_recipe
from train.settings.help import entries
from train.settings.override import override


def numbers(config: Config) -> list[str]:
    """Full names of the numeric settings."""
    return [own.name for own in entries(config) if re.search(r"\((int|float)", own.title)]


def text_of(setting: str, value: str) -> str:
    """As many numbers as the setting holds."""
    return ",".join([value] * (2 if setting == "rewards.iou_scale" else 1))


RECIPES = {name: get_recipe(name) for name in ("needle_rl", "paravt_sft")}
SETTINGS = [(recipe, name) for recipe, config in RECIPES.items() for name in numbers(config)]


@pytest.mark.parametrize(("recipe", "setting"), SETTINGS)
def test_no_number_without_meaning(recipe, setting):
    for value in ("nan", "inf", "-inf", "1e400"):
        with pytest.raises(ValueError) as refusal:
            override(RECIPES[recipe], [f"{setting}={text_of(setting, value)}"])
        assert setting in str(refusal.value), value


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
