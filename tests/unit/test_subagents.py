"""Sub-agents in the loss: as if they were rows of the batch like all others."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.records import LearnerBatch
from tests.support.rollout_fakes import PAD
from tests.support.rollout_law import Learnable
from tests.support.scripted_rollouts import SPEC, as_state, configured, group, learner, rollout
from train.batch import learner_batch, stream_of, streams_of_groups, to_mesh
from train.recipes import get_recipe
from train.rl.learner import Learner
from train.rl.subagents import possible_rows, rows_per_group, subagent_advantages, subagent_streams
from train.settings.override import override
from train.step import mean_metrics, minibatch

pytestmark = pytest.mark.slow

POLICY = Learnable()
REFERENCE = POLICY.init(seed=7) | {"see": POLICY.init()["see"]}
"""Other words, the same eyes: the vision tower is frozen."""
SETTINGS = (
    "rl.subagent_credit=full",
    "rl.prompts_per_step=2",
    "agent.sampling.temperature=0.8",
    "agent.subagent_sampling.temperature=0.8",
    "data.crop_frames=4",
    "objective.behaviour_cap=none",
)


def groups():
    """Two prompts of two rollouts, with 3, 0, 1 and 0 sub-agents."""
    made = [
        rollout("look", "red", responses=("r",), subagents=("a car", "rain", "no"), seed=1),
        rollout("blue", seed=2),
        rollout("see", "green", responses=("r",), subagents=("a longer report",), seed=3),
        rollout("white", seed=4),
    ]
    rewards = [(1.5, 0.5), (0.1, 0.2), (0.3, 0.1), (0.7, 0.4)]
    scored = [
        dataclasses.replace(
            t, rewards={"total": total, "task": total - anchor, "anchor": anchor, "accuracy": 0.0}
        )
        for t, (total, anchor) in zip(made, rewards, strict=True)
    ]
    return [group(*scored[:2]), group(*scored[2:])]


@functools.cache
def made_batch(*settings, mesh="data:1") -> tuple:
    """A learner, its parameters and its batch of `groups`, advantages and reference included."""
    own = learner(configured(*SETTINGS, *settings), POLICY, mesh, REFERENCE)
    params = POLICY.init()
    batch, _ = own.prepare(as_state(params), groups())
    return own, params, batch


def moved(own, params, batch, mesh="data:1"):
    """Loss, metrics and weights after one step of plain gradient descent."""
    count = 1 if mesh == "data:1" else 8
    with jax.set_mesh(make_mesh(parse_mesh(mesh, count), jax.devices()[:count])):
        fresh = jax.tree.map(lambda x: x + 0, params)
        # Like the vision tower of a run, whose features the learner computes beforehand.
        frozen = {"see": fresh.pop("see")}
        state, learned = own.update(as_state(fresh, frozen), batch)
    metrics = mean_metrics(learned)
    return metrics.pop("loss"), metrics, jax.device_get(state.trainable)


def assert_same(ours, theirs, rtol=1e-5):
    assert ours[0] == pytest.approx(theirs[0], rel=rtol)
    for name, value in theirs[1].items():
        assert ours[1][name] == pytest.approx(value, rel=rtol, abs=1e-7), name
    for name, value in theirs[2].items():
        np.testing.assert_allclose(ours[2][name], value, rtol=rtol, atol=1e-7)


def as_one_batch(batch: LearnerBatch) -> LearnerBatch:
    """Main agents and sub-agents as rows of one batch, each with frames of its own."""
    crops = [t for g in groups() for r in g.trajectories for t in r.subagents]
    streams = [*streams_of_groups(groups()), *map(stream_of, crops)]
    one = learner_batch(streams, length=128, pad_id=PAD, frames=4, frame_patches=SPEC.max_patches)
    trained = np.asarray(batch.subagents.loss_weights).any(axis=1)

    def both(name: str) -> np.ndarray:
        """Of main agents what comes after their prompts, of sub-agents whole streams."""
        own, whole = (np.asarray(getattr(x, name)) for x in (batch, batch.subagents))
        starts = [len(stream.prompt.tokens) for stream in streams[: len(own)]] + [0] * 9
        rows = [*zip([*own, *whole[trained]], starts, strict=False)]
        return np.stack([np.pad(row, (start, 128))[:128] for row, start in rows])

    values = {name: both(name) for name in ("advantages", "reference_log_probs", "structural")}
    return jax.tree.map(jax.numpy.asarray, dataclasses.replace(one, **values))


CORRECTED = (
    *("objective.correction.weights=geometric", "objective.correction.beyond=truncate"),
    *("objective.correction.floor=0.046", "objective.correction.reject=product"),
    "objective.correction.reject_floor=1e-8",
)


@pytest.mark.parametrize(
    "more",
    [["objective.aggregation=token"], ["objective.aggregation=sequence"], CORRECTED],
    ids=["token", "sequence", "corrected"],
)
def test_gradient_is_that_of_the_same_rows_trained_as_main_rows(more):
    """A sequence is a rollout or a sub-agent, also where several stand in one row."""
    more = *more, "objective.kl_weight=0.1"
    own, params, batch = made_batch(*more)
    together = moved(own, params, batch)
    alone = configured(*SETTINGS, *more, "rl.subagent_credit=none", "rl.prompts_per_step=1")
    # Eight rows that share nothing, in one micro-batch.
    plain = learner(alone, POLICY)
    step = dataclasses.replace(plain.whole, micro_batches=1, group_size=None)
    plain = Learner(step, plain.settings, plain.batches, plain.advantages, REFERENCE)
    assert_same(together, moved(plain, params, as_one_batch(batch)))
    assert (0 < together[1]["correction/rejected_sequences"] < 1) == (CORRECTED[0] in more)
    assert (together[1]["correction/truncated"] > 0) == (CORRECTED[0] in more)
    without = dataclasses.replace(batch, subagents=None)
    assert moved(own, params, without)[0] != pytest.approx(together[0], rel=1e-3)


def test_micro_batches_and_the_mesh_change_nothing():
    whole, mesh = (*CORRECTED, "rl.micro_groups=2"), "data:2,fsdp:2,tensor:2"
    alone = moved(*made_batch(*whole))
    assert_same(moved(*made_batch(*CORRECTED)), alone)
    assert_same(moved(*made_batch(*whole, mesh=mesh), mesh=mesh), alone, rtol=1e-4)


def test_idle_rows_change_nothing():
    own, params, batch = made_batch()
    rows = 2 * rows_per_group(3, 2)
    host = learner_batch(
        subagent_streams(groups(), rows),
        length=192,
        pad_id=PAD,
        frames=6,
        frame_patches=SPEC.max_patches,
    )
    wider = to_mesh(host, make_mesh(parse_mesh("data:1", 1), jax.devices()[:1]))
    wide = own.with_reference(params, dataclasses.replace(batch, subagents=wider))
    wide = own.advantages(groups(), wide)
    assert wide.subagents.tokens.shape == (2 * rows, 192)
    assert_same(moved(own, params, wide), moved(own, params, batch), rtol=1e-4)


def test_advantages_by_hand():
    episodes = np.array([2.0, -1.0, -3.0, 1.0])
    full = subagent_advantages(groups(), episodes, 4, "full")
    assert full.tolist() == [2, 2, 2, 0, -3, 0, 0, 0]
    share = subagent_advantages(groups(), episodes, 4, "share")
    np.testing.assert_allclose(share, [2 / 3, 2 / 3, 2 / 3, 0, -3, 0, 0, 0], rtol=1e-6)


def test_each_generated_token_of_a_sub_agent_gets_its_episodes_advantage():
    """The release gave them the one of a prompt token, which is 0, and masks shifted by one."""
    _, _, batch = made_batch("objective.anchor=sequence")
    crops, unit = batch.subagents, 0.5**0.5
    weights = np.asarray(crops.loss_weights)
    tokens = np.asarray(crops.tokens)
    said = [bytes(row[own > 0].tolist()) for row, own in zip(tokens, weights, strict=True)]
    assert said == [b"a car", b"rain", b"no", b"", b"a longer report", b"", b"", b""]
    signs = np.array([1, 1, 1, 0, -1, 0, 0, 0])[:, None]
    np.testing.assert_allclose(crops.advantages, signs * unit * weights, rtol=1e-3)
    assert (np.asarray(crops.reference_log_probs)[weights > 0] < 0).all()
    np.testing.assert_array_equal(np.asarray(crops.behaviour_log_probs) != 0, weights > 0)


def test_whitening_is_over_main_agents_and_sub_agents_together():
    _, _, batch = made_batch("advantages.whiten_tokens=true")
    values = [
        np.asarray(rows.advantages)[np.asarray(rows.loss_weights) > 0]
        for rows in (batch, batch.subagents)
    ]
    together = np.concatenate(values)
    assert together.mean() == pytest.approx(0, abs=1e-6)
    assert together.std(ddof=1) == pytest.approx(1, rel=1e-4)
    assert abs(values[1].mean()) > 0.01


def test_minibatches_take_sub_agents_with_their_rollouts():
    _, _, batch = made_batch()
    for index in range(2):
        part = minibatch(batch, index, count=2, group_size=2)
        np.testing.assert_array_equal(part.tokens, batch.tokens[index : index + 1])
        own = batch.loss_weights[2 * index : 2 * index + 2]
        np.testing.assert_array_equal(part.loss_weights, own)
        own = batch.subagents.tokens[4 * index : 4 * index + 4]
        np.testing.assert_array_equal(part.subagents.tokens, own)


def test_a_step_prepares_a_batch_and_updates():
    """On the same rollouts, to the bit; the metrics are those of both."""
    own = learner(configured(*SETTINGS, "rl.minibatches=2"), POLICY, reference=REFERENCE)

    def fresh():
        return as_state(jax.tree.map(lambda x: x + 0, POLICY.init()))

    batch, prepared = own.prepare(fresh(), groups())
    want, learned = own.update(fresh(), batch)
    got, metrics = own.step(fresh(), groups())
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert int(got.step) == len(learned) == 2
    assert metrics == prepared | mean_metrics(learned) and "kl" in metrics


def test_a_metric_alone_measures_the_reference_now_and_then_and_a_resume_at_the_same_steps():
    config = configured(*SETTINGS, "objective.kl_weight=0", "rl.reference_every=2")

    def steps(state, count, known=None):
        own, told = learner(config, POLICY, reference=REFERENCE), []
        own.set_state(known)
        for _ in range(count):
            state, metrics = own.step(state, groups())
            told.append(metrics)
        return state, told, json.loads(json.dumps(own.get_state()))

    def fresh():
        return as_state(jax.tree.map(lambda x: x + 0, POLICY.init()))

    _, whole, _ = steps(fresh(), 3)
    state, _, known = steps(fresh(), 1)
    _, resumed, _ = steps(state, 2, known)
    assert whole[0]["kl"] == whole[1]["kl"] != whole[2]["kl"] > 0
    assert resumed == whole[1:]


def test_a_batch_without_sub_agents_has_none():
    own = learner(configured(*SETTINGS), POLICY)
    bare = [
        dataclasses.replace(
            g, trajectories=tuple(dataclasses.replace(t, subagents=()) for t in g.trajectories)
        )
        for g in groups()
    ]
    batch, metrics = own.batches(POLICY.init(), bare)
    assert batch.subagents is None and metrics["subagents/rows"] == 0


def test_few_shapes_known_beforehand():
    assert possible_rows(calls=4, group_size=8) == [0, 8, 16, 24, 32]
    found = {rows_per_group(most, 8) for most in range(8 * 15 + 1)}
    assert found == set(possible_rows(15, 8)) and len(found) == 9


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["rl.subagent_credit=half"], "none, full or share"),
        (["rl.subagent_credit=full"], "subagent_sampling.temperature"),
        (["rl.subagent_credit=full", "agent.evidence=frames"], "agent.evidence"),
        (["rl.subagent_credit=share", "agent.max_tool_rounds=0"], "max_tool_rounds"),
        (
            [
                "rl.subagent_credit=full",
                "agent.subagent_sampling.temperature=1",
                "objective.surrogate=regression",
                "objective.behaviour_cap=none",
                "rl.epochs=2",
            ],
            "regression",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        override(get_recipe("needle_rl"), settings)
