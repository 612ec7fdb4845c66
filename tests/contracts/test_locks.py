"""What the suite holds every room to, without any test asking for it."""

import importlib
import warnings

import jax.numpy as jnp
import pytest

ONE_ARGUMENT = (
    "paravt_jax.surrogates:safe_exp",
    "models.common.layers:unstack_layers",
    "pipelines.images:read_image",
    "rollout.engine.automaton:has_stopped",
    "train.step:vision_groups",
    "train.evaluation.tables:as_metrics",
)


@pytest.mark.parametrize("name", ONE_ARGUMENT)
def test_types_and_shapes_of_every_room_are_checked(name):
    module, function = name.split(":")
    with pytest.raises(Exception, match=r"hint|Type-check"):
        getattr(importlib.import_module(module), function)(object())


def test_no_type_is_promoted_in_silence():
    with pytest.raises(ValueError, match="dtype promotion"):
        jnp.ones(2) + jnp.ones(2, jnp.int32)


def test_no_rank_is_promoted_in_silence():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 2)) + jnp.ones(2)


def test_a_warning_is_an_error():
    with pytest.raises(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
