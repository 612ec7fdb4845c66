"""Rollouts to learner batches: few static shapes, vision features computed once per prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.records import LearnerBatch, RolloutGroup
from paravt_jax.shapes import bucket, buckets
from pipelines.preprocess import FrameSpec
from rollout.engine.sampler import SamplingConfig
from rollout.limits import AgentConfig
from train.batch import LearnerStream, learner_batch, streams_of_groups, to_mesh
from train.rl.settings import RlSettings
from train.rl.subagents import most_crops, rows_per_group, subagent_streams
from train.state import FlatParams
from train.step import encode_parts

LENGTH_UNIT = 64
"""Rows have multiples of this many tokens."""


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """What decides the static shapes of batches, besides the number of rollouts."""

    spec: FrameSpec
    pad_id: int
    prompt_frames: int
    """Frames of the largest prompt."""
    crop_frames: int
    """Frames of the largest crop."""
    longest: int = 0
    """Most tokens of a main agent's stream, whose rows then have one of few lengths. 0: unknown."""
    subagent_longest: int = 0
    """Most tokens of a sub-agent's stream, whose rows all have one length. 0: unknown."""

    @functools.cached_property
    def lengths(self) -> list[int]:
        """The few lengths of rows of main agents: shorter ones than a quarter of the longest would
        save little. None if that is unknown."""
        return buckets(-(-self.longest // 4), self.longest, LENGTH_UNIT) if self.longest else []

    @property
    def subagent_length(self) -> int:
        """The one length of rows of sub-agents; 0 if that is unknown."""
        return -(-self.subagent_longest // LENGTH_UNIT) * LENGTH_UNIT

    def length(self, longest: int) -> int:
        """The length of rows of which the longest has so many tokens."""
        fitting = [length for length in self.lengths if length >= longest]
        return fitting[0] if fitting else bucket(longest, LENGTH_UNIT)


class RolloutBatches:
    """Makes the learner's batch of rollouts. Advantages and reference come later."""

    def __init__(
        self,
        policy: TrainablePolicy,
        mesh: Mesh,
        shapes: BatchShapes,
        rl: RlSettings,
        agent: AgentConfig,
    ) -> None:
        self.shapes, self._mesh = shapes, mesh
        self._rl, self._agent = rl, agent
        self._encode = jax.jit(policy.encode)
        parts = rl.prompts_per_step // rl.micro_groups
        self._encode_parts = jax.jit(functools.partial(encode_parts, policy, count=parts))

    def __call__(
        self, params: FlatParams, groups: Sequence[RolloutGroup]
    ) -> tuple[LearnerBatch, dict[str, float]]:
        """The batch of all rollouts on the mesh, and the shares of its tokens for
        `metrics.jsonl`."""
        streams = streams_of_groups(groups, self._rl.mask_over_turn)
        batch = self.padded(streams, len(groups[0].trajectories))
        metrics, crops = {}, []
        if self._rl.trains_subagents:
            rows = rows_per_group(most_crops(groups), len(groups[0].trajectories))
            crops = subagent_streams(groups, rows, self._rl.mask_over_turn) if rows else []
            metrics["subagents/rows"] = float(rows * len(groups))
        batch = dataclasses.replace(
            batch,
            features=self._encode(params, batch.patches, batch.grids),
            patches=None,
            grids=None,
            subagents=self._subagents(params, crops) if crops else None,
        )
        return batch, metrics | token_shares([*streams, *crops])

    def _subagents(self, params: FlatParams, streams: Sequence[LearnerStream]) -> LearnerBatch:
        """Rows of sub-agents, each with frames of its own."""
        shapes = self.shapes
        sampling = self._agent.subagent_sampling
        batch = self.padded(streams, 1, shapes.crop_frames, shapes.subagent_length, sampling)
        features = self._encode_parts(params, batch)
        return dataclasses.replace(batch, features=features, patches=None, grids=None)

    def padded(
        self,
        streams: Sequence[LearnerStream],
        group_size: int,
        frames: int | None = None,
        length: int = 0,
        sampling: SamplingConfig | None = None,
    ) -> LearnerBatch:
        """Streams on the mesh, their frames as patches, in one of few lengths.

        Args:
          streams: of all rows.
          group_size: neighbouring rows that share a prompt.
          frames: least frames of each group, by default those of the largest prompt.
          length: tokens of a row; 0 takes one of `BatchShapes.lengths`.
          sampling: what they were drawn by, by default that of main agents.
        """
        shapes = self.shapes
        longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
        host = learner_batch(
            streams,
            length=length or shapes.length(longest),
            pad_id=shapes.pad_id,
            group_size=group_size,
            frames=shapes.spec.group_count(shapes.prompt_frames if frames is None else frames),
            frame_patches=shapes.spec.max_patches,
        )
        needed = with_what_shaped(host, sampling or self._agent.sampling)
        return to_mesh(needed, self._mesh)


def with_what_shaped(batch: LearnerBatch, sampling: SamplingConfig) -> LearnerBatch:
    """The batch without what these settings do not need: the step then computes none of it."""
    return dataclasses.replace(
        batch,
        prompt_lengths=batch.prompt_lengths if sampling.repetition_penalty != 1 else None,
        floors=batch.floors if sampling.truncates else None,
        grammar=batch.grammar if sampling.constrain else None,
    )


def token_shares(streams: Sequence[LearnerStream]) -> dict[str, float]:
    """Who chose the tokens of a batch, and which of them are learned, for `metrics.jsonl`.

    * `tokens/learned`: share of generated tokens that are learned.
    * `tokens/not_chosen`: share of generated tokens that the grammar put in the place of another,
      or where it left one only. They are not learned.
    * `tokens/learned_not_chosen`: share of learned tokens that the policy did not choose; 0.
    * `tokens/truncated`: share of learned tokens where top-k, top-p or min-p cut others off.
    """
    columns = [(s.generated, s.loss_weights > 0, s.noted.own, s.noted.floors) for s in streams]
    generated, learned, own, floors = map(np.concatenate, zip(*columns, strict=True))
    drawn, trained = max(generated.sum(), 1), max(learned.sum(), 1)
    return {
        "tokens/learned": float(learned.sum() / drawn),
        "tokens/not_chosen": float((generated & ~own).sum() / drawn),
        "tokens/learned_not_chosen": float((learned & ~own).sum() / trained),
        "tokens/truncated": float((learned & (floors > -np.inf)).sum() / trained),
    }
