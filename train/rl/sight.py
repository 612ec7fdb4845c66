"""Whether a policy sees: how probable what it said is with the frames, and without.

A model that is blind, be it that the learner loses the frames on the way or that words alone tell,
finds both equally probable, and no reward says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.records import LearnerBatch, RolloutGroup, Trajectory
from paravt_jax.shapes import bucket
from train.batch import learner_batch, stream_of, to_mesh
from train.rl.batches import BatchShapes
from train.state import FlatParams
from train.step import batch_log_probs

UNIT = 128
"""Streams are padded to few lengths, multiples of this."""


class Sight:
    """Mean log-probabilities of answers and of sub-agents' reports, with frames and without."""

    def __init__(
        self, policy: TrainablePolicy, mesh: Mesh, shapes: BatchShapes, every: int, rows: int = 8
    ) -> None:
        """
        Args:
          shapes: of the learner's batches: frames and padding.
          every: steps between measurements.
          rows: most rollouts that are measured, and most reports.
        """
        self._mesh, self._shapes, self._every, self._rows = mesh, shapes, every, rows
        self._log_probs = jax.jit(
            functools.partial(_trained_log_probs, policy), static_argnames="budget"
        )

    def __call__(
        self, step: int, params: FlatParams, groups: Sequence[RolloutGroup]
    ) -> dict[str, float]:
        """`sight/answer`, `sight/report` and both `_blind`, if the step has them measured: of the
        first rollout of each group, and of reports on its crops."""
        if step % self._every:
            return {}
        rollouts = [group.trajectories[0] for group in groups][: self._rows]
        reports = [crop for rollout in rollouts for crop in rollout.subagents][: self._rows]
        metrics: dict[str, float] = {}
        for name, streams, frames in (
            ("answer", rollouts, self._shapes.prompt_frames),
            ("report", reports, self._shapes.crop_frames),
        ):
            if streams:
                seeing, blind = self.of(params, streams, frames)
                metrics |= {f"sight/{name}": seeing, f"sight/{name}_blind": blind}
        return metrics

    def of(
        self, params: FlatParams, rollouts: Sequence[Trajectory], frames: int, patches: int = 0
    ) -> tuple[float, float]:
        """Mean log-probability of the last turns of rollouts, at temperature 1: with the frames
        that they were shown, and with frames of one grey.

        Args:
          frames: most frames of a prompt.
          patches: most patches of a frame; 0: as many as there can be.
        """
        batch = self._batch(rollouts, frames, patches or self._shapes.spec.max_patches)
        grey = dataclasses.replace(batch, patches=jnp.zeros_like(jnp.asarray(batch.patches)))
        budget = bucket(max(int(t.generated.sum()) for t in rollouts), UNIT)
        seeing, blind = (self._log_probs(params, b, budget=budget) for b in (batch, grey))
        return float(seeing), float(blind)

    def _batch(self, rollouts: Sequence[Trajectory], frames: int, patches: int) -> LearnerBatch:
        # Repetitions fill the batch up and weigh nothing, so that all have one shape.
        filled = [*rollouts, *[rollouts[0]] * (self._rows - len(rollouts))]
        streams = [
            dataclasses.replace(
                stream_of(t), loss_weights=_last_turn(t) * np.float32(number < len(rollouts))
            )
            for number, t in enumerate(filled)
        ]
        longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
        shapes = self._shapes
        host = learner_batch(
            streams,
            length=bucket(longest, UNIT),
            pad_id=shapes.pad_id,
            frames=shapes.spec.group_count(frames),
            frame_patches=patches,
        )
        return to_mesh(host, self._mesh)


def _last_turn(rollout: Trajectory) -> np.ndarray:
    """float32 `[t]`: 1 for the tokens that the last turn generated."""
    chosen = rollout.generated & (rollout.turn_numbers == rollout.turn_numbers.max())
    return chosen.astype(np.float32)


def _trained_log_probs(
    policy: TrainablePolicy, params: FlatParams, batch: LearnerBatch, *, budget: int
) -> Float[Array, ""]:
    values, _, _ = batch_log_probs(policy, params, batch, temperature=1.0, budget=budget)
    weights = batch.trained
    return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)
