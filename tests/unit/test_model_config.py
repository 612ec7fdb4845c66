"""config.json of anybody: every size has bounds, and what cannot be honoured is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.common.weights import load_params
from models.qwen3_vl import Qwen3VLConfig, TextConfig, VisionConfig
from models.qwen3_vl.config import ExpertsConfig
from models.qwen3_vl.model import Qwen3VLPolicy
from tests.support.tiny_models import SPARSE as CONFIG
from tests.support.tiny_models import SPARSE_TABLE as TABLE

SIZES = [
    (part, field.name)
    for part, kind in (
        ("", Qwen3VLConfig),
        ("text_config", TextConfig),
        ("text_config", ExpertsConfig),
        ("vision_config", VisionConfig),
    )
    for field in dataclasses.fields(kind)
    if field.type == "int"
]


def with_value(path: str, name: str, value) -> dict:
    raw = json.loads(json.dumps(CONFIG.to_dict()))
    (raw[path] if path else raw)[name] = value
    return raw


@pytest.mark.parametrize("value", [10**9 * 3, -1, 1.5, "8", True, [2, 3]], ids=str)
@pytest.mark.parametrize(("part", "name"), SIZES)
def test_every_size_has_bounds(part, name, value):
    with pytest.raises(ValueError, match=name):
        Qwen3VLConfig.from_dict(with_value(part, name, value))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "rms_norm_eps", float("nan")),
        ("text_config", "rms_norm_eps", "1e-6"),
        ("vision_config", "deepstack_visual_indexes", 7),
        ("vision_config", "deepstack_visual_indexes", ["1"]),
        ("text_config", "mlp_only_layers", [[0]]),
        ("text_config", "mlp_only_layers", [0] * 2000),
    ],
)
def test_other_numbers_are_numbers(part, name, value):
    with pytest.raises(ValueError, match=name):
        Qwen3VLConfig.from_dict(with_value(part, name, value))


def test_one_place_says_how_positions_rotate():
    """Two would contradict each other once somebody edits one."""
    text = CONFIG.to_dict()["text_config"]
    assert "rope_parameters" not in text and text["rope_scaling"]["rope_type"] == "default"


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    params = {
        n: jnp.asarray(generator.normal(size=spec.shape), jnp.float32) for n, spec in TABLE.items()
    }
    Qwen3VLPolicy(CONFIG).save_folder(params, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(folder, value):
    """Wherever they stand: three tensors drawn from all, one of them of a middle layer."""
    path = folder / "model.safetensors"
    whole = load_file(path)
    for name in (*sorted(whole)[::40], "model.language_model.layers.1.mlp.down_proj.weight"):
        spoilt = whole[name].copy()
        spoilt.reshape(-1)[-1] = value
        save_file({**whole, name: spoilt}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"tensor {name} holds 1 values"):
            load_params(folder, Qwen3VLPolicy(CONFIG).table)


def test_a_value_beyond_the_type_that_is_loaded_is_named(folder):
    path = folder / "model.safetensors"
    whole = load_file(path)
    name = "model.language_model.norm.weight"
    save_file({**whole, name: whole[name] + 3.4e38}, path, metadata={"format": "pt"})
    load_params(folder, TABLE)
    with pytest.raises(ValueError, match=f"{name} .*bfloat16"):
        load_params(folder, TABLE, dtype="bfloat16")


@pytest.mark.parametrize("end", ["qweight", "qzeros", "weight_scale_inv"])
def test_quantised_weights_are_refused_with_a_remedy(folder, end):
    path = folder / "model.safetensors"
    name = f"model.language_model.layers.0.self_attn.q_proj.{end}"
    tensors = load_file(path) | {name: np.zeros((4, 4), np.int32)}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}.*the folder of the original weights"):
        load_params(folder, TABLE)


def test_an_export_over_a_base_of_transformers_5_says_it_once(folder, tmp_path):
    raw = json.loads((folder / "config.json").read_text())
    rope = raw["text_config"].pop("rope_scaling") | {"rope_theta": raw["text_config"]["rope_theta"]}
    raw["text_config"]["rope_parameters"] = rope
    (folder / "config.json").write_text(json.dumps(raw))
    Qwen3VLPolicy(CONFIG).save_folder(load_params(folder, TABLE), tmp_path / "again", base=folder)
    text = json.loads((tmp_path / "again" / "config.json").read_text())["text_config"]
    assert "rope_parameters" not in text and text["rope_theta"] == CONFIG.text.rope_theta
