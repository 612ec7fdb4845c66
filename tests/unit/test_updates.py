"""Several optimiser steps on one batch of rollouts: what the learner adds to the objective.

The policy is a bigram table, so that every step can be done again by hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paravt_jax.advantages import kl_to_go, rollout_advantages, whiten
from paravt_jax.corrections import CorrectionConfig
from paravt_jax.mesh import HOST, make_mesh, on_host, parse_mesh
from paravt_jax.objectives import ObjectiveConfig, policy_loss
from paravt_jax.records import LearnerBatch, Prompt, RolloutGroup, Row, Trajectory, VideoRef
from paravt_jax.structure import tag_table
from pipelines.preprocess import SPECS
from train.batch import to_mesh
from train.compile.footprint import local_bytes
from train.compile.rehearsal import rehearse_step
from train.config import Config
from train.recipes import get_recipe
from train.rl.learner import Learner
from train.rl.settings import RlSettings
from train.setup import batch_shapes, open_learner
from train.state import TrainState
from train.step import RlStep, mean_metrics, minibatch

pytestmark = pytest.mark.slow

PROMPTS, GROUP, TOKENS, VOCAB = 4, 2, 12, 16
ROWS = PROMPTS * GROUP
ALONE = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])


class Bigram:
    """Logits of a token that depend on the one before it alone."""

    experts_per_token = 0

    def encode(self, params, patches, grids):
        raise AssertionError("these batches show no frames")

    def hidden_and_router(self, params, tokens, *context):
        return params["table"][tokens], None

    def head(self, params):
        return lambda hidden: hidden


def weights():
    return {"table": jnp.asarray(np.random.default_rng(9).normal(size=(VOCAB, VOCAB)), jnp.float32)}


def plain_log_probs(params, tokens, temperature):
    logits = jax.nn.log_softmax(params["table"][tokens[:, :-1]] / temperature)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(picked, [(0, 0), (1, 0)])


def random_batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS)).astype(np.int32)
    lengths = rng.integers(6, TOKENS + 1, ROWS).astype(np.int32)
    places = np.arange(TOKENS)
    mask = ((places >= 3) & (places < lengths[:, None])).astype(np.float32)
    behaviour = np.asarray(plain_log_probs(weights(), tokens, 0.7)) * mask
    noise = rng.normal(size=(2, ROWS, TOKENS)).astype(np.float32)
    return LearnerBatch(
        tokens=tokens,
        positions=np.zeros((ROWS, TOKENS, 3), np.int32),
        vision_index=np.full((ROWS, TOKENS), -1, np.int32),
        lengths=lengths,
        loss_weights=mask,
        behaviour_log_probs=behaviour,
        reference_log_probs=behaviour + 0.1 * noise[0] * mask,
        advantages=noise[1] * mask,
        structural=np.zeros((ROWS, TOKENS), bool),
        patches=None,
        grids=None,
        features=None,
    )


def configure(objective=ObjectiveConfig(), **rl) -> Config:
    base = get_recipe("needle_rl")
    agent = dataclasses.replace(
        base.agent,
        turn_tokens=TOKENS,
        sampling=dataclasses.replace(base.agent.sampling, temperature=0.7),
    )
    sizes = {"prompts_per_step": PROMPTS, "group_size": GROUP, "micro_groups": 1, **rl}
    return dataclasses.replace(base, agent=agent, objective=objective, rl=RlSettings(**sizes))


def rate(objective):
    """Steps that clip some tokens, and leave the regression near its first steep descent."""
    return 0.1 if objective.surrogate == "regression" else 30.0


def learner(config, optimizer=None):
    tags, shapes = tag_table([b"a"] * VOCAB), batch_shapes(config, SPECS["image"](16, 2, 2), 0)
    optimizer = optimizer or optax.sgd(rate(config.objective))
    return open_learner(config, Bigram(), optimizer, ALONE, tags, shapes, weights())


def fresh():
    params = weights()
    return TrainState(params, {}, optax.sgd(1.0).init(params), jnp.zeros((), jnp.int32))


CLIPPED = ObjectiveConfig(clip_low=0.1, clip_high=0.3, dual_clip=2.0, kl_weight=0.05)
REGRESSION = ObjectiveConfig(surrogate="regression", ratio="trajectory", aggregation="sequence")
BYPASS = dataclasses.replace(
    CLIPPED,
    correction=CorrectionConfig(
        proximal="sampler", reject="geometric", reject_floor=0.6, reject_cap=1.5
    ),
)


def by_hand(objective, epochs, shares):
    """The same optimiser steps without micro-batches, and the share of clipped tokens."""
    params, batch = weights(), jax.tree.map(jnp.asarray, random_batch())
    proximal = plain_log_probs(params, batch.tokens, 0.7)
    clipped = trained = 0.0

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def slope_of(params, chosen):
        log_probs = plain_log_probs(params, batch.tokens, 0.7)
        before = log_probs if objective.correction.bypass else proximal
        total, count, seen = policy_loss(
            log_probs[chosen],
            before[chosen],
            batch.behaviour_log_probs[chosen],
            batch.advantages[chosen],
            batch.loss_weights[chosen],
            objective,
            batch.reference_log_probs[chosen],
            group_size=GROUP,
        )
        return total / count, seen

    for _ in range(epochs):
        for share in range(shares):
            chosen = np.arange(ROWS).reshape(PROMPTS, GROUP)[share::shares].reshape(-1)
            slope, seen = slope_of(params, chosen)
            clipped, trained = clipped + seen.clipped, trained + seen.tokens
            params = jax.tree.map(lambda w, g: w - rate(objective) * g, params, slope)
    return params["table"], clipped / trained


@pytest.mark.parametrize(
    ("objective", "sizes"),
    [
        (CLIPPED, (2, 2, 1)),
        (CLIPPED, (3, 1, 2)),
        (REGRESSION, (2, 2, 1)),
        (BYPASS, (2, 2, 1)),
    ],
    ids=["clip", "clip, whole batch", "regression", "bypass"],
)
def test_every_optimiser_step_is_the_one_by_hand(objective, sizes):
    """Proximal policy, order of shares, micro-batches within a share (law 5), and the metrics.

    `sizes`: epochs, shares of the batch, groups of a micro-batch.
    """
    epochs, shares, micro_groups = sizes
    settings = {"epochs": epochs, "minibatches": shares, "micro_groups": micro_groups}
    config = configure(objective, **settings)
    after, learned = learner(config).update(fresh(), to_mesh(random_batch(), ALONE))
    table, clip_fraction = by_hand(objective, epochs, shares)
    np.testing.assert_allclose(after.params["table"], table, rtol=1e-4, atol=1e-4)
    assert int(after.step) == len(learned) == config.rl.updates
    seen = mean_metrics(learned)
    assert seen["clip_fraction"] == pytest.approx(float(clip_fraction), abs=1e-6)
    assert (seen["clip_fraction"] > 0.05) == (objective is not REGRESSION)
    assert (seen["correction/rejected"] > 0) == (objective is BYPASS)
    assert seen["loss"] == pytest.approx(np.mean([m["loss"] for m in learned]), rel=1e-5)


@pytest.mark.parametrize("objective", [CLIPPED, REGRESSION], ids=["clip", "regression"])
def test_a_rehearsed_update_leaves_the_state_as_it_was(objective):
    """Weights, moments that are not 0, and the count of steps; weight decay would move weights."""
    optimizer = optax.adamw(0.1, weight_decay=0.1)
    own = learner(configure(objective, epochs=2, minibatches=2), optimizer)
    # This policy sees no frames, of which blank rollouts have one: the batch comes ready-made.
    own.prepare = lambda state, groups: (to_mesh(random_batch(1), ALONE), {})
    state = dataclasses.replace(fresh(), optimizer=optimizer.init(weights()))
    state, _ = own.update(state, to_mesh(random_batch(), ALONE))
    given = jax.tree.map(jnp.copy, state)  # it is donated
    with jax.debug_nans(True):
        after = rehearse_step(own, given, [])
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert int(after.step) == 4


def test_one_step_per_batch_never_clips():
    _, (metrics,) = learner(configure()).update(fresh(), to_mesh(random_batch(), ALONE))
    assert float(metrics["objective"].clipped) == 0
    np.testing.assert_allclose(metrics["objective"].ratio, metrics["objective"].tokens)


def test_ratios_to_the_sampler_take_no_forward_pass_of_their_own():
    """And what is kept of every token is what the learner found before it first learned from it."""
    own = learner(configure(BYPASS, epochs=2, minibatches=2))
    step = dataclasses.replace(own.whole, micro_batches=2, keeps_log_probs=True)
    own = Learner(step, own.settings, own.batches, own.advantages, weights())
    own._log_probs = None
    batch, params = to_mesh(random_batch(), ALONE), weights()
    own.update(fresh(), batch)
    found = np.asarray(own.of_tokens.log_probs)
    before = np.asarray(plain_log_probs(params, random_batch().tokens, 0.7))
    trained = random_batch().loss_weights > 0
    first, second = (np.arange(ROWS) // GROUP % 2 == share for share in (0, 1))
    np.testing.assert_allclose(
        found[first][trained[first]], before[first][trained[first]], rtol=1e-5
    )
    assert np.abs(found - before)[second][trained[second]].max() > 1e-3


EVERY = [
    ObjectiveConfig(aggregation="sequence", ratio="sequence", kl_weight=0.1),
    ObjectiveConfig(aggregation="constant", constant_length=TOKENS),
    CLIPPED,
    REGRESSION,
    BYPASS,
]


@pytest.mark.parametrize("objective", EVERY)
def test_no_objective_depends_on_micro_batching(objective):
    """With a proximal policy that is not the current one."""
    batch = random_batch()
    batch = dataclasses.replace(batch, proximal_log_probs=batch.behaviour_log_probs * 1.3)

    def learn(micro_batches):
        step = RlStep(
            *(Bigram(), optax.sgd(1.0), objective, 0.7, micro_batches, TOKENS), group_size=GROUP
        )
        state, metrics = jax.jit(step)(fresh(), to_mesh(batch, ALONE))
        return state.params["table"], metrics["loss"], metrics["objective"].means()

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), learn(4), learn(1))


def test_shares_hold_every_group_once_and_stay_spread_over_the_mesh():
    mesh = make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8))
    batch = dataclasses.replace(random_batch(), lengths=np.arange(ROWS, dtype=np.int32))
    with jax.set_mesh(mesh):
        share = jax.jit(minibatch, static_argnums=(2, 3))
        shares = [share(to_mesh(batch, mesh), index, 2, GROUP) for index in range(2)]
    assert [s.lengths.tolist() for s in shares] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    np.testing.assert_array_equal(shares[1].tokens, batch.tokens[[2, 3, 6, 7]])
    assert all(s.tokens.sharding.shard_shape((4, TOKENS)) == (1, TOKENS) for s in shares)


def scored_groups(rewards):
    none = np.zeros(0, np.int32)
    row = Row("0", VideoRef("v.mp4", 8.0), "What?", "red", "oe")

    def rollout(total):
        values = {"total": total, "task": total, "anchor": 0.0}
        prompt, log_probs = Prompt(none, none.reshape(0, 3), none), none.astype(np.float32)
        return Trajectory(prompt, none, none > 0, log_probs, (), "", "", rewards=values)

    return [RolloutGroup(row, 4, tuple(map(rollout, group))) for group in rewards]


def test_kl_in_the_reward_and_whitening_are_those_of_the_release():
    """Equations 1-7 of the release, settings as in its `_base.yaml`."""
    config = configure()
    settings = dataclasses.replace(
        config.advantages,
        **{"reward_scale": 10.0, "reward_bias": -0.2, "reward_clip": 20.0},
        **{"kl_weight": 0.01, "whiten_tokens": True},
    )
    config = dataclasses.replace(config, advantages=settings)
    rewards, batch = np.random.default_rng(3).random((PROMPTS, GROUP)) * 2, random_batch()
    got = learner(config).advantages(scored_groups(rewards.tolist()), to_mesh(batch, ALONE))
    generated = batch.loss_weights > 0
    normalised = rollout_advantages(rewards, settings).reshape(-1, 1).astype(np.float32)
    paid = kl_to_go(generated, batch.behaviour_log_probs, batch.reference_log_probs)
    want = whiten(normalised * generated - 0.01 * paid, generated)
    np.testing.assert_allclose(got.advantages, want, rtol=1e-5, atol=1e-6)
    plain = learner(configure()).advantages(scored_groups(rewards.tolist()), to_mesh(batch, ALONE))
    assert np.abs(got.advantages - plain.advantages).max() > 1e-3


def test_easy_groups_weigh_less():
    config = configure()
    settings = dataclasses.replace(config.advantages, difficulty_weighted=True)
    weighted = dataclasses.replace(config, advantages=settings)
    groups = scored_groups([[0.0, 1.0], [2.0, 3.0], [1.0, 2.0], [0.5, 0.5]])
    batch = to_mesh(random_batch(), ALONE)
    parts = [learner(c).advantages(groups, batch).advantages for c in (weighted, config)]
    scale = np.repeat([1.0, 0.5, 0.75, 1.0], GROUP)[:, None]
    np.testing.assert_allclose(parts[0], scale * parts[1], rtol=1e-6)


def test_the_schedule_counts_optimiser_steps():
    config = configure(CLIPPED, epochs=3, minibatches=2)
    assert config.optimizer_steps == 6 * config.steps
    sft = get_recipe("needle_sft")
    assert sft.optimizer_steps == sft.steps


@pytest.mark.parametrize(
    ("objective", "rl", "named"),
    [
        (ObjectiveConfig(surrogate="soft"), {}, "objective.surrogate=soft"),
        (REGRESSION, {}, "set rl.epochs or rl.minibatches"),
        (ObjectiveConfig(), {"overlong_limit": 900, "overlong_margin": 8}, "at most 44 tokens"),
    ],
)
def test_settings_that_cannot_act_are_refused(objective, rl, named):
    with pytest.raises(ValueError, match=named):
        configure(objective, **rl)


def test_a_reference_on_the_host_measures_the_same():
    """It stays there, and leaves the devices' memory to others."""
    own = learner(configure())
    blank = to_mesh(random_batch(), ALONE)
    reference = jax.device_put(weights(), NamedSharding(ALONE, PartitionSpec()))
    found = []
    for kept in (reference, on_host(reference)):
        own._reference = kept
        found.append(own.with_reference({}, blank).reference_log_probs)
    np.testing.assert_array_equal(*found)
    assert np.any(found[0])
    assert {x.sharding.memory_kind for x in kept.values()} == {HOST}
    assert local_bytes(kept) == 0 < local_bytes(reference)


class Replaying(Bigram):
    """Logits that tell whether routing is replayed."""

    def hidden_and_router(self, params, tokens, *context):
        hidden, routers = super().hidden_and_router(params, tokens)
        return hidden if context[-1] is None else 2 * hidden, routers


def test_the_reference_replays_too():
    """Law 3: with the weights of now it says what the policy says."""
    config, plain = configure(), jax.tree.map(jnp.asarray, random_batch())
    tags, shapes = tag_table([b"a"] * VOCAB), batch_shapes(config, SPECS["image"](16, 2, 2), 0)
    noted = dataclasses.replace(plain, routing=jnp.zeros((ROWS, TOKENS, 4), jnp.int8))
    own = open_learner(config, Replaying(), optax.sgd(1.0), ALONE, tags, shapes, weights())
    found = own.with_reference({}, noted).reference_log_probs
    np.testing.assert_allclose(found, own.whole.log_probs(weights(), noted), rtol=1e-6)
    assert np.abs(found - own.with_reference({}, plain).reference_log_probs).max() > 0.1
