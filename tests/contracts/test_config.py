"""Recipes are complete and valid; `--set` reaches every plain key and refuses the rest."""

import pytest

from train.config import override
from train.recipes import RECIPES, get_recipe, recipe_function, summaries


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_and_knows_its_name(name):
    assert get_recipe(name).recipe == name


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_docstring_gives_a_command(name):
    assert "train/main.py" in (recipe_function(name).__doc__ or "")
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
        ("data.frames_as=gif", "image, video"),
        ("model.cache_dtype=int4", "compute, int8"),
        ("rl.group_size=1", "2 or more"),
        ("rl.micro_groups=3", "divisor"),
        ("model.train_vision=true", "rl stage"),
        ("sft.phases=1", "recipe only"),
    ],
)
def test_override_refuses(text, named):
    with pytest.raises(ValueError, match=named):
        override(get_recipe("needle_rl"), [text])
