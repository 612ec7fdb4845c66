"""Parts that are frozen, and parts with learning rates of their own."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.qwen3_vl.parts import part_of
from paravt_jax.lora import LoraConfig, is_adapter
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import abstract_params, initialise
from paravt_jax.parts import Part
from tests.support.tiny_models import QWEN, SPARSE_TABLE
from train import checks, setup
from train.compile.footprint import footprint, local_bytes, planned_mesh
from train.config import Config
from train.model import ModelSettings
from train.optimizer import OptimizerSettings, make_optimizer
from train.recipes import get_recipe
from train.settings.override import override
from train.state import make_state, trainable_names
from train.step import apply_gradients

MESH = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])


def test_every_weight_belongs_to_one_part():
    assert {spec.part for spec in SPARSE_TABLE.values()} | {"head"} == set(get_args(Part))
    assert part_of("head.kernel") == "head" and part_of("text.norm.scale") == "layers"
    assert part_of("text.sparse_layers.mlp.router.kernel") == "router"
    assert part_of("vision.deepstack.up.kernel") == part_of("vision.merger.up.bias") == "mergers"


@pytest.mark.slow
def test_what_is_frozen_has_neither_gradients_nor_moments():
    update = make_optimizer(OptimizerSettings(), 1, QWEN.table)
    model = ModelSettings(train_vision=True, frozen=("vision", "embedding"))
    trains = trainable_names(QWEN.table, model)
    assert {part_of(name) for name in trains} == {"mergers", "layers"}
    with jax.set_mesh(MESH):
        state = make_state(initialise(QWEN.table, jax.random.key(0), MESH), trains, MESH, update)
    assert set(state.trainable) == trains
    size = local_bytes({name: state.trainable[name] for name in trains})
    found = footprint(QWEN, update, model, MESH, pools={})
    assert found["gradients"] == found["reference"] == size
    assert 2 * size <= found["moments"] == local_bytes(state.optimizer) < 2 * size + 64


def steps(**settings) -> dict[str, jax.Array]:
    """By how much weights move in two steps."""
    update = make_optimizer(OptimizerSettings(learning_rate=1e-3, **settings), 2, QWEN.table)
    with jax.set_mesh(MESH):
        params = initialise(QWEN.table, jax.random.key(0), MESH)
        state = make_state(dict(params), set(params), MESH, update)
        slopes = {name: jnp.sin(100 * x) for name, x in params.items()}
        for _ in range(2):
            state = jax.jit(apply_gradients, static_argnums=0)(update, state, slopes)
        return {name: x - params[name] for name, x in state.trainable.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_group_learns_at_its_own_rate(name):
    """Its steps are shorter, those of others to the digit what they were."""
    plain = steps(name=name)
    grouped = steps(name=name, groups=("vision", "embedding"), rates=(0.1, 2.0))
    for key, moved in grouped.items():
        share = {"vision": 0.1, "embedding": 2.0}.get(part_of(key))
        if share is None:
            np.testing.assert_array_equal(moved, plain[key])
        else:
            # A step is the difference of weights that are near 1.
            np.testing.assert_allclose(moved, share * plain[key], rtol=0.01, atol=1e-6)


def test_with_adapters_the_reference_is_theirs_alone():
    """Policy and reference share the weights below them."""
    policy = dataclasses.replace(QWEN, lora=LoraConfig(rank=4))
    model = ModelSettings(lora=policy.lora)
    update = make_optimizer(OptimizerSettings(), 1, policy.table)
    own = {name: x for name, x in abstract_params(policy.table, MESH).items() if is_adapter(name)}
    assert footprint(policy, update, model, MESH, pools={})["reference"] == local_bytes(own)


def test_a_reference_on_the_host_takes_no_device_memory(monkeypatch):
    config = override(get_recipe("needle_rl"), ["rl.reference_memory=host"])
    parts, mesh = setup.Parts(config), planned_mesh("data:1")
    assert "reference" not in checks.planned_footprint(parts, mesh)
    checks.check_reference(config)
    monkeypatch.setattr(checks, "HOST", "memory_of_mars")
    with pytest.raises(ValueError, match=r"rl\.reference_memory=host: cpu has no memory .* device"):
        checks.check_reference(config)


def needle(*settings: str) -> Config:
    return override(get_recipe("needle_sft"), list(settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model.frozen=head", "no head of its own"),
        ("model.frozen=router", "no router"),
        ("model.frozen=vision,mergers,embedding,layers", "leaves nothing to train"),
    ],
)
def test_parts_that_are_not_there(settings, said):
    with pytest.raises(ValueError, match=rf"model\.frozen=.*{said}"):
        checks.check_model(needle(settings), here=True)
