"""The learning half of an RL step, as jitted functions of one compiled shape per batch length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.advantages import anchored_advantages, rollout_advantages
from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.records import LearnerBatch, RolloutGroup
from paravt_jax.structure import TagTable, anchor_tags, structural_tokens, tag_mask
from pipelines.preprocess import FrameSpec
from train.batch import Stream, learner_batch, spoken_mask, streams_of_groups
from train.config import Config
from train.layout import to_mesh
from train.state import FlatParams
from train.step import RlStep

LENGTH_STEP = 64
"""Streams are padded to a multiple of this, so that few shapes are compiled."""


def generated_budget(config: Config) -> int:
    """Most tokens that one rollout can generate."""
    agent = config.agent
    return agent.rounds * agent.turn_tokens + agent.answer_tokens


def rl_step(
    policy: TrainablePolicy, optimizer: optax.GradientTransformation, config: Config
) -> RlStep:
    """The train step of a configuration, not yet compiled."""
    return RlStep(
        policy=policy,
        optimizer=optimizer,
        objective=config.objective,
        temperature=config.agent.sampling.temperature,
        micro_batches=config.rl.prompts_per_step // config.rl.micro_groups,
        budget=generated_budget(config),
        router_balance=config.model.router_balance,
    )


class Learner:
    """Turns rollouts into one optimiser step."""

    def __init__(
        self,
        policy: TrainablePolicy,
        optimizer: optax.GradientTransformation,
        config: Config,
        mesh: Mesh,
        tags: TagTable,
        pad_id: int,
        spec: FrameSpec,
    ):
        self._config, self._mesh, self._tags = config, mesh, tags
        self._pad_id, self._spec = pad_id, spec
        step = rl_step(policy, optimizer, config)
        self.step = jax.jit(step, donate_argnums=0)
        """`(state, batch) -> (state, metrics)`: one optimiser step; `state` is donated."""
        self._encode = jax.jit(policy.encode)
        self._log_probs = jax.jit(step.log_probs)
        self._find_tags = jax.jit(find_tags, static_argnames=("anchors", "only_paired"))
        self.figures: dict[str, float] = {}
        """What the tags of the last batch looked like, for `metrics.jsonl`."""

    def batch(self, params: FlatParams, groups: Sequence[RolloutGroup]) -> LearnerBatch:
        """Device batch of all rollouts: streams, advantages, and vision features seen once."""
        batch = self.padded(streams_of_groups(groups), len(groups[0].trajectories))
        generated = batch.loss_weights > 0
        structural, validity = self._find_tags(
            batch.tokens,
            to_mesh(spoken_mask(groups, batch.tokens.shape[1]), self._mesh),
            generated,
            self._tags,
            anchors=anchor_tags(self._config.agent.call_syntax),
            only_paired=self._config.objective.anchor_paired_only,
        )
        self.figures = figures({"format/tag_validity": validity})
        return dataclasses.replace(
            batch,
            structural=structural,
            advantages=self._advantages(groups, structural, generated),
            features=self._encode(params, batch.patches, batch.grids),
            patches=None,
            grids=None,
        )

    def padded(self, streams: Sequence[Stream], group_size: int) -> LearnerBatch:
        """Streams on the mesh, their frames as patches, in one of few lengths."""
        longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
        host = learner_batch(
            streams,
            length=-(-longest // LENGTH_STEP) * LENGTH_STEP,
            pad_id=self._pad_id,
            group_size=group_size,
            frames=self._spec.group_count(max(self._config.data.frame_budgets)),
            frame_patches=self._spec.max_patches,
        )
        return to_mesh(host, self._mesh)

    def _advantages(
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
        rewards_P_G = np.array([[t.rewards[term] for t in g.trajectories] for g in groups])
        advantages = rollout_advantages(rewards_P_G, self._config.advantages)
        return advantages.reshape(-1).astype(np.float32)

    def with_reference(self, params: FlatParams, batch: LearnerBatch) -> LearnerBatch:
        """The batch with the log-probabilities of the reference policy filled in."""
        return dataclasses.replace(batch, reference_log_probs=self._log_probs(params, batch))


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


def figures(metrics: Mapping[str, Array]) -> dict[str, float]:
    """Device metrics as plain numbers."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
