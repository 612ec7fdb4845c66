"""Law 2 over whole episodes: rollouts and learner agree about every token of every stream.

1. Log-probabilities of the sampler are those of the learner's full forward.
2. The learner gets the tokens that the engine has read and drawn, byte for byte.
3. Samples depend on the seed alone, not on what else is rolled out, on how many slots or on which
   devices.
4. Once an engine has seen its shapes, nothing compiles.
"""

from __future__ import annotations

import collections
import dataclasses
import functools

import jax
import numpy as np
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise, param_shardings
from rollout.agent import Agent
from rollout.engine.precompile import precompile
from tests.support.rollout_law import (
    Learnable,
    Shape,
    World,
    crop_streams,
    input_sizes,
    learner_rows,
    what_happened,
)
from tests.support.tiny_models import QWEN
from train.batch import streams_of_groups

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("turns_that_call")]

EVIDENCE = ["text", "frames"]
MESH = "data:2,fsdp:2,tensor:2"


def study(evidence: str):
    """What costs the suite more than it tells it beside its neighbours."""
    return pytest.param(evidence, marks=pytest.mark.study)


def toy(evidence: str, copies: int) -> World:
    policy = Learnable()
    return World(policy, policy.init(), 3, evidence, copies)


def qwen(evidence: str, copies: int) -> World:
    width = QWEN.config.vision.patch_values
    return World(QWEN, initialise(QWEN.table, jax.random.key(0)), width, evidence, copies)


def check_learner(world: World, groups, tape, rows: int) -> None:
    """Laws 1 and 2, of main agents and of sub-agents."""
    sampling = world.config.sampling, world.config.subagent_sampling
    kinds = zip(
        ("main", "crop"), (streams_of_groups(groups), crop_streams(groups)), sampling, strict=True
    )
    for pool, streams, drawn in kinds:
        copies = world.copies if pool == "main" else 1
        batches = list(world.batches(streams, rows, copies))
        learned, heard = learner_rows(batches, len(streams)), tape.rows(pool)
        if pool == "main":
            assert learned == heard
        # Sub-agents are opened in the order of their calls' arrival.
        assert collections.Counter(learned) == collections.Counter(heard)
        for batch in batches:
            assert world.check_log_probs(batch, drawn.temperature) < 1e-4


def check_variety(world: World, groups) -> None:
    """A law that was never put to the test proves nothing."""
    seen = what_happened(groups, world.config)
    assert seen.tool_rounds == world.config.max_tool_rounds
    assert min(seen.crops, seen.errors, seen.truncated) > seen.episodes / 5
    assert (seen.shown > seen.episodes / 5) == (world.config.evidence == "frames")


def check_same(groups, others) -> None:
    """The groups of the rows that both have hold the same samples."""
    there = {group.row.row_id: group for group in groups}
    for other in others:
        pairs = zip(there[other.row.row_id].trajectories, other.trajectories, strict=True)
        for one, again in pairs:
            for a, b in zip([one, *one.subagents], [again, *again.subagents], strict=True):
                assert a.tokens.tobytes() == b.tokens.tobytes()
                np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-4)


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_learner_and_engine_agree_about_every_token(evidence):
    world, full = toy(evidence, copies=4), Shape(prompts=8, crops=8)
    items, engine = world.items(12), world.engine(full)
    groups = world.roll_out(engine, items)
    check_variety(world, groups)
    check_learner(world, groups, engine.tape, rows=48)
    # Other neighbours in another order, on the same slots.
    check_same(groups, world.roll_out(engine, items[8:3:-1]))


@pytest.mark.study
def test_learner_and_engine_agree_where_sub_agents_must_think():
    world = toy("text", copies=4)
    world.renderer.opening = "<t>\n"
    items, engine = world.items(6), world.engine(Shape(prompts=8, crops=8))
    groups = world.roll_out(engine, items)
    check_variety(world, groups)
    check_learner(world, groups, engine.tape, rows=24)
    subagents = [s for group in groups for t in group.trajectories for s in t.subagents]
    head = world.renderer.encode("<t>\n")
    assert subagents and all(s.tokens[: len(head)].tolist() == head for s in subagents)


@functools.cache
def alone(evidence: str):
    """Six questions, and what is rolled out on one device with a slot for everything."""
    world = toy(evidence, copies=2)
    items = world.items(6)
    return items, world.roll_out(world.engine(Shape(prompts=8, crops=8)), items)


@pytest.mark.parametrize("evidence", ["text", study("frames")])
def test_slots_and_steps_change_no_sample(evidence):
    world, (items, groups) = toy(evidence, copies=2), alone(evidence)
    few = Shape(prompts=1, crops=2, steps_per_call=5)
    check_same(groups, world.roll_out(world.engine(few), items[::-1]))


def test_reports_that_calls_share_are_those_that_each_would_get(monkeypatch):
    world = toy("text", copies=4)
    greedy = dataclasses.replace(world.config.subagent_sampling, temperature=0.0)
    world.config = dataclasses.replace(world.config, subagent_sampling=greedy)
    items, engine = world.items(6), world.engine(Shape(prompts=8, crops=8))
    groups = world.roll_out(engine, items)
    asked = len(engine.tape.pools["crop"])
    assert asked < sum(len(t.subagents) for group in groups for t in group.trajectories)
    monkeypatch.setattr(Agent, "_report_once", Agent._report)
    check_same(groups, world.roll_out(engine, items))
    assert len(engine.tape.pools["crop"]) > asked


@pytest.mark.study
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_a_mesh_changes_no_sample(evidence):
    world, (items, groups) = toy(evidence, copies=2), alone(evidence)
    with jax.set_mesh(make_mesh(parse_mesh(MESH, 8))):
        engine = world.engine(Shape(prompts=4, crops=8))
        check_same(groups, world.roll_out(engine, items))


@pytest.mark.parametrize("evidence", ["text", study("frames")])
def test_eighty_episodes_of_qwen3_vl(evidence):
    world = qwen(evidence, copies=4)
    items, engine = world.items(20), world.engine(Shape(prompts=8, crops=8))
    groups = world.roll_out(engine, items)
    check_variety(world, groups)
    check_learner(world, groups, engine.tape, rows=40)
    check_same(groups, world.roll_out(engine, items[9:4:-1]))


@pytest.mark.study
def test_a_mesh_changes_no_sample_of_qwen3_vl():
    world = qwen("text", copies=2)
    items, few = world.items(4), Shape(prompts=2, crops=4, steps_per_call=7)
    groups = world.roll_out(world.engine(Shape(prompts=4, crops=8)), items)
    devices = make_mesh(parse_mesh(MESH, 8))
    spread = jax.device_put(world.params, param_shardings(QWEN.table, devices))
    with jax.set_mesh(devices):
        check_same(groups, world.roll_out(world.engine(few), items[::-1], params=spread))


@pytest.mark.study
@pytest.mark.parametrize("evidence", EVIDENCE)
def test_nothing_compiles_once_shapes_are_known(evidence):
    """Twelve batches of all sizes, lengths, budgets and crops, each under other weights."""
    world = toy(evidence, copies=2)
    engine = world.engine(Shape(prompts=4, crops=4))
    warmed = precompile(engine, world.params, input_sizes(world), world.values)
    known = list(engine.shapes)
    assert len(known) == engine.compilations == warmed
    for step in range(12):
        items = world.items(1 + step % 6, seed=step, longest=70)
        world.roll_out(engine, items, seed=step, params=world.policy.init(step))
    assert engine.shapes == known
    assert engine.compilations == len(known)
