"""The learning half of an RL step: `state, metrics = learner.step(state, groups)`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paravt_jax.mesh import on_device
from paravt_jax.records import LearnerBatch, RolloutGroup
from train.rl.batches import RolloutBatches
from train.rl.settings import RlSettings
from train.rl.token_advantages import TokenAdvantages
from train.rl.token_values import TokenValues
from train.state import FlatParams, TrainState
from train.step import (
    RlStep,
    StepMetrics,
    join_micro,
    mean_metrics,
    minibatch,
    stream_groups,
)


class Learner:
    """Turns rollouts into optimiser steps, each compiled once per length of batch."""

    def __init__(
        self,
        step: RlStep,
        rl: RlSettings,
        batches: RolloutBatches,
        advantages: TokenAdvantages,
        reference: FlatParams,
        table: Array | None = None,
    ) -> None:
        """
        Args:
          step: one optimiser step on a minibatch.
          rl: how often a batch of rollouts is learned from, and in which shares.
          batches: make static shapes of rollouts.
          advantages: say what each token deserves.
          reference: the trainable weights of the policy that KL is measured from; the frozen
            ones never change. May lie on the host.
          table: that of the engine's automata, if a grammar constrains what it draws.
        """
        self.settings, self._reference = rl, reference
        self.batches, self.advantages, self.table = batches, advantages, table
        self.of_tokens: TokenValues | None = None
        """Values of the tokens of the last batch, if the step keeps log-probabilities."""
        self._structural: Array | None = None
        self._kl: float | None = None
        """The divergence of the last step that measured it; a checkpoint holds it."""
        self.whole = dataclasses.replace(step, micro_batches=step.micro_batches * rl.minibatches)
        """The step on all minibatches at once: what is computed before the first update."""
        self._minibatch_step = minibatch_step(step)
        self._log_probs = jax.jit(self.whole.log_probs)
        self._subagent_log_probs = jax.jit(self.whole.of_subagents().log_probs)
        self._minibatch = jax.jit(
            functools.partial(minibatch, count=rl.minibatches, group_size=rl.group_size)
        )

    def step(
        self, state: TrainState, groups: Sequence[RolloutGroup]
    ) -> tuple[TrainState, dict[str, float]]:
        """Learn from scored rollouts: the state after all optimiser steps, and metrics of them.
        `state` is donated."""
        number = self.number(state)
        batch, metrics = self.prepare(state, groups)
        state, learned = self.update(state, batch)
        return state, metrics | self.metrics_of(number, learned)

    def number(self, state: TrainState) -> int:
        """Which batch of rollouts comes next; a rehearsal's is below 0."""
        return int(state.step) // self.settings.updates

    def measures_reference(self, number: int) -> bool:
        """Whether this batch gets log-probabilities of the reference policy: where something but a
        metric uses them all do, and in a rehearsal, which compiles the program."""
        used = self.whole.objective.kl_weight or self.advantages.settings.kl_weight
        unknown = number < 0 or self._kl is None
        return bool(used) or unknown or number % self.settings.reference_every == 0

    def metrics_of(self, number: int, learned: Sequence[StepMetrics]) -> dict[str, float]:
        """Metrics of the optimiser steps of a batch; `kl` is that of the last one that measured
        it."""
        metrics = mean_metrics(learned)
        if not self.measures_reference(number):
            return metrics | {"kl": self._kl or 0.0}
        if number >= 0:
            self._kl = metrics["kl"]
        return metrics

    def get_state(self) -> float | None:
        """See `Resumable`: a resume tells the `kl` that the uninterrupted run does."""
        return self._kl

    def set_state(self, state: float | None) -> None:
        """See `Resumable`."""
        self._kl = state

    def prepare(
        self, state: TrainState, groups: Sequence[RolloutGroup]
    ) -> tuple[LearnerBatch, dict[str, float]]:
        """All that is computed once per batch of rollouts: where the format anchor may act, the
        log-probabilities of the reference policy, if anything uses them, advantages."""
        batch, metrics = self.batches(state.params, groups)
        structural, validity = self.advantages.anchor.positions(groups, batch)
        batch = dataclasses.replace(batch, structural=structural)
        if self.measures_reference(self.number(state)):
            batch = self.with_reference(state.frozen, batch)
        credit = self.advantages.anchor_credit(groups, batch)
        batch = self.advantages(groups, batch, credit)
        if self.whole.keeps_log_probs:
            self._structural = self.advantages.structural(credit, batch)
        return batch, {"format/tag_validity": float(validity), **metrics}

    def update(
        self, state: TrainState, batch: LearnerBatch
    ) -> tuple[TrainState, list[StepMetrics]]:
        """All optimiser steps of a batch and the metrics of each; `state` is donated.

        `rl.epochs` times over `rl.minibatches` shares of the batch. Ratios are to the policy before
        the first step, whose log-probabilities are computed once, so that clips can act; or to the
        sampler's, if `objective.correction` says so.
        """
        rl, learned, log_probs = self.settings, [], []
        # Of the learner itself, not of the sampler, whose precision would move the ratio (ADR 14).
        if self.whole.objective.computes_proximal(rl.updates):
            batch = self._with_log_probs("proximal_log_probs", state.params, batch)
        for number in range(rl.updates):
            index = number % rl.minibatches
            share = batch if rl.minibatches == 1 else self._minibatch(batch, index)
            trained = dataclasses.replace(state, frozen={})
            trained, metrics = self._minibatch_step(trained, state.frozen, share, self.table)
            state = dataclasses.replace(trained, frozen=state.frozen)
            log_probs.append(metrics.pop("log_probs", None))
            learned.append(metrics)
        if self.whole.keeps_log_probs:
            before = batch.proximal_log_probs
            if before is None:
                before = self._whole(batch, log_probs[: rl.minibatches])
            self.of_tokens = TokenValues(before, batch.advantages, self._structural)
        return state, learned

    def _whole(self, batch: LearnerBatch, shares: Sequence[Array]) -> Array:
        """Values of a batch from those of its shares."""
        if len(shares) == 1:
            return shares[0]
        return join_micro(jnp.stack(shares), stream_groups(batch, self.settings.group_size))

    def with_reference(self, frozen: FlatParams, batch: LearnerBatch) -> LearnerBatch:
        """The batch with the log-probabilities of the reference policy filled in."""
        params = {**frozen, **on_device(self._reference)}
        return self._with_log_probs("reference_log_probs", params, batch)

    def _with_log_probs(self, name: str, params: FlatParams, batch: LearnerBatch) -> LearnerBatch:
        """The batch, sub-agents included, with log-probabilities under some weights filled in."""
        values = self._log_probs(params, batch, self.table)
        batch = dataclasses.replace(batch, **{name: _placed(values, batch)})
        if batch.subagents is None:
            return batch
        values = self._subagent_log_probs(params, batch.subagents, self.table)
        crops = dataclasses.replace(batch.subagents, **{name: _placed(values, batch.subagents)})
        return dataclasses.replace(batch, subagents=crops)


def minibatch_step(step: RlStep) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """The compiled program of an optimiser step; see `_update`."""
    return jax.jit(functools.partial(_update, step), donate_argnums=0)


def _update(
    step: RlStep,
    state: TrainState,
    frozen: FlatParams,
    batch: LearnerBatch,
    table: Array | None,
) -> tuple[TrainState, StepMetrics]:
    """A step of a state without its frozen weights: these are not donated, as rollouts that are
    drawn meanwhile read them too."""
    state, metrics = step(dataclasses.replace(state, frozen=frozen), batch, table)
    return dataclasses.replace(state, frozen={}), metrics


def _placed(values: Array, batch: LearnerBatch) -> Array:
    """Values of tokens where the batch has its own: a step that gets the blank reference of a batch
    where nobody measured it is then the same program."""
    return jax.device_put(values, batch.behaviour_log_probs.sharding)
