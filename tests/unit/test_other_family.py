"""A second family of models, with names of its own, is reached through `FAMILIES` alone."""

import dataclasses
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import models
from models.common.adapter import read_adapter_config, save_adapter
from models.common.prepared import is_product, prepare, shardings
from models.common.weights import load_params
from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from paravt_jax.lora import LoraConfig
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import Blueprint, Constant, declare, initialise, stack
from pipelines.render import ChatRenderer
from tests.support.tiny_models import QWEN
from train.compile.program import Weights
from train.model import ModelSettings
from train.recipes import get_recipe
from train.settings.override import override
from train.setup import Parts, open_renderer
from train.state import trainable_names

PARTS = {"words": "embedding", "eye": "vision", "blocks": "layers"}
CONFIG = {"model_type": "toy", "width": 4, "words": 6}


class Block(nnx.Module):
    def __init__(self, width: int, lora: LoraConfig):
        ones, hf = Constant(1.0), "net.h.{}.attn.q_proj"
        self.gain = declare((width,), ("embed",), ones, "net.h.{}.gain")
        self.ask = nnx.Module()
        self.ask.kernel = declare((width, width), ("embed", "heads"), ones, f"{hf}.weight")
        if lora.adapts(hf):
            self.ask.lora = nnx.Module()
            a, b = ((width, lora.rank), ("embed", None)), ((lora.rank, width), (None, "heads"))
            peft = f"base_model.model.{hf}.lora"
            self.ask.lora.a = declare(*a, ones, f"{peft}_A.weight")
            self.ask.lora.b = declare(*b, ones, f"{peft}_B.weight")


class Toy(nnx.Module):
    def __init__(self, config: dict, lora: LoraConfig):
        width, words = config["width"], config["words"]
        self.words = declare((words, width), ("vocab", "embed"), Constant(0.5), "net.wte.weight")
        self.eye = declare((3, width), (None, "embed"), Constant(0.1), "net.eye.weight")
        self.blocks = stack(Block(width, lora), range(2))


@dataclasses.dataclass(frozen=True)
class ToyPolicy(Qwen3VLPolicy):
    """What is asked for here is its own; what computes is not, and does not run."""

    config: Qwen3VLConfig = QWEN.config

    @property
    def table(self):
        return Blueprint(Toy(CONFIG, self.lora), lambda name: PARTS[name.partition(".")[0]]).table


class Letters(ChatRenderer):
    """Its renderer."""

    def __init__(self, folder: str):
        self.folder = folder

    @classmethod
    def from_folder(cls, folder, *settings):
        return cls(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A Hugging Face folder of the family, which is named where families are."""
    package = types.ModuleType("toy")
    monkeypatch.setattr(
        package, "open_policy", lambda config, lora, **rest: ToyPolicy(lora=lora), raising=False
    )
    monkeypatch.setitem(sys.modules, "toy", package)
    monkeypatch.setitem(models.FAMILIES, "toy", models.Family("toy", f"{__name__}:Letters"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    weights = {"net.wte.weight": np.arange(24, dtype=np.float32).reshape(6, 4)}
    weights |= {"net.eye.weight": np.ones((3, 4), np.float32)}
    for number in range(2):
        weights[f"net.h.{number}.gain"] = np.ones(4, np.float32)
        weights[f"net.h.{number}.attn.q_proj.weight"] = np.eye(4, dtype=np.float32)
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path


def test_policy_and_renderer_are_found_by_the_folder(folder):
    config = override(get_recipe("paravt_rl"), [f"model.folder={folder}"])
    parts = Parts(config)
    assert parts.policy == ToyPolicy()
    assert isinstance(open_renderer(config, str(folder)), Letters)


def test_its_weights_are_read_prepared_and_trained_by_its_own_names(folder):
    table, mesh = ToyPolicy().table, make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    params = load_params(folder, table, mesh)
    assert [name for name, spec in table.items() if is_product(spec)] == ["blocks.ask.kernel"]
    assert trainable_names(table, ModelSettings(frozen=("embedding",))) == {
        "blocks.ask.kernel",
        "blocks.gain",
    }
    with jax.set_mesh(mesh):
        ready = prepare(params, table, "out", jnp.bfloat16)
    assert shardings(ready, table, "out", mesh).keys() == ready.keys() == {*params, "out"}
    np.testing.assert_array_equal(ready["out"].astype(jnp.float32), params["words"].T)
    assert ready["eye"] is params["eye"] and ready["blocks.ask.kernel"][0].dtype == jnp.bfloat16
    assert Weights.of(ToyPolicy()) == Weights(vision=12, layers=2 * 16, head=24)


def test_a_head_that_is_no_embedding_is_told_by_its_own_name(folder):
    table, file = ToyPolicy().table, folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"lm_head.weight": np.ones((6, 4), np.float32)}, file)
    with pytest.raises(ValueError, match="differs from the embedding"):
        load_params(folder, table)
    save_file(weights | {"lm_head.weight": weights["net.wte.weight"].copy()}, file)
    np.testing.assert_array_equal(load_params(folder, table)["words"], weights["net.wte.weight"])


def test_its_adapters_are_those_of_peft(tmp_path):
    lora = LoraConfig(rank=2, targets=("q_proj",))
    table = ToyPolicy(lora=lora).table
    save_adapter(initialise(table, jax.random.key(0)), table, lora, tmp_path / "adapter")
    assert read_adapter_config(tmp_path / "adapter", table) == lora
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == r"(net\.h\.)\d+\.\w+\.(q_proj)"
