"""What no test on CPU sees: programs compiled for a real topology, where libtpu is installed.

A small model with a large cache: 8 prompts x 2 rollouts, four layers of width 1024.
"""

import json
import shutil

import jax
import pytest
from jax.sharding import Mesh

from paravt_jax.mesh import make_mesh, parse_mesh
from train.checks import EXAMPLE
from train.compile.cost import collectives
from train.compile.hlo import read
from train.compile.measure import devices_of, measure
from train.compile.program import Program
from train.compile.programs import programs_of
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


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A program of the run for a mesh."""
    devices = devices_of(TOPOLOGY)

    def get(
        name: str, sizes: str, experts: bool = False, more: tuple[str, ...] = ()
    ) -> tuple[Program, Mesh]:
        folder = model_folder(tmp_path_factory.mktemp("model"), experts)
        run = override(get_recipe("needle_rl"), [*SETTINGS, *more, f"model.folder={folder}"])
        mesh = make_mesh(parse_mesh(sizes, len(devices)), devices)
        with jax.set_mesh(mesh):
            return next(p for p in programs_of(run, mesh, [EXAMPLE]) if p.name == name), mesh

    return get


@pytest.mark.parametrize("mesh", ["fsdp:8", "fsdp:4,tensor:2", "tensor:8"])
def test_decoding_copies_no_cache(program, mesh):
    """Its temporaries are a small part of what it is given, most of which is the cache. Its slots
    are as many as the limits of a rollout come to, which fill no whole tiles by themselves."""
    # Beside weights that are gathered for a layer.
    large = "agent.turn_tokens=16384", "rl.group_size=8"
    found = measure(*program("decode main", mesh, more=large), tell=print)
    assert found.memory.temporaries < 0.1 * found.memory.arguments


@pytest.mark.parametrize(
    "mesh",
    [
        "tensor:8",
        pytest.param(
            "fsdp:8",
            marks=pytest.mark.xfail(
                strict=True,
                raises=AssertionError,
                reason="rollouts on the learner's mesh gather all weights",
            ),
        ),
    ],
)
def test_a_token_moves_hardly_any_weights(program, mesh):
    found = measure(*program("decode main", mesh), tell=print)
    weights = 2 * (4 * WIDTH * (2 * 2048 + 2 * 1024 + 3 * 4096) + WIDTH * VOCAB)
    assert sum(own.bytes for own in found.cost.collectives.values()) < 0.01 * weights


def test_the_head_is_gathered_once_per_micro_batch(program):
    """At most: split over its vocabulary it is not gathered at all."""
    step, mesh = program("step", "fsdp:8")
    with jax.set_mesh(mesh):
        text = step.lower().compile().as_text()
    gathered = sum(
        times
        for own, times in collectives(read(text))
        if own.opcode.startswith("all-gather") and own.types[-1].count == WIDTH * VOCAB
    )
    assert gathered <= 2


def test_experts_are_grouped_products(program):
    """The devices of the mesh choose it, not the CPU that compiles."""
    step, mesh = program("step", "expert:8", experts=True)
    with jax.set_mesh(mesh):
        assert "ragged_dot" in step.lower().as_text()
