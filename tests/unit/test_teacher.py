"""VISD's teacher: it reads the student's very tokens after another prompt, follows the student, and
scales advantages until it is annealed away."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from paravt_jax.records import Frames, RolloutGroup, Row, Shown, Trajectory, VideoRef
from paravt_jax.structure import ANCHOR_TAGS, tag_table
from tests.support.needle import renderer
from tests.support.tiny_models import NEEDLE_MODEL
from train.methods import teacher as teacher_module
from train.methods.teacher import TaughtLearner
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.settings.override import override
from train.setup import batch_shapes, open_learner
from train.state import TrainState, make_state, trainable_names
from train.step import batch_hidden, mean_metrics
from train.workdir.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

POLICY = Qwen3VLPolicy(Qwen3VLConfig.from_dict(NEEDLE_MODEL))
ROW = Row("r1", VideoRef("/nowhere.mp4", 64.0), "What colour?", "purple", "oe", ((8.0, 12.0),))
CONFIG = override(
    get_recipe("needle_rl"),
    [
        "teacher.strength=0.5",
        "rl.prompts_per_step=2",
        "rl.group_size=2",
        "rl.micro_groups=1",
        "agent.turn_tokens=8",
        "agent.answer_tokens=8",
        "data.frame_budgets=2",
    ],
)
TRAINED = trainable_names(POLICY.table, CONFIG.model)


def frames(count: int, seed: int = 0) -> Frames:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return Frames(pixels, np.arange(count) * 21.0)


def rollout(number: int, shows: bool = False) -> Trajectory:
    """Generated tokens, a tool response (of two frames on request), generated tokens."""
    rng = np.random.default_rng(number)
    clip = renderer().clip(frames(2, number), 8.0, 10.0)
    block = renderer().frames_turn([clip] if shows else ["A circle."])
    spoken = [rng.integers(20, 400, 3 + number % 2), rng.integers(20, 400, 4)]
    tokens = np.concatenate([spoken[0], block.tokens, spoken[1]]).astype(np.int32)
    generated = np.ones(len(tokens), bool)
    generated[len(spoken[0]) : len(spoken[0]) + len(block.tokens)] = False
    text = renderer().decode(tokens)
    return Trajectory(
        prompt=renderer().main_prompt(ROW, frames(2), tools=True),
        tokens=tokens,
        generated=generated,
        log_probs=np.where(generated, -6.0, 0.0).astype(np.float32),
        turns=(),
        scored_text=text,
        full_text=text,
        shown=(Shown(len(spoken[0]), block),) if shows else (),
        rewards={"total": 1.0 * number, "task": 1.0 * number, "accuracy": number % 2, "format": 1.0}
        | {"anchor": 0.0},
    )


def groups_of(shows: bool = False) -> list[RolloutGroup]:
    rollouts = [rollout(number, shows and number == 1) for number in range(4)]
    return [RolloutGroup(ROW, 2, tuple(rollouts[:2])), RolloutGroup(ROW, 2, tuple(rollouts[2:]))]


@pytest.fixture(scope="module")
def kit():
    """A learner, a teacher and a fresh state on one device."""
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    optimizer = optax.sgd(0.1)
    tags = tag_table(renderer().token_contents(512), ANCHOR_TAGS)
    params = initialise(POLICY.table, jax.random.key(0), mesh)
    state = make_state(params, TRAINED, mesh, optimizer, True)
    reference = {name: x.copy() for name, x in state.trainable.items()}
    shapes = batch_shapes(CONFIG, renderer().spec, renderer().pad_id)
    learner = open_learner(CONFIG, POLICY, optimizer, mesh, tags, shapes, reference)
    taught = TaughtLearner(learner, CONFIG.teacher, renderer(), tools=True)
    return SimpleNamespace(mesh=mesh, learner=learner, taught=taught, state=state)


def test_the_teacher_reads_the_students_tokens_after_a_prompt_with_the_outcome(kit):
    groups = groups_of(shows=True)
    students = [t for group in groups for t in group.trajectories]
    for student, stream in zip(students, kit.taught.streams(groups), strict=True):
        np.testing.assert_array_equal(stream.tokens, student.tokens)
        np.testing.assert_array_equal(stream.loss_weights > 0, student.generated)
        assert stream.shown == student.shown and stream.prompt.patches is student.prompt.patches
        hinted, plain = (renderer().decode(p.tokens) for p in (stream.prompt, student.prompt))
        verdict = "right" if student.rewards["accuracy"] else "wrong"
        for told in ("answer: purple", "seconds 8 to 12", f"answer is {verdict}, and the form is"):
            assert told in hinted and told not in plain
    assert "purple" not in renderer().decode(np.concatenate([t.tokens for t in students]))


def plain_gap(theirs, ours, token: int, support: int = 16) -> float:
    """The formula on whole rows of logits, in float64."""
    chosen = list({*np.argsort(-theirs)[:support].tolist(), token})
    gain = [z[token] - np.log(np.exp(z[chosen]).sum()) for z in (theirs, ours)]
    return gain[0] - gain[1]


def test_gaps_are_those_of_the_plain_formula_at_generated_tokens(kit):
    """Each generated token under both policies, wherever it stands in their streams, one of which
    has frames in a tool response."""
    groups = groups_of(shows=True)
    other = initialise(POLICY.table, jax.random.key(1), kit.mesh)
    told = {name: other[name] for name in kit.state.trainable}
    state = dataclasses.replace(kit.state, teacher=told)
    batch, _ = kit.learner.batches(state.params, groups)
    gaps = np.asarray(kit.taught.gaps(state, groups, batch))

    @jax.jit
    def table(params, batch):
        return POLICY.logits(params, batch_hidden(POLICY, params, batch)[0])

    hinted = kit.learner.batches.shared(kit.taught.streams(groups), 2, per_row=1)
    theirs = np.asarray(table({**state.frozen, **told}, hinted), np.float64)
    ours = np.asarray(table(state.params, batch), np.float64)
    np.testing.assert_array_equal(hinted.own_tokens, batch.own_tokens)
    assert len(hinted.tokens) == 4 and len(batch.tokens) == 2
    want = np.zeros_like(gaps)
    for row, own in np.argwhere(np.asarray(batch.loss_weights) > 0):
        token = int(batch.own_tokens[row, own])
        want[row, own] = plain_gap(theirs[row, own], ours[row, own], token)
    np.testing.assert_allclose(gaps, want, atol=2e-5)
    assert np.abs(want).max() > 1e-2


def test_a_teacher_that_is_the_student_and_knows_no_more_changes_nothing(kit, monkeypatch):
    """Weights are 1, so the gradient is GRPO's, to the last bits: it reads rows of one stream."""
    groups = groups_of()
    batch, _ = kit.learner.prepare(kit.state, groups)
    hinted, metrics = kit.taught.reweight(kit.state, groups, batch, 0)
    assert np.abs(hinted.advantages - batch.advantages).max() > 1e-3
    assert metrics["teacher/gap_size"] > 0
    monkeypatch.setattr(teacher_module, "hindsight", lambda row, feedback: "")
    same, _ = kit.taught.reweight(kit.state, groups, batch, 0)
    np.testing.assert_allclose(same.advantages, batch.advantages, rtol=1e-6)


def test_its_share_falls_linearly_and_then_it_is_off(kit):
    shares = [kit.taught.share(step) for step in (0, 150, 300, 599, 600, 5000)]
    np.testing.assert_allclose(shares, [0.5, 0.375, 0.25, 0.5 / 600, 0, 0])
    batch, _ = kit.learner.batches(kit.state.params, groups_of())
    same, metrics = kit.taught.reweight(kit.state, [], batch, 600)
    assert same is batch and metrics == {"teacher/strength": 0.0}
    assert kit.taught.follow(kit.state, 600) is kit.state


def test_a_step_is_the_learners_with_a_teacher_beside(kit):
    """Reweighted before the update, moved after it; the share is that of the step, which the state
    counts by optimiser steps."""
    state = jax.tree.map(lambda x: x.copy(), kit.state)
    state = dataclasses.replace(state, step=jnp.int32(150))
    groups = groups_of()
    batch, _ = kit.learner.prepare(state, groups)
    batch, told = kit.taught.reweight(state, groups, batch, 150)
    copied = jax.tree.map(lambda x: x.copy(), state)
    plain, learned = kit.learner.update(copied, batch)
    want = kit.taught.follow(plain, 150)
    got, metrics = kit.taught.step(state, groups)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert metrics["teacher/strength"] == 0.375 and metrics.items() >= told.items()
    assert metrics["loss"] == mean_metrics(learned)["loss"]
    assert any((got.teacher[name] != kit.state.teacher[name]).any() for name in got.teacher)


def test_it_is_a_moving_average_of_the_student(kit):
    """teacher_n = (1 - r)^n teacher_0 + r sum_k (1 - r)^(n-k) student_k, with r = 0.01."""
    state = TrainState({"w": jnp.zeros(3)}, {}, (), jnp.int32(0), {"w": jnp.full(3, 2.0)})
    want = 2.0
    for step in range(5):
        state = dataclasses.replace(state, trainable={"w": jnp.full(3, float(step))})
        state = kit.taught.follow(state, step)
        want = 0.99 * want + 0.01 * step
    np.testing.assert_allclose(state.teacher["w"], want, rtol=1e-6)


@pytest.mark.study
def test_it_is_laid_out_like_the_weights_and_comes_back_from_a_checkpoint(tmp_path):
    mesh = make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8), jax.devices())
    optimizer = make_optimizer(CONFIG.optimizer, 1, POLICY.table)
    with jax.set_mesh(mesh):
        params = initialise(POLICY.table, jax.random.key(0), mesh)
        state = make_state(params, TRAINED, mesh, optimizer, teacher=True)
        moved = {name: value + 0.5 for name, value in state.teacher.items()}
        saved = dataclasses.replace(state, teacher=moved)
        checkpoints = Checkpoints(tmp_path, 1, POLICY.table)
        checkpoints.save(7, saved, {"prompts": 3})
        back, step, memory = checkpoints.restore(state)
        checkpoints.close()
    assert (step, memory) == (7, {"prompts": 3}) and set(back.teacher) == set(back.trainable)
    for name, value in moved.items():
        np.testing.assert_array_equal(back.teacher[name], value)
        assert back.teacher[name].sharding == back.trainable[name].sharding


def test_a_run_without_a_teacher_has_no_second_copy_of_its_weights():
    mesh = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
    params = {"text.norm": jnp.ones(2)}
    assert make_state(params, set(params), mesh, optax.sgd(0.1)).teacher == {}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["teacher.strength=0", "teacher.rate=0.1"], "teacher.rate=0.1 has no effect"),
        (["teacher.strength=1.5"], "between 0 and 1"),
        (["teacher.anneal_steps=0"], "at least 1"),
        (["teacher.rate=0"], "above 0 and at most 1"),
        (["teacher.weight_low=1.1"], "above 0 and at most 1"),
        (["teacher.full_weight=1", "teacher.support=8"], "teacher.support=8 has no effect"),
        (["difficulty.window=3", "difficulty.traces=2"], "set one of them to 0"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        override(CONFIG, settings)
