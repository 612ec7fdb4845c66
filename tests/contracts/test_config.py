"""Recipes are complete and valid; `--set` reaches every plain key and refuses the rest."""

import dataclasses
import importlib

import pytest

from train.optimizer import OptimizerSettings
from train.recipes import RECIPES, get_recipe, summaries
from train.rl.settings import RlSettings
from train.settings.override import based_on, override


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_knows_its_name(name):
    assert get_recipe(name).recipe == name


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_docstring_gives_a_command(name):
    module = importlib.import_module(f"train.recipes.{RECIPES[name]}")
    assert "train/main.py" in (getattr(module, name).__doc__ or "")
    assert 10 < len(summaries()[name]) < 100, "--help shows it"


def test_override_parses_by_type():
    config = override(
        get_recipe("needle_rl"),
        [
            "optimizer.learning_rate=1e-5",
            "data.frame_budgets=4,8,16",
            "model.remat=true",
            "agent.sampling.temperature=0.7",
            "mesh=none",
        ],
    )
    assert config.optimizer.learning_rate == 1e-5
    assert config.data.frame_budgets == (4, 8, 16)
    assert config.model.remat is True
    assert config.agent.sampling.temperature == 0.7
    assert config.mesh is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optimizer.lr=1", "learning_rate"),
        ("optimizer.learning_rate=fast", "expected float"),
        ("model.remat=maybe", "expected bool"),
        ("optimizer=adam", "section"),
        ("steps", "key=value"),
        ("steps.more=1", "no keys"),
        ("data.frames_as=gif", "image or video"),
        ("model.cache_dtype=int4", "compute or int8"),
        ("rl.group_size=1", "at least 2"),
        ("rl.micro_groups=3", "divisor"),
        ("model.train_vision=true", "stage=rl"),
        ("sft.phases=1", "recipe only"),
    ],
)
def test_override_refuses(text, named):
    with pytest.raises(ValueError, match=named):
        override(get_recipe("needle_rl"), [text])


def test_a_recipe_says_what_differs_from_another():
    base, faster = get_recipe("needle_rl"), OptimizerSettings(learning_rate=1.0)
    config = based_on(
        base,
        {
            "steps": 3,
            "optimizer.b2": 0.5,
            "optimizer": faster,
            "data.frame_budgets": [4],
            "objective.kl_weight": 1,
        },
    )
    assert config.steps == 3 and config.data.frame_budgets == (4,)
    assert config.optimizer == dataclasses.replace(faster, b2=0.5)
    assert type(config.objective.kl_weight) is float
    assert (config.agent, config.rl) == (base.agent, base.rl)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("optimizer.lr", 1.0, "optimizer.lr: no such key; known here: .*learning_rate"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate='fast' is no float"),
        ("optimizer", 1.0, "optimizer is a section"),
        ("optimizer", RlSettings(), "optimizer is a section"),
        ("optimizer.learning_rate", -1.0, "optimizer.learning_rate=-1"),
        ("steps.more", 1, "steps has no keys"),
    ],
)
def test_what_differs_is_checked(name, value, named):
    with pytest.raises(ValueError, match=named):
        based_on(get_recipe("needle_rl"), {name: value})
