"""The learning half of an RL step, as jitted functions of one compiled shape per batch length."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from paravt_jax.interfaces import Policy
from paravt_jax.records import LearnerBatch, RolloutGroup
from paravt_jax.structure import TagTable, structural_mask
from train.advantages import rollout_advantages
from train.batch import learner_batch, streams_of_groups
from train.config import Config
from train.layout import to_mesh
from train.state import FlatParams, TrainState
from train.step import RlStep, batch_log_probs

LENGTH_STEP = 128
"""Streams are padded to a multiple of this, so that few shapes are compiled."""


class Learner:
    """Turns rollouts into one optimiser step."""

    def __init__(self, policy: Policy, config: Config, mesh: Mesh, tags: TagTable, pad_id: int):
        agent = config.agent
        self._config, self._mesh, self._pad_id = config, mesh, pad_id
        self._budget = agent.max_tool_rounds * agent.turn_tokens + max(
            agent.turn_tokens, agent.answer_tokens
        )
        step = RlStep(
            policy=policy,
            optimizer=optimizer,
            objective=config.objective,
            temperature=agent.sampling.temperature,
            micro_batches=config.rl.prompts_per_step // config.rl.micro_groups,
            budget=self._budget,
        )
        self._step = jax.jit(step, donate_argnums=0)
        self._encode = jax.jit(policy.encode)
        self._log_probs = jax.jit(
            lambda params, batch: batch_log_probs(
                policy, params, batch, temperature=step.temperature, budget=self._budget
            )[0]
        )
        self._structure = jax.jit(lambda tokens: structural_mask(tokens, tags))

    def batch(self, params: FlatParams, groups: Sequence[RolloutGroup]) -> LearnerBatch:
        """Device batch of all rollouts: streams, advantages, and vision features seen once."""
        advantages = rollout_advantages(groups, self._config)
        streams = streams_of_groups(groups, advantages.task)
        longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
        host = learner_batch(
            streams,
            length=-(-longest // LENGTH_STEP) * LENGTH_STEP,
            pad_id=self._pad_id,
            group_size=self._config.rl.group_size,
            frames=max(self._config.data.frame_budgets),
        )
        batch = to_mesh(host, self._mesh)
        structural = self._structure(batch.tokens) & (batch.loss_weights > 0)
        anchored = batch.advantages + structural * to_mesh(advantages.anchor, self._mesh)[:, None]
        features = self._encode(params, batch.patches, batch.grids)
        return batch.replace(
            structural=structural,
            advantages=anchored,
            features=features,
            patches=None,
            grids=None,
        )

    def log_probs(self, params: FlatParams, batch: LearnerBatch) -> Float[Array, "b t"]:
        """Log-probabilities of the generated tokens under other weights (the reference's)."""
        return self._log_probs(params, batch)

    def step(
        self, state: TrainState, batch: LearnerBatch
    ) -> tuple[TrainState, dict[str, Array]]:
        """One optimiser step; `state` is donated."""
        return self._step(state, batch)
