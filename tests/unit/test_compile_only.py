"""`--compile-only` on devices of this machine: every program of a run, and what is said of it."""

import dataclasses
import json

import jax
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from train import checks, setup
from train.compile import measure
from train.compile.chips import GIB, Chip
from train.compile.program import Weights
from train.recipes import get_recipe
from train.settings.override import override
from train.sft.settings import SftPhase

pytestmark = pytest.mark.slow

SMALL = [
    *("rl.prompts_per_step=2", "rl.group_size=4", "rl.micro_groups=2", "data.frame_budgets=4"),
    *("agent.turn_tokens=24", "agent.answer_tokens=8", "agent.subagent_batch=8", "mesh=data:8"),
]
ROOMY = Chip("paper", flops=1e12, memory=64 * GIB, bandwidth=1e11, links=1e10)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What was told and written, with 8 CPUs that are taken for chips."""
    target = tmp_path_factory.mktemp("compiled") / "new" / "compile.json"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.CHIPS, jax.devices()[0].device_kind, ROOMY)
        checks.compile_only(override(get_recipe("needle_rl"), SMALL), "here", target, said.append)
    return "\n".join(said), json.loads(target.read_text())[0]


def test_every_program_of_a_run_is_compiled(found):
    said, figures = found
    programs = figures["programs"]
    assert [*programs] == [
        *("cast weights", "encode main", "prefill main", "append main"),
        *("encode crop", "prefill crop", "decode main", "decode crop", "decode main + crop"),
        *("encode learner", "reference log-probs", "step"),
    ]
    assert all(own["fits"] and own["memory"]["together"] > 0 for own in programs.values())
    assert all(f"here {name}: compiled in" in said for name in programs)


def test_calls_are_those_of_the_settings(found):
    config, programs = override(get_recipe("needle_rl"), SMALL), found[1]["programs"]
    agent, calls = config.agent, {name: own["calls"] for name, own in programs.items()}
    assert calls["decode main"] == agent.rounds * 24 + 8 == agent.generated_tokens
    assert calls["append main"] == agent.rounds and calls["prefill main"] == 1
    assert calls["decode main + crop"] == 0 and calls["step"] == config.rl.updates == 1
    assert calls["prefill crop"] == 8 * agent.rounds * agent.calls_run / 8


def test_products_are_those_of_the_model(found):
    """What the compiler multiplies is what the weights say, and attention besides."""
    config, programs = override(get_recipe("needle_rl"), SMALL), found[1]["programs"]
    weights = Weights.of(setup.Parts(config).policy)
    decode = programs["decode main"]
    assert decode["model_flops"] == 2 * (weights.layers + weights.head) * 8
    # Two prompts do not divide over eight devices: each of them prefills both. Their frames do.
    cases = ("decode main", 8, 1.5), ("prefill main", 1, 1.5), ("encode learner", 8, 1.5)
    for name, ways, most in (*cases, ("step", 8, 2)):
        own = programs[name]
        assert 0.99 <= own["flops"] * ways / own["model_flops"] < most, name


def test_steps_add_up(found):
    said, figures = found
    whole, eighth = (figures["step_by_share_of_limits"][share] for share in ("1.0", "0.125"))
    programs = figures["programs"].values()
    assert whole["seconds"] == pytest.approx(sum(own["seconds"] * own["calls"] for own in programs))
    assert whole["seconds"] == pytest.approx(whole["rollout"] + whole["learner"])
    assert eighth["learner"] == whole["learner"] and eighth["rollout"] < whole["rollout"]
    assert 0 < whole["mfu"] < 1 and "step at the roofline" in said
    # Decoding at 40 % of it, all else at 50 %.
    decoding = sum(
        own["seconds"] * own["calls"]
        for name, own in figures["programs"].items()
        if name.startswith("decode")
    )
    expected = decoding / 0.4 + (whole["seconds"] - decoding) / 0.5
    assert whole["expected_seconds"] == pytest.approx(expected)
    assert sum(whole["expected_by_program"].values()) == pytest.approx(expected)


def test_rollouts_have_their_own_mesh_and_the_named_programs_alone_are_compiled(tmp_path):
    """The hand-over moves the weights, so that a token moves hardly any of them."""
    meshes = "mesh=fsdp:8", "rollout_mesh=data:4,tensor:2"
    config, target = override(get_recipe("needle_rl"), [*SMALL, *meshes]), tmp_path / "c.json"
    checks.compile_only(config, "here", target, print, "hand-over, decode main")
    (figures,) = json.loads(target.read_text())
    moved = {
        name: sum(traffic["bytes"] for traffic in own["collectives"].values())
        for name, own in figures["programs"].items()
    }
    assert figures["rollout_mesh"]["tensor"] == 2 and figures["step_by_share_of_limits"] == {}
    assert [*moved] == ["hand-over", "decode main"] and figures["calls"]["step"] == 1
    # Layers are split in two by heads, and were in eight: three quarters of a half are fetched.
    layers = 4 * Weights.of(setup.Parts(config).policy).layers
    assert moved["hand-over"] > layers / 4 and moved["decode main"] < 0.05 * layers


def test_what_does_not_fit_is_one_line(tmp_path, monkeypatch):
    """With the settings that help; the table is there all the same."""
    small = dataclasses.replace(ROOMY, memory=2.0**20)
    monkeypatch.setitem(measure.CHIPS, jax.devices()[0].device_kind, small)
    said: list[str] = []
    config = override(get_recipe("needle_sft"), ["mesh=data:8"])
    sft = dataclasses.replace(config.sft, phases=(SftPhase(0, {"frame": 8}),))
    config = dataclasses.replace(config, sft=sft)
    with pytest.raises(ValueError, match=r"here: step does not fit: needs .* of 0.00 GiB") as told:
        checks.compile_only(config, "here", tmp_path / "compile.json", said.append)
    assert "model.remat=true" in str(told.value) and "\n" not in str(told.value)
    assert "step" in said[-2] and "step at the roofline" not in said[-2]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["mesh=fsdp:3"], "the sizes must multiply to the 8 devices"),
        (
            ["mesh=fsdp:8", "rl.group_size=4", "rl.micro_groups=1"],
            r"a micro-batch has 4 \(rl.micro_groups=1",
        ),
        (["mesh=context:8"], "context:8: attention shares the 4 heads of this model among the 8"),
    ],
)
def test_meshes_that_a_run_refuses_are_refused(tmp_path, settings, words):
    config = override(get_recipe("needle_rl"), ["rl.prompts_per_step=2", *settings])
    with pytest.raises(ValueError, match=words):
        checks.compile_only(config, "here", tmp_path / "compile.json", print)


def test_heads_that_tensor_does_not_divide_are_told():
    policy = setup.Parts(get_recipe("needle_rl")).policy
    heads = policy.init_cache(1, 1, 1, 1).keys.shape[2]
    split = {
        ways: checks.whole_notes(policy, make_mesh(parse_mesh(f"tensor:{ways},data:-1", 8)))
        for ways in (1, 2, 8)
    }
    assert heads == 2 and not split[1] and not split[2]
    assert "tensor:8 does not divide the 2 heads" in split[8][0] and "tensor:2" in split[8][0]


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory: Used 41.50G of 15.75G hbm.", 41.5 * GIB),
        ("RESOURCE_EXHAUSTED: Used 512.0M of 256.0M hbm", 512.0 * 2**20),
        ("the total memory required for HLO temporaries (3.00G) exceeds available", 3.0 * GIB),
        ("RESOURCE_EXHAUSTED: out of memory", None),
    ],
)
def test_what_a_compiler_would_have_needed(message, needed):
    assert measure.needed_bytes(message) == needed
