"""The parameter table: initialisation, sharding, Hugging Face layout."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy, TextConfig, VisionConfig
from paravt_jax.mesh import RULES, make_mesh, parse_mesh
from paravt_jax.params import (
    Blueprint,
    Constant,
    HfLayout,
    Normal,
    abstract_params,
    declare,
    format_table,
    initialise,
    stack,
)


class Layer(nnx.Module):
    def __init__(self):
        self.kernel = declare(
            (4, 6), ("embed", "mlp"), Normal(0.5), "layers.{}.up.weight", HfLayout((6, 4))
        )
        self.scale = declare((6,), ("norm",), Constant(1.0), "layers.{}.norm.weight")


class Model(nnx.Module):
    def __init__(self):
        self.layers = stack(Layer(), range(3))
        self.table = declare((5, 4), ("vocab", "embed"), Normal(0.02), "embed.weight")


BLUEPRINT = Blueprint(Model())


def test_table_is_gathered_from_the_modules():
    assert set(BLUEPRINT.table) == {"layers.kernel", "layers.scale", "table"}
    spec = BLUEPRINT.table["layers.kernel"]
    assert (spec.name, spec.shape, spec.axes) == (
        "layers.kernel", (3, 4, 6), ("layers", "embed", "mlp")
    )  # fmt: skip
    assert spec.hf_names == [f"layers.{i}.up.weight" for i in range(3)]
    assert spec.hf_shapes == [(6, 4)]
    assert BLUEPRINT.table["table"].hf_names == ["embed.weight"]


def test_bind_puts_each_array_in_its_place():
    params = {
        name: jnp.full(spec.shape, float(zlib.crc32(name.encode()) % 97))
        for name, spec in BLUEPRINT.table.items()
    }
    model = BLUEPRINT.bind(dict(reversed(params.items())))
    np.testing.assert_array_equal(model.layers.kernel[...], params["layers.kernel"])
    np.testing.assert_array_equal(model.layers.scale[...], params["layers.scale"])
    np.testing.assert_array_equal(model.table[...], params["table"])


def test_hugging_face_layout_round_trips():
    spec = BLUEPRINT.table["layers.kernel"]
    torch_weight = np.arange(24.0).reshape(6, 4)
    own = spec.from_hf(torch_weight)
    np.testing.assert_array_equal(own, torch_weight.T)
    np.testing.assert_array_equal(spec.to_hf(own), torch_weight)
    scale = BLUEPRINT.table["layers.scale"]
    np.testing.assert_array_equal(scale.from_hf(np.arange(6)), np.arange(6))
    layout = HfLayout((5, 3, 2, 2))
    patch = dataclasses.replace(spec, shape=(12, 5), hf_layouts=(layout,), layers=None)
    kernel = np.arange(60.0).reshape(5, 3, 2, 2)
    np.testing.assert_array_equal(patch.from_hf(kernel)[:, 1], kernel[1].ravel())
    np.testing.assert_array_equal(patch.to_hf(patch.from_hf(kernel)), kernel)


def test_every_known_layout_is_read_and_the_first_is_written():
    """Two experts of 3 inputs and 2 x 4 outputs, as both generations of transformers keep them."""
    own = np.arange(48.0).reshape(2, 3, 2, 4)
    released = HfLayout((2, 3, 8), swapped=False)
    transposed = HfLayout((2, 8, 3), batch=1)
    spec = BLUEPRINT.table["table"]
    spec = dataclasses.replace(spec, shape=own.shape, hf_layouts=(released, transposed))
    flat = own.reshape(2, 3, 8)
    np.testing.assert_array_equal(spec.from_hf(flat), own)
    np.testing.assert_array_equal(spec.from_hf(flat.swapaxes(1, 2)), own)
    np.testing.assert_array_equal(spec.to_hf(own), flat)
    np.testing.assert_array_equal(transposed.write(own), flat.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"embed\.weight.*\(3, 2, 8\)"):
        spec.from_hf(np.zeros((3, 2, 8)))


@pytest.mark.slow
def test_initial_values_depend_on_key_and_name_only():
    params = initialise(BLUEPRINT.table, jax.random.key(0))
    alone = initialise({"table": BLUEPRINT.table["table"]}, jax.random.key(0))
    np.testing.assert_array_equal(params["table"], alone["table"])
    other = initialise(BLUEPRINT.table, jax.random.key(1))
    assert np.abs(np.asarray(params["table"] - other["table"])).min() > 0
    assert np.std(params["layers.kernel"]) == pytest.approx(0.5, rel=0.3)
    np.testing.assert_array_equal(params["layers.scale"], np.ones((3, 6)))
    twin = dataclasses.replace(BLUEPRINT.table["table"], name="twin")
    assert (initialise({"twin": twin}, jax.random.key(0))["twin"] != params["table"]).all()


def test_initial_values_do_not_depend_on_the_mesh():
    mesh = make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8))
    plain = initialise(BLUEPRINT.table, jax.random.key(0))
    spread = initialise(BLUEPRINT.table, jax.random.key(0), mesh, "bfloat16")
    for name, value in spread.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, plain[name].astype(jnp.bfloat16))
    kernel = spread["layers.kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 2, 3)


def test_printed_table_counts_bytes():
    mesh = make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8))
    text = format_table(BLUEPRINT.table, mesh)
    row = next(line for line in text.splitlines() if line.startswith("layers.kernel"))
    assert "3x4x6" in row and "layers,embed,mlp" in row and f" {3 * 2 * 3 * 4} " in row
    total = 3 * 2 * 3 * 4 + 3 * 6 * 4 + 5 * 2 * 4
    assert text.endswith(f"{72 + 18 + 20} parameters, {total} bytes on each device")


QWEN_8B = Qwen3VLConfig(
    text=TextConfig(
        intermediate_size=12288, num_hidden_layers=36, num_key_value_heads=8, rope_theta=5e6
    ),
    vision=VisionConfig(out_hidden_size=4096),
)


def test_large_parameters_are_split():
    """Nothing above 64 KiB is replicated unless the rules of all its axes say so."""
    mesh = make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8))
    table = Qwen3VLPolicy(QWEN_8B).table
    assert sum(np.prod(spec.shape) for spec in table.values()) == 8_767_123_696
    for name, value in abstract_params(table, mesh).items():
        split_by_rule = any(axis is not None and RULES[axis] for axis in table[name].axes)
        if split_by_rule and value.size * 4 > 65536:
            assert not value.sharding.is_fully_replicated, name
        if name.endswith("kernel") or name in ("text.embedding", "vision.positions"):
            assert not value.sharding.is_fully_replicated, name


def test_hugging_face_names_are_unique():
    names = [name for spec in Qwen3VLPolicy(QWEN_8B).table.values() for name in spec.hf_names]
    assert len(names) == len(set(names)) == 750
