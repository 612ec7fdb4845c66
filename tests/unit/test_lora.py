"""LoRA: adapters alone train, on any mesh; a merge and a resume change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.adapter import check_adapter_config, load_adapter, save_adapter
from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from paravt_jax.array_store import boxes
from paravt_jax.checkpoint import open_params, save_params
from paravt_jax.lora import TARGETS, LoraConfig, Merged, adapter_table, is_adapter
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from tests.support.tiny_models import NEEDLE_MODEL
from tests.support.train_steps import random_batch, run_steps
from train.batch import to_mesh
from train.config import OptimizerSettings
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.settings.override import override
from train.state import make_state, trainable_names
from train.step import SftStep
from train.workdir.checkpoints import Checkpoints

LORA = LoraConfig(rank=4, alpha=8, targets=("q_proj", "o_proj", "up_proj"))
POLICY = Qwen3VLPolicy(Qwen3VLConfig.from_dict(NEEDLE_MODEL), lora=LORA)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": -1}, "rank=-1"),
        ({"rank": 4, "alpha": 0}, "alpha=0"),
        ({"rank": 4, "targets": ()}, "targets=none: name each"),
        ({"rank": 4, "targets": ("q_proj", "q_proj")}, "once"),
    ],
)
def test_bad_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        LoraConfig(**settings)


def test_settings_are_given_in_any_order():
    """Neither alone would pass: alpha without a rank has no effect."""
    lora = ["model.lora.alpha=8", "model.lora.targets=q_proj,o_proj,up_proj", "model.lora.rank=4"]
    assert override(get_recipe("needle_rl"), lora).model.lora == LORA
    for refused in (["model.lora.alpha=8"], [*lora, "model.lora.rank=0"]):
        with pytest.raises(ValueError, match="no effect"):
            override(get_recipe("needle_rl"), refused)


@pytest.mark.parametrize(
    ("recipe", "settings", "named"),
    [
        ("needle_sft", ["model.lora.rank=4"], "model.train_vision=true has no effect"),
        ("needle_rl", ["model.adapter=folder"], "model.adapter=folder has no effect"),
        ("needle_rl", ["model.lora=8"], "section; set one of its keys: rank, alpha, targets"),
    ],
)
def test_settings_that_contradict_are_refused(recipe, settings, named):
    with pytest.raises(ValueError, match=named):
        override(get_recipe(recipe), settings)


def test_adapters_stand_beside_their_kernels_alone():
    base, table = POLICY.without_lora.table, POLICY.table
    added = {name for name in table if name not in base}
    assert added == {name for name in table if is_adapter(name)}
    modules = ("attention.query", "attention.out", "mlp.up")
    assert added == {f"text.layers.{m}.lora.{part}" for m in modules for part in "ab"}
    assert {name: table[name] for name in base} == base
    everywhere = Qwen3VLPolicy(POLICY.config, lora=LoraConfig(rank=2))
    assert len(everywhere.table) == len(base) + 2 * len(TARGETS)


def test_a_merged_kernel_is_the_sum_in_float32():
    rng = np.random.default_rng(0)
    kernel, a, b = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 6, 5), (2, 6, 3), (2, 3, 5))
    )
    params = {
        "x.kernel": jnp.asarray(kernel, jnp.bfloat16),
        "x.lora.a": jnp.asarray(a),
        "x.lora.b": jnp.asarray(b),
        "y.kernel": jnp.ones(3),
    }
    merged = Merged(params, LoraConfig(rank=3, alpha=6))
    assert set(merged) == {"x.kernel", "y.kernel"} and len(merged) == 2
    assert merged["y.kernel"] is params["y.kernel"]
    exact = np.asarray(params["x.kernel"], np.float32) + 2 * a @ b
    np.testing.assert_array_equal(merged["x.kernel"], jnp.asarray(exact, jnp.bfloat16))
    with pytest.raises(KeyError):
        merged["x.lora.a"]


def test_a_kernel_on_disk_is_merged_box_by_box(tmp_path):
    name = "text.layers.attention.query.kernel"
    table = {n: POLICY.table[n] for n in POLICY.table if ".attention.query." in n}
    params = moved(initialise(table, jax.random.key(0)))
    save_params(tmp_path, params)
    stored = POLICY.merge(open_params(tmp_path, table))[name]
    whole = np.asarray(POLICY.merge(params)[name])
    for box in boxes(whole.shape, (2, 50, 128)):
        np.testing.assert_allclose(stored[box], whole[box], atol=1e-7)
    assert stored.shape == whole.shape and stored.dtype == whole.dtype
    assert np.abs(whole - params[name]).max() > 0.1


def moved(params):
    """The parameters with adapters far from zero."""
    return {
        name: value + 0.3 * jax.random.normal(jax.random.key(i), value.shape)
        if is_adapter(name)
        else value
        for i, (name, value) in enumerate(params.items())
    }


def test_an_adapter_folder_is_read_as_it_was_written(tmp_path):
    adapters = moved(initialise(adapter_table(POLICY.table), jax.random.key(0)))
    for _ in range(2):  # the second replaces the first
        save_adapter(adapters, POLICY.table, LORA, tmp_path / "adapter")
    mesh = make_mesh(parse_mesh("fsdp:2,tensor:4", 8))
    loaded = load_adapter(tmp_path / "adapter", POLICY.table, LORA, mesh)
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    assert not loaded["text.layers.mlp.up.lora.a"].sharding.is_fully_replicated
    turned = dataclasses.replace(LORA, targets=LORA.targets[::-1])
    check_adapter_config(tmp_path / "adapter", turned, POLICY.table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    adapters = initialise(adapter_table(POLICY.table), jax.random.key(0))
    save_adapter(adapters, POLICY.table, LORA, tmp_path / "adapter")
    other = dataclasses.replace(LORA, rank=2)
    with pytest.raises(ValueError, match=r"model\.lora\.rank=2, but .* has 4"):
        load_adapter(tmp_path / "adapter", POLICY.table, other)
    fewer = {**NEEDLE_MODEL, "text_config": {**NEEDLE_MODEL["text_config"], "num_hidden_layers": 3}}
    table = Qwen3VLPolicy(Qwen3VLConfig.from_dict(fewer), lora=LORA).table
    with pytest.raises(ValueError, match=r"no adapter of this language model.*layers\.3\."):
        load_adapter(tmp_path / "adapter", table, LORA)
    with pytest.raises(ValueError, match="does not exist"):
        load_adapter(tmp_path / "nowhere", POLICY.table, LORA)
    (tmp_path / "adapter" / "precious").write_text("")
    with pytest.raises(ValueError, match="more than an adapter"):
        save_adapter(adapters, POLICY.table, LORA, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "precious").exists()


def test_targets_that_a_model_lacks_are_refused():
    """In a model of experts alone, no MLP is left to adapt."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = {**NEEDLE_MODEL["text_config"], **experts}
    raw = {**NEEDLE_MODEL, "model_type": "qwen3_vl_moe", "text_config": text}
    config = Qwen3VLConfig.from_dict(raw)
    with pytest.raises(ValueError, match="has no up_proj outside its experts"):
        Qwen3VLPolicy(config, lora=LORA).table  # noqa: B018
    fits = dataclasses.replace(LORA, targets=("q_proj",))
    assert "text.sparse_layers.attention.query.lora.a" in Qwen3VLPolicy(config, lora=fits).table


@pytest.fixture(scope="module")
def alone():
    """Figures and state after a few steps on one device."""
    return run_steps("data:1", 2, 3, policy=POLICY)


@pytest.mark.slow
def test_adapters_alone_train_and_have_moments(alone):
    fresh, state = initialise(POLICY.table, jax.random.key(0)), alone[1]
    moved = {n for n, value in state.params.items() if not np.array_equal(value, fresh[n])}
    assert moved == {name for name in POLICY.table if is_adapter(name)} == set(state.trainable)
    sizes = {leaf.size for leaf in jax.tree.leaves(state.optimizer)} - {1}
    assert sizes == {value.size for value in state.trainable.values()}


@pytest.mark.study
@pytest.mark.slow
def test_mesh_gives_the_one_device_trajectory(alone):
    spread, state = run_steps("data:2,fsdp:2,tensor:2", 2, 3, policy=POLICY)
    np.testing.assert_allclose(spread, alone[0], rtol=1e-4)
    a, b = (state.params[f"text.layers.attention.out.lora.{part}"] for part in "ab")
    assert a.sharding.shard_shape(a.shape) == (4, 64, 4), "heads over tensor"
    assert b.sharding.shard_shape(b.shape) == (4, 4, 64), "embed over fsdp"


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_never_cut(tmp_path):
    config = get_recipe("needle_rl")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=LORA))
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerSettings(learning_rate=1e-2), 2, POLICY.table)
    step = jax.jit(SftStep(POLICY, optimizer, micro_rows=8, budgets={"one": 24}))
    checkpoints = Checkpoints(tmp_path, keep=1, table=POLICY.table)
    with jax.set_mesh(mesh):
        params = initialise(POLICY.table, jax.random.key(0), mesh)
        state, _ = step(
            make_state(params, trainable_names(POLICY.table, config.model), mesh, optimizer),
            {"one": to_mesh(random_batch(0), mesh)},
        )
        checkpoints.save(1, state)
        resumed, number, _ = checkpoints.restore(state)
        second = {"one": to_mesh(random_batch(1), mesh)}
        (whole, metrics), (again, repeated) = step(state, second), step(resumed, second)
    assert number == 1 and metrics["loss"] == repeated["loss"]
    jax.tree.map(np.testing.assert_array_equal, again, whole)
    assert np.any(whole.params["text.layers.mlp.up.lora.b"])
