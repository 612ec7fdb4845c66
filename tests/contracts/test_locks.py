"""What the suite holds every room to, without any test asking for it."""

import importlib

import pytest

ONE_ARGUMENT = (
    "paravt_jax.surrogates:safe_exp",
    "models.common.layers:unstack_layers",
    "pipelines.images:read_image",
    "rollout.engine.automaton:has_stopped",
    "train.step:vision_groups",
    "evaluate.tables:as_metrics",
)


@pytest.mark.parametrize("name", ONE_ARGUMENT)
def test_types_and_shapes_of_every_room_are_checked(name):
    module, function = name.split(":")
    with pytest.raises(Exception, match=r"hint|Type-check"):
        getattr(importlib.import_module(module), function)(object())
