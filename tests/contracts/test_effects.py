"""What is set must act: every row of the table, and who counts as having set something."""

import dataclasses
import re
from typing import Any

import pytest

from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.rewards import Attempt, RewardRules, reward_terms
from paravt_jax.rewards.rules import READ_BY_ALL
from paravt_jax.settings import as_text
from train.config import Config
from train.recipes import RECIPES, get_recipe
from train.settings.effects import IF_GIVEN, TABLE, Only
from train.settings.override import based_on, leaves, override

ALL = {name: get_recipe(name) for name in RECIPES}
NAMES = dict(leaves(ALL["needle_rl"]))
"""Every setting that there is."""
OFF = (
    based_on(ALL["needle_visd"], {"teacher.full_weight": 1.0}),
    based_on(ALL["needle_rl"], {"output.compile_cache": None}),
    based_on(ALL["needle_rl"], {"output.rollouts": False}),
    based_on(ALL["needle_rl"], {"objective.correction.weights": "none"}),
    based_on(ALL["needle_rl"], {"objective.correction.proximal": "sampler"}),
)
"""Configurations that switch off what every recipe has."""
BUCKET = based_on(ALL["needle_rl"], {"data.path": "gs://bucket/set"})
"""One that has what no recipe has."""
ROWS = {f"{row.settings} by {row.when}": row for row in TABLE}


def concerned(row: Only) -> list[str]:
    return [name for name in NAMES if row.concerns(name)]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_table_names_settings_that_there_are(row):
    for name in row.settings.split():
        assert name in NAMES or (name.endswith(".") and concerned(row)), name
    assert any(map(row.acts, (*ALL.values(), BUCKET))) or row.when in NAMES


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_default_of_what_does_not_act_is_refused_if_it_is_given(row):
    if row.off is not IF_GIVEN:
        return
    asked = 0
    for config in (*ALL.values(), *OFF):
        for name in () if row.acts(config) else concerned(row):
            value = dict(leaves(config))[name]
            if value in (None, (), ""):
                continue
            with pytest.raises(ValueError, match=f"^{re.escape(name)}="):
                based_on(config, {name: value})
            asked += 1
    assert asked, "no recipe has these settings without effect"


ON = {
    "model.train_vision": True,
    "model.adapter": "folder",
    "model.router_balance": 0.1,
    "data.video_marks": "each",
    "data.weights": (1.0, 2.0),
    "optimizer.decay_steps": 9,
    "advantages.leave_one_out": True,
    "objective.surrogate": "soft",
    "objective.constant_length": 9,
    "objective.anchor_paired_only": True,
    "rl.subagent_credit": "full",
    "teacher.strength": 0.5,
    "difficulty.window": 9,
    "sft.task_masks": 0.5,
    "evaluation.rows": 4,
}
WHERE = {"advantages.leave_one_out": {"advantages.normalise": "none"}}


@pytest.mark.parametrize("name", ON)
def test_a_switch_that_is_on_must_act_whoever_set_it(name):
    concerning = [row for row in TABLE if row.concerns(name)]
    rows = [row for row in concerning if row.off is not IF_GIVEN]
    asked = 0
    for config in ALL.values():
        if not all(row.acts(config) for row in concerning if row.off is IF_GIVEN):
            continue  # of the other stage, where it may not be given at all
        config = based_on(config, WHERE.get(name, {}))
        if all(row.acts(config) for row in rows):
            continue
        for given in ((name,), ()):
            with pytest.raises(ValueError, match=f"{re.escape(name)}=.* has no effect"):
                replaced(config, {name: ON[name]}, given)
        off = "clip" if callable(rows[0].off) else rows[0].off
        assert based_on(config, {name: off}) == replaced(config, {name: off})
        asked += 1
    assert asked


def replaced(config: Config, changes: dict[str, Any], given: tuple[str, ...] = ()) -> Config:
    """The configuration with other settings of sections, of which some are said to be given."""
    sections = {}
    for name, value in changes.items():
        section, _, field = name.partition(".")
        sections[section] = dataclasses.replace(getattr(config, section), **{field: value})
    return dataclasses.replace(config, **sections, given=given)


@pytest.mark.parametrize(
    ("recipe", "settings", "said"),
    [
        ("needle_rl", ["rl.filter_redraws=3"],
         "with rl.filter_groups=none; leave it out, or set rl.filter_groups too"),
        ("needle_rl", ["model.lora.alpha=32"], "with model.lora.rank=0; leave it out"),
        ("needle_rl", ["rl.epochs=2", "objective.surrogate=soft", "objective.clip_low=0.1"],
         "with objective.surrogate=soft; leave it out, or set objective.surrogate=clip"),
        ("needle_rl", ["objective.regression_detached=true"], "set objective.surrogate=regression"),
        ("needle_rl", ["objective.clip_high=0.20"], "set rl.epochs or rl.minibatches"),
        ("needle_rl", ["objective.constant_length=64"], "set objective.aggregation=constant"),
        ("needle_rl", ["advantages.kl_estimator=k1"], "with advantages.kl_weight=0"),
        ("needle_rl", ["rewards.window_term=iou"], "set rewards.scheme=longvt"),
        ("needle_rl", ["rewards.grounded=false"], "rewards.scheme to deepvideo_r1, visd or vital"),
        ("needle_vital", ["rewards.mode=f1"], "rewards.scheme to longvt, paravt or video_o3"),
        ("needle_longvt", ["rewards.anchor_weight=0"], "set rewards.scheme=paravt"),
        ("needle_sft", ["optimizer.decay=constant", "optimizer.final_fraction=0"],
         "with optimizer.decay=constant; leave it out, or set optimizer.decay=cosine"),
        ("needle_visd", ["teacher.judge.model=m"], "with teacher.judge.url=;"),
        ("needle_visd", ["teacher.full_weight=1", "teacher.support=16"], "teacher.full_weight=1"),
        ("needle_video_o3_sft", ["sft.task_masks=0", "sft.mask_predictor=true"],
         "with sft.task_masks=0"),
    ],
)  # fmt: skip
def test_what_is_said(recipe, settings, said):
    with pytest.raises(ValueError) as refusal:
        override(ALL[recipe], settings)
    assert str(refusal.value).startswith(f"{settings[-1]} has no effect ")
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        ("needle_sft", "optimizer.decay=constant"),
        ("needle_video_o3", "rl.minibatches=1"),
        ("needle_video_o3", "rl.filter_groups=none"),
        ("needle_visd", "teacher.strength=0"),
        ("needle_deepvideo_r1", "difficulty.window=0"),
        ("needle_grpo", "rewards.scheme=longvt"),
    ],
)
def test_what_a_recipe_set_may_lose_its_effect(recipe, setting):
    """By the command line, and by a recipe that is based on it."""
    config = override(ALL[recipe], [setting])
    name, _, value = setting.partition("=")
    assert as_text(dict(leaves(config))[name]) == value
    again = based_on(based_on(ALL[recipe], {name: dict(leaves(config))[name]}), {"seed": 3})
    assert dataclasses.replace(again, seed=config.seed) == config


def test_by_hand_what_differs_from_the_defaults_is_given():
    by_hand = dataclasses.replace(ALL["paravt_rl"], given=None)
    with pytest.raises(ValueError, match=r"^objective\.soft_positive=2 has no effect with"):
        dataclasses.replace(by_hand, objective=ObjectiveConfig(soft_positive=2.0))
    with pytest.raises(ValueError, match=r"^rewards\.iou_scale=0,1 has no effect with"):
        dataclasses.replace(by_hand, rewards=RewardRules(iou_scale=(0.0, 1.0)))


def test_a_whole_section_gives_what_is_new_in_it():
    adopted = based_on(ALL["needle_rl"], {"optimizer": ALL["needle_sft"].optimizer})
    assert adopted.optimizer.decay == "cosine"
    flat = dataclasses.replace(ALL["needle_sft"].optimizer, decay="constant")
    with pytest.raises(ValueError, match=r"^optimizer\.final_fraction=0\.05 has no effect"):
        based_on(ALL["needle_rl"], {"optimizer": flat})


@reward_terms(accuracy=(0, 1))
def plain(attempt: Attempt) -> dict[str, float]:
    """A reward of the user's own."""
    return {"accuracy": attempt.accuracy()}


def test_rewards_of_ones_own_say_what_they_read():
    base = based_on(ALL["needle_grpo"], {"rewards.scheme": plain, "rewards.mode": "exact"})
    read = {*READ_BY_ALL, *base.rewards.definition.reads}
    for field in dataclasses.fields(RewardRules):
        if field.name not in read:
            with pytest.raises(ValueError, match=rf"^rewards\.{field.name}=.*has no effect"):
                based_on(base, {f"rewards.{field.name}": getattr(base.rewards, field.name)})
