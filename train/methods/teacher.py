"""VISD's teacher (arXiv 2605.06094): a moving average of the student that knows the outcome.

    w_t = clip(exp(sign(A) * delta_t), low, high),   A_t = A * ((1 - lambda) + lambda * w_t)

delta_t says by how much the teacher, told the answer, finds the student's token t likelier than
the student did. Rewards alone decide the direction of an update; the teacher says which tokens
deserve more of it. Its share lambda falls linearly to 0: training ends as plain GRPO.

What the paper leaves open, by our choice: both policies are shaped like the sampler's, and the
gap on the teacher's likeliest tokens goes over to that on the vocabulary linearly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from paravt_jax.advantages import annealed, reweighted_advantages
from paravt_jax.log_probs import View, teacher_gap
from paravt_jax.mesh import constrain
from paravt_jax.records import LearnerBatch, RolloutGroup
from pipelines.render import ChatRenderer
from train.batch import LearnerStream, streams_of_groups
from train.methods.hindsight import hindsight, open_feedback
from train.methods.settings import TeacherSettings
from train.rl.learner import Learner
from train.state import FlatParams, TrainState
from train.step import (
    batch_hidden,
    join_micro,
    shaping_of,
    split_micro,
    stream_groups,
)


class TaughtLearner:
    """A learner whose teacher reweights the advantages of each batch, and follows the student.
    After `teacher.anneal_steps` it learns like the learner alone."""

    def __init__(
        self, learner: Learner, settings: TeacherSettings, renderer: ChatRenderer, tools: bool
    ) -> None:
        """With `tools`, prompts offer them."""
        self._learner, self._settings = learner, settings
        self._renderer, self._tools = renderer, tools
        self._feedback = open_feedback(settings.judge)
        self._gaps = jax.jit(self._compare)
        self._average = jax.jit(
            functools.partial(optax.incremental_update, step_size=settings.rate),
            donate_argnums=1,
        )

    def step(
        self, state: TrainState, groups: Sequence[RolloutGroup]
    ) -> tuple[TrainState, dict[str, float]]:
        """See `Learner.step`."""
        number = self._learner.number(state)
        batch, metrics = self._learner.prepare(state, groups)
        batch, scaling = self.reweight(state, groups, batch, number)
        state, learned = self._learner.update(state, batch)
        return self.follow(state, number), metrics | scaling | self._learner.metrics_of(
            number, learned
        )

    def share(self, step: int) -> float:
        """The teacher's share lambda at a step."""
        return annealed(self._settings.strength, step, self._settings.anneal_steps)

    def reweight(
        self, state: TrainState, groups: Sequence[RolloutGroup], batch: LearnerBatch, step: int
    ) -> tuple[LearnerBatch, dict[str, float]]:
        """The batch with each advantage scaled by what the teacher thinks of its token, and what
        that was for `metrics.jsonl`."""
        share, settings = self.share(step), self._settings
        metrics = {"teacher/strength": share}
        if not share:
            return batch, metrics
        gaps = self.gaps(state, groups, batch)
        advantages = reweighted_advantages(
            batch.advantages, gaps, share, settings.weight_low, settings.weight_high
        )
        return dataclasses.replace(batch, advantages=advantages), metrics | _metrics(gaps, batch)

    def follow(self, state: TrainState, step: int) -> TrainState:
        """The state after a step, with the teacher moved towards the student; it is donated."""
        if not self.share(step):
            return state
        moved = self._average(state.trainable, state.teacher)
        return dataclasses.replace(state, teacher=moved)

    def gaps(
        self, state: TrainState, groups: Sequence[RolloutGroup], batch: LearnerBatch
    ) -> Float[Array, "b t"]:
        """How much likelier the teacher finds each trained token of the batch."""
        size = len(groups[0].trajectories)
        hinted = self._learner.batches.shared(self.streams(groups), size, per_row=1)
        # The same frames under the same tower: their features are there already.
        hinted = dataclasses.replace(hinted, patches=None, grids=None, features=batch.features)
        teacher = {**state.frozen, **state.teacher}
        return self._gaps(state.params, teacher, batch, hinted, self._learner.table)

    def streams(self, groups: Sequence[RolloutGroup]) -> list[LearnerStream]:
        """The student's streams after prompts that end with a hint: what follows is the same token
        by token, tool responses and their frames included."""
        attempts = [(group.row, t) for group in groups for t in group.trajectories]
        prompts = [
            self._renderer.with_hint(row, t.prompt, self._tools, hindsight(row, feedback))
            for (row, t), feedback in zip(attempts, self._feedback(attempts), strict=True)
        ]
        streams = zip(streams_of_groups(groups), prompts, strict=True)
        # Of another prompt: what served the student's says nothing.
        return [
            dataclasses.replace(stream, prompt=prompt, routing=None) for stream, prompt in streams
        ]

    def _compare(
        self,
        student: FlatParams,
        teacher: FlatParams,
        batch: LearnerBatch,
        hinted: LearnerBatch,
        table: Array | None,
    ) -> Float[Array, "b t"]:
        """In micro-batches of the train step, which bound the memory."""
        step, count = self._learner.whole, self._learner.whole.micro_batches

        def compare(pair: tuple[LearnerBatch, LearnerBatch]) -> Float[Array, "b t"]:
            batch, other = pair
            return teacher_gap(
                self._view(teacher, other),
                self._view(student, batch),
                batch.own_tokens,
                batch.trained > 0,
                support=self._settings.support,
                full_weight=self._settings.full_weight,
                temperature=step.temperature,
                budget=step.budget,
                lanes=batch.streams_per_row,
                shaping=shaping_of(batch, step.penalty, table),
            )

        group = step.group_size
        parts = split_micro(batch, count, group), split_micro(hinted, count, group)
        return join_micro(jax.lax.map(compare, parts), stream_groups(batch, group))

    def _view(self, params: FlatParams, batch: LearnerBatch) -> View:
        policy = self._learner.whole.policy
        head = policy.head(params)
        return View(
            before=batch_hidden(policy, params, batch)[0],
            # Rows again: the likeliest tokens of a vocabulary that is split would gather it.
            head=lambda h: constrain(head(h), "batch", None, "vocab"),
        )


def _metrics(gaps: Float[Array, "b t"], batch: LearnerBatch) -> dict[str, float]:
    """Mean and mean magnitude of the gaps over trained tokens, where they are 0 elsewhere."""
    tokens = jnp.maximum(jnp.sum(batch.loss_weights > 0).astype(jnp.float32), 1)
    return {
        "teacher/gap": float(jnp.sum(gaps) / tokens),
        "teacher/gap_size": float(jnp.sum(jnp.abs(gaps)) / tokens),
    }
