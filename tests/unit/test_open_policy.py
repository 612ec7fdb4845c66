"""`models.open_policy` chooses the family of a model by its config.json."""

import json
import sys
import types

import jax.numpy as jnp
import pytest
from flax import nnx

import models
from models import ModelPolicy, open_policy
from models.common.attention import Attending
from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from models.qwen3_vl.text import Attention
from models.qwen3_vl.vision import VisionAttention
from paravt_jax.lora import LoraConfig
from tests.support.tiny_models import NEEDLE_MODEL


def test_a_folder_and_its_config_json_open_the_same_policy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NEEDLE_MODEL))
    expected = Qwen3VLPolicy(Qwen3VLConfig.from_dict(NEEDLE_MODEL))
    assert open_policy(tmp_path) == open_policy(NEEDLE_MODEL) == expected


def test_settings_reach_the_policy():
    lora = LoraConfig(rank=4)
    policy: ModelPolicy = open_policy(
        NEEDLE_MODEL,
        compute_dtype="bfloat16",
        remat=True,
        lora=lora,
        cache_dtype="int8",
        gradient_dtype="float32",
        remat_keeps="products",
        remat_block=2,
        attention="reference",
    )
    config = Qwen3VLConfig.from_dict(NEEDLE_MODEL)
    given = "bfloat16", True, lora, "int8", "float32", "products", 2, "reference"
    assert policy == Qwen3VLPolicy(config, *given)
    text, vision = NEEDLE_MODEL["text_config"], NEEDLE_MODEL["vision_config"]
    assert policy.vocab_size == text["vocab_size"]
    assert policy.context_length == text["max_position_embeddings"]
    assert policy.patch_sizes[0] == vision["patch_size"]
    assert policy.deepstack_levels == len(vision["deepstack_visual_indexes"])


def test_both_towers_attend_by_the_kernels_that_are_asked_for():
    policy = open_policy(NEEDLE_MODEL, attention="reference")
    assert isinstance(policy, Qwen3VLPolicy)
    params = {name: jnp.zeros(spec.shape) for name, spec in policy.table.items()}
    parts = [part for _, part in nnx.iter_graph(policy._bind(params))]
    attending = [part for part in parts if isinstance(part, Attending)]
    assert {type(part) for part in attending} == {Attention, VisionAttention}
    assert {part.kernels for part in attending} == {"reference"}


def test_another_family_is_another_package(monkeypatch):
    opened = []

    def open_other(config, **settings):
        opened.append((config["layers"], settings))
        return Qwen3VLPolicy(Qwen3VLConfig.from_dict(NEEDLE_MODEL))

    package = types.ModuleType("other_model")
    setattr(package, "open_policy", open_other)  # noqa: B010  a module has no such attribute
    monkeypatch.setitem(sys.modules, "other_model", package)
    monkeypatch.setitem(models.FAMILIES, "other", models.Family("other_model", "mine:Renderer"))
    open_policy({"model_type": "other", "layers": 7}, remat=True)
    assert opened == [(7, {"remat": True})]


@pytest.mark.parametrize("kind", ["llama", None])
def test_an_unknown_model_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=rf"model_type={kind!r}.*qwen3_vl"):
        open_policy({"model_type": kind})


def test_what_is_no_model_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        open_policy(tmp_path)
    with pytest.raises(ValueError, match="does not exist: give a Hugging Face folder"):
        open_policy(tmp_path / "none")
