"""A prompt that its rollouts share gives what copies of it give: log-probabilities, loss and
gradients of text, images, video, tool turns with words and with frames, and experts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.common import attention
from models.common.attention import QUERY_CHUNK, attend, reference
from models.qwen3_vl import Qwen3VLPolicy
from paravt_jax.blocks import text_block
from paravt_jax.mesh import AXES, make_mesh, parse_mesh
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.params import initialise, param_shardings
from paravt_jax.records import LearnerBatch, Shown
from paravt_jax.shaping import Shaping
from paravt_jax.shared_rows import Bounds
from tests.support.rollout_fakes import PAD, VOCAB, image_prompt, text_prompt
from tests.support.shared_rows import shared_rows, visible_in
from tests.support.tiny_models import EXPERTS, QWEN
from train.batch import LearnerStream, learner_batch, row_starts, shared_batch, to_mesh
from train.state import TrainState
from train.step import RlStep, batch_log_probs, shaping_of

pytestmark = pytest.mark.slow

GROUPS, GROUP, PROMPT, OWN = 2, 4, 96, 128
SPARSE = Qwen3VLPolicy(
    dataclasses.replace(EXPERTS, text=dataclasses.replace(EXPERTS.text, vocab_size=VOCAB))
)
KEEPS = optax.GradientTransformation(
    lambda weights: jax.tree.map(jnp.zeros_like, weights),
    lambda gradient, _, weights: (jax.tree.map(jnp.zeros_like, weights), gradient),
)
"""An optimiser that moves nothing and keeps the gradient as its state."""


def stream(prompt, values: int, kind: str, rng: np.random.Generator) -> LearnerStream:
    """Words of the policy; with a response of words or of frames between them in a tool turn."""
    blocks, shown = [text_block(rng.integers(0, 128, rng.integers(3, 20)))], ()
    if kind != "plain" and rng.random() < 0.7:
        frames = int(rng.integers(1, 4))
        told = text_prompt("a red car")
        if kind == "frames":
            told = image_prompt("seen", frames, 8, int(rng.integers(99)), values)
            shown = (Shown(len(blocks[0].tokens), told),)
        blocks += [told, text_block(rng.integers(0, 128, rng.integers(1, 30)))]
    tokens = np.concatenate([block.tokens for block in blocks])
    own = np.concatenate([np.full(len(b.tokens), i % 2 == 0) for i, b in enumerate(blocks)])
    log_probs = np.where(own, -rng.gamma(2.0, 1.0, len(own)), 0).astype(np.float32)
    return LearnerStream(prompt, tokens, own.astype(np.float32), log_probs, shown, own)


def streams_of(kind: str, values: int, seed: int = 0) -> list[LearnerStream]:
    """Two groups, whose prompts are of different length and show different frames."""
    rng, streams = np.random.default_rng(seed), []
    for number in range(GROUPS):
        question = "what is it? " * int(rng.integers(1, 5))
        prompt = text_prompt(question)
        if kind != "text":
            prompt = image_prompt(question, 2 + 2 * number, 8, number, values)
        turns = kind if kind in ("words", "frames") else "plain"
        streams += [stream(prompt, values, turns, rng) for _ in range(GROUP)]
    return streams


def shared(streams, per_row: int, unit: int = 1, view: int = GROUP) -> LearnerBatch:
    sizes = {"group_size": view, "per_row": per_row, "frames": 4, "frame_patches": 8}
    lengths = [len(s.prompt.tokens) for s in streams[::per_row]], [len(s.tokens) for s in streams]
    slots = max(row_starts(*lengths, unit)[1]) + 7
    return shared_batch(streams, slots=slots, bounds=Bounds(PROMPT, OWN, unit), pad_id=PAD, **sizes)


def copied(streams) -> LearnerBatch:
    """Each stream with its prompt in a row of its own, as whole streams."""
    sizes = {"group_size": GROUP, "frames": 4, "frame_patches": 8}
    return learner_batch(streams, length=PROMPT + OWN, pad_id=PAD, **sizes)


def with_values(batch: LearnerBatch, streams, seed: int = 3) -> LearnerBatch:
    """The batch with advantages and reference of each token, the same in both layouts."""
    rng, shape = np.random.default_rng(seed), batch.loss_weights.shape
    advantages, reference_log_probs = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for row, stream in enumerate(streams):
        start = 0 if batch.shared else len(stream.prompt.tokens)
        place = slice(start, start + len(stream.tokens))
        noise = rng.normal(size=(2, len(stream.tokens))).astype(np.float32)
        advantages[row, place] = noise[0]
        reference_log_probs[row, place] = stream.log_probs + 0.1 * noise[1]
    return dataclasses.replace(
        batch, advantages=advantages, reference_log_probs=reference_log_probs
    )


def own_part(values, batch: LearnerBatch, streams) -> list[np.ndarray]:
    """What stands at the tokens after the prompt of each stream."""
    starts = [0 if batch.shared else len(stream.prompt.tokens) for stream in streams]
    rows = zip(np.asarray(values), starts, streams, strict=True)
    return [row[start : start + len(stream.tokens)] for row, start, stream in rows]


def learned(policy, params, batch: LearnerBatch, **settings):
    """Loss, metrics and gradient of a step."""
    step = RlStep(
        policy=policy,
        optimizer=KEEPS,
        objective=ObjectiveConfig(kl_weight=0.1, behaviour_cap=None),
        temperature=0.8,
        budget=OWN,
        group_size=GROUP,
        **{"micro_batches": 1, "router_balance": 0.3, **settings},
    )
    state = TrainState(params, {}, KEEPS.init(params), jnp.zeros((), jnp.int32))
    state, metrics = jax.jit(step)(state, batch)
    told = metrics | metrics.pop("objective").means()
    return {name: float(value) for name, value in told.items()}, jax.device_get(state.optimizer)


@functools.cache
def shared_by_groups(policy: Qwen3VLPolicy, kind: str):
    """What a step learns where each group is one row."""
    streams = streams_of(kind, policy.config.vision.patch_values)
    batch = with_values(shared(streams, GROUP), streams)
    return learned(policy, initialise(policy.table, jax.random.key(0)), batch)


def assert_same(ours, theirs) -> None:
    """Metrics, and gradients by their norms."""
    rtol = 1e-5
    for name, value in theirs[0].items():
        assert ours[0][name] == pytest.approx(value, rel=rtol, abs=2e-6), name
    for name, slope in theirs[1].items():
        assert np.linalg.norm(ours[1][name] - slope) <= rtol * np.linalg.norm(slope), name


def study(*case, id):
    return pytest.param(*case, id=id, marks=pytest.mark.study)


CASES = [
    pytest.param(SPARSE, "frames", id="experts"),
    study(QWEN, "words", id="words"),
    study(QWEN, "text", id="text"),
    study(QWEN, "video", id="video"),
    study(QWEN, "frames", id="frames"),
]
"""Frames of a prompt and of tool responses, with experts; the others hold less of that."""


@pytest.mark.parametrize(("policy", "kind"), CASES)
def test_shared_prompts_give_what_copies_give(policy, kind):
    """Log-probabilities of all learned tokens, loss, metrics, and the gradients of all weights, the
    vision tower's included."""
    params = initialise(policy.table, jax.random.key(0))
    streams = streams_of(kind, policy.config.vision.patch_values)
    one, other = (with_values(x, streams) for x in (shared(streams, GROUP), copied(streams)))
    assert one.streams_per_row == GROUP and one.shared and other.shared is None
    if kind == "frames":
        assert len(one.patches) == GROUPS and len(other.patches) == len(streams)
    parts = [
        own_part(jax.jit(
            lambda params, batch: batch_log_probs(
                policy, params, batch, temperature=0.8, budget=OWN
            )[0]
        )(params, batch), batch, streams)
        for batch in (one, other)
    ]  # fmt: skip
    for ours, theirs in zip(*parts, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert (ours < 0).any()
    assert_same(shared_by_groups(policy, kind), learned(policy, params, other))


@pytest.mark.study
@pytest.mark.parametrize(
    ("per_row", "unit", "view"),
    [(1, 1, GROUP), (2, 16, GROUP), (2, 1, 2)],
)
def test_any_number_of_streams_to_a_row_gives_the_same(per_row, unit, view):
    """Where a mesh lets only some streams of a group share a row, or frames as well. And wherever
    streams begin."""
    params = initialise(SPARSE.table, jax.random.key(0))
    streams = streams_of("frames", SPARSE.config.vision.patch_values)
    few = with_values(shared(streams, per_row, unit, view), streams)
    assert len(few.tokens) == len(streams) // per_row
    assert len(few.patches) == len(streams) // view
    parts = learned(SPARSE, params, few, micro_batches=2)
    assert_same(parts, shared_by_groups(SPARSE, "frames"))


def learned_on(layout: str, policy: Qwen3VLPolicy):
    """What a step learns where each group is one row, on a mesh."""
    params = initialise(policy.table, jax.random.key(0))
    streams = streams_of("frames", policy.config.vision.patch_values)
    batch = with_values(shared(streams, GROUP), streams)
    count = 2 ** layout.count(":")
    mesh = make_mesh(parse_mesh(layout, count), jax.devices()[:count])
    with jax.set_mesh(mesh):
        split = jax.device_put(params, param_shardings(policy.table, mesh))
        return learned(policy, split, to_mesh(batch, mesh))


LAYOUTS = [f"{axis}:2" for axis in AXES]
LAYOUTS += [f"{one}:2,{other}:2" for one, other in itertools.combinations(AXES, 2)]


@pytest.mark.study
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_axis_and_every_two_change_nothing(layout):
    assert_same(learned_on(layout, SPARSE), shared_by_groups(SPARSE, "frames"))


def test_a_mesh_changes_nothing():
    spread = learned_on("data:2,fsdp:2,tensor:2", QWEN)
    assert_same(spread, shared_by_groups(QWEN, "frames"))


def test_penalties_and_truncations_are_those_of_each_stream():
    params = initialise(QWEN.table, jax.random.key(0))
    streams = streams_of("words", QWEN.config.vision.patch_values)

    def ours(batch, shaping: Shaping | None = None):
        shaping = shaping or shaping_of(batch, 1.4, None)
        values = {"temperature": 0.8, "budget": OWN, "shaping": shaping}
        found = jax.jit(lambda p, b: batch_log_probs(QWEN, p, b, **values)[0])(params, batch)
        return own_part(found, batch, streams)

    one, other = shared(streams, GROUP), copied(streams)
    for mine, theirs, plain in zip(ours(one), ours(other), ours(one, Shaping()), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)
        assert np.abs(mine - plain).max() > 1e-2


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        (20, {}),
        (QUERY_CHUNK + 30, {}),
        (QUERY_CHUNK + 30, {"IN_TURNS": 0}),
        (50, {"UNROLLED": 99}),
    ],
    ids=["at once", "in chunks", "head by head", "in loops"],
)
def test_attention_against_the_mask_written_out(own, limits, monkeypatch):
    for name, limit in limits.items():
        monkeypatch.setattr(attention, name, limit)
    rng, (shared, slots) = np.random.default_rng(0), shared_rows(24, own)
    query = jnp.asarray(rng.normal(size=(2, slots, 4, 8)), jnp.float32)
    key, value = jnp.asarray(rng.normal(size=(2, 2, slots, 2, 8)), jnp.float32)
    visible = visible_in(shared, slots)
    real = np.asarray(shared.segments(slots)) >= 0

    def total(function, *arrays):
        out = function(*arrays)
        # What stands in padding means nothing.
        return jnp.sum(jnp.where(real[:, :, None, None], jnp.sin(out), 0)), out

    found = [
        jax.jit(jax.value_and_grad(functools.partial(total, function), (0, 1, 2), has_aux=True))(
            query, key, value
        )
        for function in (
            lambda q, k, v: attend(q, k, v, causal=True, shared=shared),
            lambda q, k, v: reference(q, k, v, visible),
        )
    ]
    ours, theirs = ([out[real], *slopes] for (_, out), slopes in found)
    for mine, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, want, rtol=1e-5, atol=2e-6)


def test_what_does_not_fit_is_refused():
    streams = streams_of("text", 3)
    sizes = {"pad_id": PAD, "group_size": GROUP, "per_row": GROUP}
    for slots, bounds, told in (
        (999, Bounds(8, OWN), r"a prompt of .* does not fit the batch length 8"),
        (999, Bounds(PROMPT, 4), r"what follows a prompt of .* length 4"),
        (40, Bounds(PROMPT, OWN), r"a prompt with what follows it of .* length 40"),
    ):
        with pytest.raises(ValueError, match=told):
            shared_batch(streams, slots=slots, bounds=bounds, **sizes)
