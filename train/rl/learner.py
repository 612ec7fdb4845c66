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
from jaxtyping import Array

from paravt_jax.advantages import anchored_advantages, kl_to_go, rollout_advantages, whiten
from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.records import LearnerBatch, RolloutGroup
from paravt_jax.structure import TagTable
from pipelines.preprocess import FrameSpec
from rollout.engine.sampler import SamplingConfig
from train.batch import Stream, learner_batch, streams_of_groups
from train.config import Config, generated_budget
from train.layout import to_mesh
from train.rl.anchor import Anchor
from train.rl.subagents import most_crops, rows_per_group, subagent_advantages, subagent_streams
from train.state import FlatParams, TrainState
from train.step import Metrics, RlStep, encode_parts, minibatch

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
        subagent_temperature=config.agent.subagent_sampling.temperature,
        subagent_budget=config.agent.subagent_tokens,
        penalty=config.agent.sampling.repetition_penalty,
        subagent_penalty=config.agent.subagent_sampling.repetition_penalty,
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
        subagent_length: int = 0,
        longest: int = 0,
        table: Array | None = None,
    ):
        """With `subagent_length`, the longest stream that a sub-agent can have, rows of sub-agents
        have one length in all batches; with `longest`, that of a main agent, theirs have few.
        `table` is that of the engine's automata, needed if a grammar constrains what it draws."""
        self.lengths = static_lengths(longest)
        self._config, self._mesh, self._pad_id = config, mesh, pad_id
        self._spec, self._subagent_length = spec, subagent_length
        self.table = table
        step = rl_step(policy, optimizer, config)
        self.step = jax.jit(step, donate_argnums=0)
        """`(state, batch, table) -> (state, metrics)`: one optimiser step; `state` is donated."""
        self._encode = jax.jit(policy.encode)
        shares = config.rl.minibatches
        whole = dataclasses.replace(step, micro_batches=step.micro_batches * shares)
        self._log_probs = jax.jit(whole.log_probs)
        self._subagent_log_probs = jax.jit(whole.of_subagents().log_probs)
        self._encode_parts = jax.jit(
            functools.partial(encode_parts, policy, count=whole.micro_batches)
        )
        self._share = jax.jit(
            functools.partial(minibatch, count=shares, group_size=config.rl.group_size)
        )
        self._anchor = Anchor(config, tags, mesh)
        self.figures: dict[str, float] = {}
        """What the tags of the last batch looked like, for `metrics.jsonl`."""

    def batch(self, params: FlatParams, groups: Sequence[RolloutGroup]) -> LearnerBatch:
        """Device batch of all rollouts: streams, structure, and vision features seen once."""
        streams = streams_of_groups(groups, self._config.rl.mask_over_turn)
        batch = self.padded(streams, len(groups[0].trajectories))
        structural, validity = self._anchor.positions(groups, batch)
        self.figures = figures([{"format/tag_validity": validity}])
        crops = self._subagent_streams(groups) if self._config.rl.trains_subagents else []
        self.figures |= token_shares([*streams, *crops])
        return dataclasses.replace(
            batch,
            structural=structural,
            features=self._encode(params, batch.patches, batch.grids),
            patches=None,
            grids=None,
            subagents=self._subagents(params, crops) if crops else None,
        )

    def _subagent_streams(self, groups: Sequence[RolloutGroup]) -> list[Stream]:
        """Rows of the sub-agents of all rollouts; none if there are none."""
        rows = rows_per_group(most_crops(groups), len(groups[0].trajectories))
        self.figures["subagents/rows"] = float(rows * len(groups))
        return subagent_streams(groups, rows, self._config.rl.mask_over_turn) if rows else []

    def _subagents(self, params: FlatParams, streams: Sequence[Stream]) -> LearnerBatch:
        frames = self._spec.group_count(self._config.data.crop_frames)
        sampling = self._config.agent.subagent_sampling
        batch = self.padded(streams, 1, frames, self._subagent_length, sampling)
        features = self._encode_parts(params, batch)
        return dataclasses.replace(batch, features=features, patches=None, grids=None)

    def padded(
        self,
        streams: Sequence[Stream],
        group_size: int,
        frames: int | None = None,
        length: int = 0,
        sampling: SamplingConfig | None = None,
    ) -> LearnerBatch:
        """Streams on the mesh, their frames as patches, in one of few lengths; at least `frames` in
        each group, by default those of the largest prompt, and at least `length` tokens. They were
        drawn by `sampling`, by default that of main agents."""
        budget = self._spec.group_count(max(self._config.data.frame_budgets))
        longest = max(length, *(len(s.prompt.tokens) + len(s.tokens) for s in streams))
        host = learner_batch(
            streams,
            length=static_length(longest, [] if length else self.lengths),
            pad_id=self._pad_id,
            group_size=group_size,
            frames=budget if frames is None else frames,
            frame_patches=self._spec.max_patches,
        )
        needed = with_what_shaped(host, sampling or self._config.agent.sampling)
        return to_mesh(needed, self._mesh)

    def with_reference(self, params: FlatParams, batch: LearnerBatch) -> LearnerBatch:
        """The batch with the log-probabilities of the reference policy filled in."""
        return self._with_log_probs("reference_log_probs", params, batch)

    def _with_log_probs(self, name: str, params: FlatParams, batch: LearnerBatch) -> LearnerBatch:
        """The batch, sub-agents included, with log-probabilities under some weights filled in."""
        batch = dataclasses.replace(batch, **{name: self._log_probs(params, batch, self.table)})
        if batch.subagents is None:
            return batch
        values = self._subagent_log_probs(params, batch.subagents, self.table)
        return dataclasses.replace(
            batch, subagents=dataclasses.replace(batch.subagents, **{name: values})
        )

    def with_advantages(self, groups: Sequence[RolloutGroup], batch: LearnerBatch) -> LearnerBatch:
        """The batch with the advantage of every generated token filled in: from the rewards of its
        group, less the divergence from the reference, normalised over the batch, as configured."""
        main = self._anchored(groups, batch)
        crops = batch.subagents
        if crops is None:
            (main,) = self._shaped([batch], [main])
            return dataclasses.replace(batch, advantages=main)
        episodes, rows = self._normalised(groups, self._term), len(crops.tokens) // len(groups)
        credit = self._config.rl.subagent_credit
        earned = subagent_advantages(groups, episodes, rows, credit)[:, None]
        main, own = self._shaped([batch, crops], [main, earned * (crops.loss_weights > 0)])
        crops = dataclasses.replace(crops, advantages=own)
        return dataclasses.replace(batch, advantages=main, subagents=crops)

    def _shaped(self, rows: Sequence[LearnerBatch], advantages: Sequence[Array]) -> list[Array]:
        """Advantages less the divergence from the reference, normalised over all rows together."""
        config, shaped = self._config.advantages, list(advantages)
        masks = [batch.loss_weights > 0 for batch in rows]
        if config.kl_weight:
            for at, (batch, mask) in enumerate(zip(rows, masks, strict=True)):
                policies = batch.behaviour_log_probs, batch.reference_log_probs
                shaped[at] -= config.kl_weight * kl_to_go(mask, *policies, config.kl_estimator)
        if config.whiten_tokens:
            flat, mask = (jnp.concatenate([x.ravel() for x in xs]) for xs in (shaped, masks))
            cuts = np.cumsum([x.size for x in shaped])[:-1]
            pieces = jnp.split(whiten(flat, mask, config.eps), cuts)
            shaped = [x.reshape(old.shape) for x, old in zip(pieces, shaped, strict=True)]
        return shaped

    @property
    def _term(self) -> str:
        """The reward that all tokens share: without the anchor where that acts on tags only."""
        return "task" if self._config.objective.anchor == "position" else "total"

    def _anchored(self, groups: Sequence[RolloutGroup], batch: LearnerBatch) -> Array:
        """Advantage per token. With the anchor at positions, its share acts on tags only."""
        task, generated = self._normalised(groups, self._term), batch.loss_weights > 0
        if self._term == "total":
            return task[:, None] * generated
        weight = self._config.rewards.anchor_share
        return anchored_advantages(task, self._anchor.credit(groups, batch), generated, weight)

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
            batch = self._with_log_probs("proximal_log_probs", state.params, batch)
        for number in range(rl.updates):
            share = batch if rl.minibatches == 1 else self._share(batch, number % rl.minibatches)
            state, metrics = self.step(state, share, self.table)
            learned.append(metrics)
        return state, learned


def with_what_shaped(batch: LearnerBatch, sampling: SamplingConfig) -> LearnerBatch:
    """The batch without what these settings do not need: the step then computes none of it."""
    return dataclasses.replace(
        batch,
        prompt_lengths=batch.prompt_lengths if sampling.repetition_penalty != 1 else None,
        floors=batch.floors if sampling.truncates else None,
        grammar=batch.grammar if sampling.constrain else None,
    )


def token_shares(streams: Sequence[Stream]) -> dict[str, float]:
    """Who chose the tokens of a batch, and which of them are learned, for `metrics.jsonl`.

    * `tokens/learned`: share of generated tokens that are learned.
    * `tokens/not_chosen`: share of generated tokens that the grammar put in the place of another,
      or where it left one only. They are not learned.
    * `tokens/learned_not_chosen`: share of learned tokens that the policy did not choose; 0.
    * `tokens/truncated`: share of learned tokens where top-k, top-p or min-p cut others off.
    """
    generated, learned, own, floors = (
        np.concatenate(columns)
        for columns in zip(
            *((s.generated, s.loss_weights > 0, s.noted.own, s.noted.floors) for s in streams),
            strict=True,
        )
    )
    drawn, trained = max(generated.sum(), 1), max(learned.sum(), 1)
    return {
        "tokens/learned": float(learned.sum() / drawn),
        "tokens/not_chosen": float((generated & ~own).sum() / drawn),
        "tokens/learned_not_chosen": float((learned & ~own).sum() / trained),
        "tokens/truncated": float((learned & (floors > -np.inf)).sum() / trained),
    }


def static_lengths(longest: int) -> list[int]:
    """The few lengths that batches are padded to."""
    parts = {-(-longest * part // (LENGTHS * LENGTH_STEP)) for part in range(1, LENGTHS + 1)}
    return [part * LENGTH_STEP for part in sorted(parts) if part]


def static_length(longest: int, lengths: Sequence[int]) -> int:
    """The first of `lengths` that holds the longest stream; beyond them, a multiple of the step."""
    fitting = [length for length in lengths if length >= longest]
    return fitting[0] if fitting else -(-longest // LENGTH_STEP) * LENGTH_STEP


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
