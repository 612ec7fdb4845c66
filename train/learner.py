"""The learning half of an RL step, as jitted functions of one compiled shape per batch length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.advantages import anchored_advantages, kl_to_go, rollout_advantages, whiten
from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.records import LearnerBatch, RolloutGroup
from paravt_jax.structure import TagTable, anchor_tags, structural_tokens, tag_mask
from pipelines.preprocess import FrameSpec
from train.batch import Stream, learner_batch, spoken_mask, streams_of_groups
from train.config import Config, generated_budget
from train.layout import to_mesh
from train.state import FlatParams, TrainState
from train.step import Metrics, RlStep, minibatch

LENGTH_STEP, LENGTHS = 64, 4
"""Streams are padded to quarters of the longest, rounded up to a multiple of this."""


def rl_step(
    policy: TrainablePolicy, optimizer: optax.GradientTransformation, config: Config
) -> RlStep:
    """The train step of a configuration, not yet compiled: for one minibatch."""
    rl = config.rl
    return RlStep(
        policy=policy,
        optimizer=optimizer,
        objective=config.objective,
        temperature=config.agent.sampling.temperature,
        micro_batches=rl.prompts_per_step // (rl.minibatches * rl.micro_groups),
        budget=generated_budget(config),
        router_balance=config.model.router_balance,
        group_size=rl.group_size,
    )


class Learner:
    """Turns rollouts into optimiser steps."""

    def __init__(
        self,
        policy: TrainablePolicy,
        optimizer: optax.GradientTransformation,
        config: Config,
        mesh: Mesh,
        tags: TagTable,
        pad_id: int,
        spec: FrameSpec,
        longest: int = 0,
    ):
        """`longest`: most tokens of a stream, its prompt included, if that is known."""
        self.lengths = static_lengths(longest)
        self._config, self._mesh, self._tags = config, mesh, tags
        self._pad_id, self._spec = pad_id, spec
        step = rl_step(policy, optimizer, config)
        self.step = jax.jit(step, donate_argnums=0)
        """`(state, batch) -> (state, metrics)`: one optimiser step; `state` is donated."""
        self._encode = jax.jit(policy.encode)
        shares = config.rl.minibatches
        whole = dataclasses.replace(step, micro_batches=step.micro_batches * shares)
        self._log_probs = jax.jit(whole.log_probs)
        self._share = jax.jit(
            functools.partial(minibatch, count=shares, group_size=config.rl.group_size)
        )
        self._find_tags = jax.jit(find_tags, static_argnames=("anchors", "only_paired"))
        self.figures: dict[str, float] = {}
        """What the tags of the last batch looked like, for `metrics.jsonl`."""

    def batch(self, params: FlatParams, groups: Sequence[RolloutGroup]) -> LearnerBatch:
        """Device batch of all rollouts: streams, structure, and vision features seen once."""
        batch = self.padded(
            streams_of_groups(groups, self._config.rl.mask_over_turn), len(groups[0].trajectories)
        )
        generated = batch.loss_weights > 0
        structural, validity = self._find_tags(
            batch.tokens,
            to_mesh(spoken_mask(groups, batch.tokens.shape[1]), self._mesh),
            generated,
            self._tags,
            anchors=anchor_tags(self._config.agent.call_syntax),
            only_paired=self._config.objective.anchor_paired_only,
        )
        self.figures = figures([{"format/tag_validity": validity}])
        return dataclasses.replace(
            batch,
            structural=structural,
            features=self._encode(params, batch.patches, batch.grids),
            patches=None,
            grids=None,
        )

    def padded(self, streams: Sequence[Stream], group_size: int) -> LearnerBatch:
        """Streams on the mesh, their frames as patches, in one of few lengths."""
        longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
        host = learner_batch(
            streams,
            length=static_length(longest, self.lengths),
            pad_id=self._pad_id,
            group_size=group_size,
            frames=self._spec.group_count(max(self._config.data.frame_budgets)),
            frame_patches=self._spec.max_patches,
        )
        return to_mesh(host, self._mesh)

    def with_reference(self, params: FlatParams, batch: LearnerBatch) -> LearnerBatch:
        """The batch with the log-probabilities of the reference policy filled in."""
        return dataclasses.replace(batch, reference_log_probs=self._log_probs(params, batch))

    def with_advantages(self, groups: Sequence[RolloutGroup], batch: LearnerBatch) -> LearnerBatch:
        """The batch with the advantage of every generated token filled in: from the rewards of its
        group, less the divergence from the reference, normalised over the batch, as configured."""
        config, generated = self._config.advantages, batch.loss_weights > 0
        advantages = self._anchored(groups, batch.structural, generated)
        if config.kl_weight:
            policies = batch.behaviour_log_probs, batch.reference_log_probs
            advantages -= config.kl_weight * kl_to_go(generated, *policies, config.kl_estimator)
        if config.whiten_tokens:
            advantages = whiten(advantages, generated, config.eps)
        return dataclasses.replace(batch, advantages=advantages)

    def _anchored(
        self, groups: Sequence[RolloutGroup], structural: Array, generated: Array
    ) -> Array:
        """Advantage per token. With the anchor at positions, its share acts on tags only."""
        positional = self._config.objective.anchor == "position"
        weight = self._config.rewards.anchor_share
        return anchored_advantages(
            self._normalised(groups, "task" if positional else "total"),
            self._normalised(groups, "anchor"),
            structural,
            generated,
            weight if positional else 0.0,
        )

    def _normalised(self, groups: Sequence[RolloutGroup], term: str) -> np.ndarray:
        """Advantages of one reward term, float32 `[b]`."""
        rewards_P_G, total_P_G = (
            np.array([[t.rewards[name] for t in g.trajectories] for g in groups])
            for name in (term, "total")
        )
        advantages = rollout_advantages(rewards_P_G, self._config.advantages, total_P_G)
        return advantages.reshape(-1).astype(np.float32)

    def update(self, state: TrainState, batch: LearnerBatch) -> tuple[TrainState, list[Metrics]]:
        """All optimiser steps of a batch and the figures of each; `state` is donated.

        `rl.epochs` times over `rl.minibatches` shares of the batch. Ratios are to the policy before
        the first step, whose log-probabilities are computed once, so that clips can act.
        """
        rl, learned = self._config.rl, []
        if rl.updates > 1:
            proximal = self._log_probs(state.params, batch)
            batch = dataclasses.replace(batch, proximal_log_probs=proximal)
        for number in range(rl.updates):
            share = batch if rl.minibatches == 1 else self._share(batch, number % rl.minibatches)
            state, metrics = self.step(state, share)
            learned.append(metrics)
        return state, learned


def static_lengths(longest: int) -> list[int]:
    """The few lengths that batches are padded to."""
    parts = {-(-longest * part // (LENGTHS * LENGTH_STEP)) for part in range(1, LENGTHS + 1)}
    return [part * LENGTH_STEP for part in sorted(parts) if part]


def static_length(longest: int, lengths: Sequence[int]) -> int:
    """The first of `lengths` that holds the longest stream; beyond them, a multiple of the step."""
    fitting = [length for length in lengths if length >= longest]
    return fitting[0] if fitting else -(-longest // LENGTH_STEP) * LENGTH_STEP


def find_tags(
    tokens: Int[Array, "b t"],
    spoken: Bool[Array, "b t"],
    generated: Bool[Array, "b t"],
    table: TagTable,
    anchors: tuple[str, ...],
    only_paired: bool,
) -> tuple[Bool[Array, "b t"], Float[Array, ""]]:
    """Where the anchor may act, and which share of all spoken tags belongs to a pair.

    A forced tag pairs with a generated one, but nothing acts on it: the policy did not choose it.
    """
    found = structural_tokens(tokens, table, spoken)
    anchored = tag_mask(found, table, anchors, only_paired) & generated
    return anchored, found.paired.sum() / jnp.maximum(found.counts.sum(), 1)


def figures(learned: Sequence[Metrics]) -> dict[str, float]:
    """Figures of optimiser steps as plain numbers: the objective's over all their tokens, any other
    as the mean of the steps."""
    steps = jax.device_get(list(learned))
    watched = [step.pop("objective") for step in steps if "objective" in step]
    means = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
    if watched:
        totals = functools.reduce(lambda a, b: a.merge(b), watched)
        means |= {name: float(value) for name, value in totals.means().items()}
    return means
