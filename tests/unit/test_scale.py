"""What no test on CPU sees: programs compiled for a real topology, where libtpu is installed.

A small model: 8 prompts x 2 rollouts, four layers of width 1024.
"""

import json
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from paravt_jax.mesh import make_mesh, parse_mesh
from train import setup
from train.checks import EXAMPLE
from train.compile.cost import collectives
from train.compile.footprint import cache_bytes
from train.compile.hlo import read
from train.compile.measure import devices_of, measure
from train.compile.program import Program
from train.compile.programs import programs_of
from train.config import Config
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import override

pytest.importorskip("libtpu")
pytestmark = pytest.mark.slow

TOPOLOGY, WIDTH, VOCAB = "v5p:2x2x2", 1024, 8192
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": VOCAB,
}
SETTINGS = [
    *("model.compute_dtype=bfloat16", "model.remat=true", "data.frame_budgets=8"),
    *("agent.turn_tokens=4096", "rl.prompts_per_step=8", "rl.group_size=2", "rl.micro_groups=4"),
]


EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def model_folder(folder, experts):
    """The needle model's folder without weights, with the sizes above."""
    for path in COLD_START.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= TEXT | (EXPERTS if experts else {})
    config["vision_config"]["out_hidden_size"] = WIDTH
    if experts:
        config["model_type"] = "qwen3_vl_moe"
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def nothing_kept():
    """What was compiled for chips that are not there cannot be read back."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", kept)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of the model above on a mesh."""

    def get(mesh: str, *more: str, experts: bool = False) -> Config:
        folder = model_folder(tmp_path_factory.mktemp("model"), experts)
        given = *SETTINGS, f"mesh={mesh}", f"model.folder={folder}", *more
        return override(get_recipe("needle_rl"), list(given))

    return get


def program(run: Config, name: str) -> Program:
    """A program of the run."""
    devices = devices_of(TOPOLOGY)
    mesh = make_mesh(parse_mesh(run.mesh, len(devices)), devices)
    with jax.set_mesh(mesh):
        return next(p for p in programs_of(run, mesh, [EXAMPLE]) if p.name == name)


def test_a_mesh_need_not_follow_the_axes_of_the_torus():
    devices = devices_of("v6e:4x4")
    assert make_mesh(parse_mesh("fsdp:8,tensor:2", 16), devices).size == 16


@pytest.mark.parametrize("rollouts", ["data:8", "fsdp:8", "data:4,tensor:2", "tensor:8"])
def test_decoding_copies_no_cache(config, rollouts):
    """Its temporaries are a small part of the cache, whose slots are as many as the limits of a
    rollout come to, which fill no whole tiles by themselves."""
    # A cache that is large beside weights that are gathered for a layer.
    large = "agent.turn_tokens=16384", "rl.group_size=8"
    run = config("fsdp:8", f"rollout_mesh={rollouts}", *large)
    decode, parts = program(run, "decode main"), setup.Parts(run)
    with jax.set_mesh(decode.mesh):
        caches = cache_bytes(parts.policy, {"main": parts.pools([EXAMPLE])["main"]}, decode.mesh)
    assert measure(decode, tell=print).memory.temporaries < 0.1 * caches


@pytest.mark.parametrize("more", [(), ("rollout_mesh=tensor:8",)])
def test_a_token_moves_hardly_any_weights(config, more):
    """On the mesh that rollouts have by default, and where it splits weights most."""
    found = measure(program(config("fsdp:8", *more), "decode main"), tell=print)
    weights = 2 * (4 * WIDTH * (2 * 2048 + 2 * 1024 + 3 * 4096) + WIDTH * VOCAB)
    assert sum(own.bytes for own in found.cost.collectives.values()) < 0.01 * weights


def test_the_hand_over_moves_the_weights_once(config):
    """From rows split eight ways to columns: each device gets its share from the others."""
    found = measure(program(config("fsdp:8"), "hand-over"), tell=print)
    share = 2 * 4 * WIDTH * (2 * 2048 + 2 * 1024 + 3 * 4096) / 8
    assert share < sum(own.bytes for own in found.cost.collectives.values()) < 2 * share


def test_the_head_is_gathered_once_per_micro_batch(config):
    """At most: split over its vocabulary it is not gathered at all."""
    step = program(config("fsdp:8"), "step")
    with jax.set_mesh(step.mesh):
        text = step.lower().compile().as_text()
    gathered = sum(
        times
        for own, times in collectives(read(text))
        if own.opcode.startswith("all-gather") and own.types[-1].count == WIDTH * VOCAB
    )
    assert gathered <= 2


def test_gradients_are_added_up_in_float32(config):
    """Those of all layers, in each of the two micro-batches, where the setting asks for it."""
    step = program(config("fsdp:8", "model.gradient_dtype=float32"), "step")
    with jax.set_mesh(step.mesh):
        text = step.lower().compile().as_text()
    added = "all-reduce", "reduce-scatter", "collective-permute"
    moved = sum(
        times * own.types[0].bytes
        for own, times in collectives(read(text))
        if own.opcode.startswith(added) and own.types[0].dtype == "f32"
    )
    layers = 4 * WIDTH * (2 * 2048 + 2 * 1024 + 3 * 4096)
    assert moved >= 2 * 4 * layers * 7 / 8


def test_experts_are_grouped_products(config):
    """The devices of the mesh choose it, not the CPU that compiles."""
    step = program(config("expert:8", experts=True), "step")
    with jax.set_mesh(step.mesh):
        assert "ragged_dot" in step.lower().as_text()
