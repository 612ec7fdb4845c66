"""Rollouts on a mesh of their own draw what they draw on the learner's, with weights that were
handed over on the devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from models.qwen3_vl import Qwen3VLPolicy
from paravt_jax.mesh import make_mesh, parse_mesh, reshape_mesh
from paravt_jax.params import initialise, param_shardings
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from tests.support.rollout_fakes import IM_END, PAD, VOCAB, image_prompt, text_prompt
from tests.support.tiny_models import EXPERTS, QWEN
from train.compile.footprint import local_bytes, rollout_bytes
from train.compile.layout import RolloutLayout, candidates, rollout_sizes

pytestmark = pytest.mark.slow

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8}
MODEL = {"text": dataclasses.replace(QWEN.config.text, **HEADS)}
DENSE = dataclasses.replace(QWEN, config=dataclasses.replace(QWEN.config, **MODEL))
HALF = dataclasses.replace(DENSE, compute_dtype="bfloat16")
WORDS = {"text": dataclasses.replace(EXPERTS.text, vocab_size=VOCAB)}
SPARSE = Qwen3VLPolicy(dataclasses.replace(EXPERTS, **WORDS))
POOL = SlotPool(prompts=8, copies=2, prompt_tokens=64, suffix=32, page=8)
CONTENTS = [bytes([index]) if index < 128 else b"" for index in range(VOCAB)]


def open_engine(policy, mesh=None, **automata) -> Engine:
    automata = TokenAutomata(CONTENTS, [IM_END], **automata)
    return Engine(policy, {"main": POOL}, automata=automata, pad_id=PAD, mesh=mesh)


def prompts(policy):
    width = policy.config.vision.patch_values
    shown = [image_prompt("what?", frames=2, patches=8, seed=s, values=width) for s in range(3)]
    return [*shown, text_prompt("no frames here")]


def sample(engine, params):
    """Two turns of two copies of every prompt, given something in between."""
    session, turns = Session(engine, params), []
    streams = [s for p in prompts(engine.policy) for s in session.open("main", p, [3, 7])]
    for given in ([], [65, 66, 67]):
        for stream in streams:
            session.generate(stream, given, SamplingConfig(temperature=1.0), 8)
        ended = {}
        while session.generating:
            ended |= dict(session.step())
        turns += [ended[stream] for stream in streams]
    return turns


@functools.cache
def sample_alone(policy):
    return sample(open_engine(policy), initialise(policy.table, jax.random.key(0)))


def on_meshes(policy, learner: str, rollouts: str):
    """Turns of an engine with its own mesh, under the learner's, and the engine."""
    mesh = make_mesh(parse_mesh(learner, 8))
    params = initialise(policy.table, jax.random.key(0))
    other = reshape_mesh(mesh, parse_mesh(rollouts, 8))
    with jax.set_mesh(mesh):
        laid_out = jax.device_put(params, param_shardings(policy.table, mesh))
        engine = open_engine(policy, other)
        return sample(engine, laid_out), engine, laid_out


MESHES = [(DENSE, "fsdp:4,tensor:2", "data:2,tensor:4")]
MORE_MESHES = [
    (SPARSE, "fsdp:4,expert:2", "data:2,expert:2,tensor:2"),
    (DENSE, "fsdp:8", "tensor:8"),
    (DENSE, "fsdp:8", "data:4,tensor:2"),
    (DENSE, "data:8", "fsdp:8"),
    (DENSE, "tensor:8", "data:8"),
    (SPARSE, "fsdp:8", "data:2,expert:4"),
    (DENSE, "fsdp:2,context:4", "data:2,context:2,tensor:2"),
]


def study(*case):
    return pytest.param(*case, marks=pytest.mark.study)


@pytest.mark.parametrize(
    ("policy", "learner", "rollouts"), [*MESHES, *(study(*case) for case in MORE_MESHES)]
)
def test_every_layout_draws_the_same(policy, learner, rollouts):
    alone = sample_alone(policy)
    found, engine, params = on_meshes(policy, learner, rollouts)
    assert {len(turn.tokens) for turn in alone} != {1}
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    homes = engine.policy.shardings(engine.prepare(params), engine.mesh)
    assert jax.tree.all(
        jax.tree.map(lambda x, home: x.sharding == home, engine.prepare(params), homes)
    )


@pytest.mark.parametrize("shape", ["tensor:2", "data:1"])
def test_devices_of_their_own_draw_the_same(shape):
    """The learner's weights are on two devices, the engine on others."""
    learner = make_mesh(parse_mesh("fsdp:2", 2), jax.devices()[:2])
    own = parse_mesh(shape, count := 1 if shape == "data:1" else 2)
    apart = make_mesh(own, jax.devices()[2 : 2 + count])
    params = initialise(DENSE.table, jax.random.key(0))
    with jax.set_mesh(learner):
        laid_out = jax.device_put(params, param_shardings(DENSE.table, learner))
        engine = open_engine(DENSE, apart, place=np.asarray)
        found = sample(engine, laid_out)
    for one, other in zip(sample_alone(DENSE), found, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    held = jax.tree.leaves((engine.prepare(laid_out), engine.caches.states))
    assert {device for x in held if isinstance(x, jax.Array) for device in x.devices()} == {
        *apart.devices.flat
    }


def test_weights_are_handed_over_on_the_devices_and_compiled_once():
    _, engine, params = on_meshes(HALF, "fsdp:8", "data:4,tensor:2")
    compiled = []

    def note(event, duration_secs, **_):
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    with jax.set_mesh(params["text.embedding"].sharding.mesh), jax.transfer_guard("disallow"):
        handed = engine.prepare(params)
    jax.monitoring.unregister_event_duration_listener(note)
    assert not [event for event in compiled if "compile" in event]
    assert engine.metrics()["time/hand_over"] > 0
    # On CPU layers are arrays of their own.
    layers = handed["text.layers.mlp.up.kernel"]
    assert {layer.dtype.name for layer in layers} == {"bfloat16"}
    assert layers[0].sharding.shard_shape(layers[0].shape) == (32, 24)
    caches = engine.caches.states["main"].cache
    for stack in caches.keys.stacks:
        assert stack.sharding.shard_shape(stack.shape)[1:3] == (16, 4)
    engine.mesh = None
    assert set(engine.metrics()) == {"rollout/cache_mib"}


def layout(policy, mesh: str, given=None, resident=0) -> RolloutLayout:
    devices = make_mesh(parse_mesh(mesh, 8))
    return RolloutLayout(policy, devices, given, policy.compute_dtype, resident)


def test_the_smallest_share_that_fits_is_taken(monkeypatch):
    pools = {"main": POOL}
    bytes_of = {
        tuple(sizes.values()): rollout_bytes(
            DENSE, "float32", layout(DENSE, "fsdp:8", text).__call__(pools), pools
        )
        for text in ("data:8", "data:4,tensor:2", "tensor:8")
        for sizes in [parse_mesh(text, 8)]
    }
    whole, half, least = bytes_of.values()
    assert whole > half > least
    cases = {2 * whole: "data:8", whole - 1: "data:4,tensor:2", half - 1: "data:2,tensor:4"}
    for needed, text in cases.items():
        own = layout(DENSE, "fsdp:8", resident=1000)
        monkeypatch.setattr(
            "train.compile.layout.memory_limit", lambda mesh, n=needed: int((n + 1000) / 0.85) + 1
        )
        assert dict(own(pools).shape) == parse_mesh(text, 8), text
    monkeypatch.setattr("train.compile.layout.memory_limit", lambda mesh: least // 2)
    assert layout(DENSE, "fsdp:8")(pools) is None  # nothing fits: as the learner


def test_a_cpu_takes_the_mesh_of_the_learner_and_so_does_the_same_mesh():
    pools = {"main": POOL}
    assert layout(DENSE, "fsdp:8")(pools) is None
    assert layout(DENSE, "fsdp:8", "fsdp:8")(pools) is None
    other = layout(DENSE, "fsdp:8", "data:2,tensor:-1")(pools)
    assert dict(other.shape) == parse_mesh("data:2,tensor:4", 8)
    assert list(other.devices.flat) == list(make_mesh(parse_mesh("fsdp:8", 8)).devices.flat)


def test_candidates_share_by_experts_first_and_divide_the_model():
    found = [(s["expert"], s["tensor"]) for s in candidates(SPARSE, 8)]
    assert found == [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (4, 2)]
    assert [s["tensor"] for s in candidates(QWEN, 8)] == [1, 2]
    assert all(s["data"] * s["expert"] * s["tensor"] == 8 for s in candidates(SPARSE, 8))


@pytest.mark.parametrize(
    ("policy", "text", "words"),
    [
        (DENSE, "data:3", "8 devices"),
        (QWEN, "data:2,tensor:4", "tensor:4 does not divide the 4 heads and 2 key heads"),
        (QWEN, "data:2,tensor:2,context:2", "tensor:2 times context:2 does not divide the 4 heads"),
        (SPARSE, "expert:8", "expert:8 does not divide the 4 experts"),
        (DENSE, "rows:8", "unknown axis 'rows'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(policy, text, words):
    with pytest.raises(ValueError, match=words) as refusal:
        rollout_sizes(text, policy, 8)
    assert str(refusal.value).startswith(f"--rollout-mesh {text}: ")


def test_what_is_handed_over_is_counted():
    _, engine, params = on_meshes(HALF, "fsdp:8", "data:4,tensor:2")
    counted = rollout_bytes(HALF, "bfloat16", engine.mesh, {"main": POOL})
    engine.caches.release()
    cache = engine.caches.open(-1)["main"].cache
    caches = cache.prompt_keys, cache.prompt_values, cache.keys, cache.values
    assert counted == pytest.approx(local_bytes((engine.prepare(params), caches)), rel=1e-6)
