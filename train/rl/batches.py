"""Rollouts to learner batches: few static shapes, vision features computed once per prompt."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from paravt_jax.interfaces import TrainablePolicy, routing_of
from paravt_jax.mesh import batch_shards
from paravt_jax.records import LearnerBatch, RolloutGroup
from paravt_jax.shapes import bucket, ladder
from paravt_jax.shared_rows import Bounds, unit_of
from pipelines.preprocess import FrameSpec
from rollout.engine.sampler import SamplingConfig
from rollout.limits import AgentConfig
from train.batch import (
    LearnerStream,
    learner_batch,
    row_starts,
    shared_batch,
    streams_of_groups,
    to_mesh,
)
from train.rl.settings import RlSettings
from train.rl.subagents import most_crops, rows_per_group, subagent_streams
from train.state import FlatParams
from train.step import encode_parts

LENGTH_UNIT = 64
"""Prompts, what follows them, and rows have multiples of this many slots."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static shapes of rows that share prompts."""

    slots: int
    bounds: Bounds


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """What decides the static shapes of batches, besides the number of rollouts."""

    spec: FrameSpec
    pad_id: int
    prompt_frames: int
    """Frames of the largest prompt."""
    crop_frames: int
    """Frames of the largest crop."""
    longest_prompt: int = 0
    """Most tokens of a main agent's prompt. 0: unknown."""
    longest_own: int = 0
    """Most tokens of a main agent's stream after its prompt; rows then have one of few layouts."""
    subagent_longest: int = 0
    """Most tokens of a sub-agent's stream, whose rows all have one length. 0: unknown."""

    @functools.cached_property
    def owns(self) -> list[int]:
        """The few bounds of main agents' streams: what may be said is far more than what is."""
        longest = self.longest_own
        return sorted({_whole(-(-longest // part)) for part in (8, 3, 1)}) if longest else []

    def rows(self, per_row: int, unit: int) -> list[int]:
        """The few numbers of slots of rows of `per_row` streams that begin at multiples of `unit`,
        fewer than a fifth apart. Empty if the longest streams are unknown."""
        if not self.owns:
            return []
        prompt, stream = (-(-x // unit) * unit for x in (self.longest_prompt, self.longest_own))
        return ladder(self.longest_prompt, prompt + per_row * stream, LENGTH_UNIT, 5)

    def layout(self, streams: Sequence[LearnerStream], per_row: int, unit: int) -> Layout:
        """The layout of rows that hold these streams."""
        prompts = [len(stream.prompt.tokens) for stream in streams[::per_row]]
        return self.layout_of(prompts, [len(stream.tokens) for stream in streams], unit)

    def layout_of(self, prompts: Sequence[int], owns: Sequence[int], unit: int) -> Layout:
        """The layout of rows of prompts of so many tokens, each with equally many streams."""
        _, ends = row_starts(prompts, owns, unit)
        slots = fitting(self.rows(len(owns) // len(prompts), unit), max(ends))
        longest = [_whole(self.longest_prompt)] if self.longest_prompt else []
        prompt = min(fitting(longest, max(prompts)), slots)
        return Layout(slots, Bounds(prompt, fitting(self.owns, max(owns)), unit))

    def possible(self, per_row: int, unit: int) -> dict[Layout, tuple[int, list[int]]]:
        """Every layout of rows, with lengths of a prompt and of streams that lead to it."""
        layouts = {}
        for slots, stream in itertools.product(self.rows(per_row, unit), self.owns):
            prompt, owns = self._filling(slots // unit * unit, stream, per_row, unit)
            layouts.setdefault(self.layout_of([prompt], owns, unit), (prompt, owns))
        return layouts

    def _filling(self, room: int, stream: int, per_row: int, unit: int) -> tuple[int, list[int]]:
        """Lengths of a prompt and of streams, the first as long as it may be, that fill `room`
        slots as far as they can."""
        most = min(stream, self.longest_own)
        # A stream before the prompt, as it is its length that leads to `stream`.
        limits, lengths = [most, self.longest_prompt] + [most] * (per_row - 1), []
        for number, limit in enumerate(limits):
            rest = per_row - number
            lengths.append(max(min(limit, room - rest * unit), 1))
            room -= -(-lengths[-1] // unit) * unit
        return lengths[1], [lengths[0], *lengths[2:]]

    @property
    def subagent_length(self) -> int:
        """The one length of rows of sub-agents; 0 if that is unknown."""
        return _whole(self.subagent_longest)


def _whole(count: int) -> int:
    return -(-count // LENGTH_UNIT) * LENGTH_UNIT


def fitting(sizes: Sequence[int], count: int) -> int:
    """The smallest of some sizes that holds `count`; one of `bucket`'s where none does."""
    return next((size for size in sizes if size >= count), bucket(count, LENGTH_UNIT))


def streams_per_row(group_size: int, groups: int, mesh: Mesh) -> int:
    """Streams that share one copy of their prompt: a whole group's, or as many fewer as it takes
    for the rows of `groups` groups to divide over the devices that share a batch."""
    shards = batch_shards(dict(mesh.shape))
    for rows in range(1, group_size + 1):
        if group_size % rows == 0 and groups * rows % shards == 0:
            return group_size // rows
    return group_size


def streams_per_view(group_size: int, groups: int, per_row: int, mesh: Mesh) -> int:
    """Streams that share one copy of their frames: a whole group's, or, where the `groups` of a
    batch do not divide over the devices, those of a row, as each device would encode the frames of
    all groups, and hold what comes of them."""
    return group_size if groups % batch_shards(dict(mesh.shape)) == 0 else per_row


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
        self._routing = routing_of(policy) if rl.routing_replay else None
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
        batch = self.shared(streams, len(groups[0].trajectories))
        metrics, crops = {}, []
        if self._rl.trains_subagents:
            rows = rows_per_group(most_crops(groups), len(groups[0].trajectories))
            crops = subagent_streams(groups, rows, self._rl.mask_over_turn) if rows else []
            metrics["subagents/rows"] = float(rows * len(groups))
        # Features once for all updates of the step: the vision tower does not run in the learner.
        batch = dataclasses.replace(
            batch,
            features=self._encode(params, batch.patches, batch.grids),
            patches=None,
            grids=None,
            subagents=self._subagents(params, crops) if crops else None,
        )
        return batch, metrics | token_shares([*streams, *crops])

    @property
    def unit(self) -> int:
        """Streams begin at multiples of this many slots."""
        sizes = self.shapes.longest_prompt, self.shapes.longest_own, self._rl.group_size
        return unit_of(self._mesh.devices.flat[0].platform, *sizes)

    def per_row(self, group_size: int) -> int:
        """See `streams_per_row`."""
        return streams_per_row(group_size, self._rl.micro_groups, self._mesh)

    def shared(
        self, streams: Sequence[LearnerStream], group_size: int, per_row: int | None = None
    ) -> LearnerBatch:
        """Streams of main agents on the mesh, their frames as patches, in one of few shapes.

        Args:
          group_size: neighbours whose prompts show the same frames.
          per_row: neighbours that share a row and its prompt; None takes a whole group, if the mesh
            lets it.
        """
        shapes, usual = self.shapes, self.per_row(group_size)
        per_row = per_row or usual
        groups = len(streams) // group_size
        layout = shapes.layout(streams, per_row, self.unit)
        host = shared_batch(
            streams,
            slots=layout.slots,
            bounds=layout.bounds,
            pad_id=shapes.pad_id,
            group_size=streams_per_view(group_size, groups, usual, self._mesh),
            per_row=per_row,
            frames=shapes.spec.group_count(shapes.prompt_frames),
            frame_patches=shapes.spec.max_patches,
            routing=self._routing,
        )
        return to_mesh(with_what_shaped(host, self._agent.sampling), self._mesh)

    def _subagents(self, params: FlatParams, streams: Sequence[LearnerStream]) -> LearnerBatch:
        """Rows of sub-agents: whole streams, each with frames of its own."""
        shapes = self.shapes
        longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
        host = learner_batch(
            streams,
            length=shapes.subagent_length or bucket(longest, LENGTH_UNIT),
            pad_id=shapes.pad_id,
            frames=shapes.spec.group_count(shapes.crop_frames),
            frame_patches=shapes.spec.max_patches,
            routing=self._routing,
        )
        batch = to_mesh(with_what_shaped(host, self._agent.subagent_sampling), self._mesh)
        # In parts: a step has more crops than prompts, and the tower for all at once may not fit.
        features = self._encode_parts(params, batch)
        return dataclasses.replace(batch, features=features, patches=None, grids=None)


def with_what_shaped(batch: LearnerBatch, sampling: SamplingConfig) -> LearnerBatch:
    """The batch without what these settings do not need: the step then computes none of it."""
    starts = batch.shared is not None or sampling.repetition_penalty != 1
    return dataclasses.replace(
        batch,
        prompt_lengths=batch.prompt_lengths if starts else None,
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
    columns = [(s.generated, s.loss_weights > 0, s.noted.chosen, s.noted.floors) for s in streams]
    generated, learned, chosen, floors = map(np.concatenate, zip(*columns, strict=True))
    drawn, trained = max(generated.sum(), 1), max(learned.sum(), 1)
    return {
        "tokens/learned": float(learned.sum() / drawn),
        "tokens/not_chosen": float((generated & ~chosen).sum() / drawn),
        "tokens/learned_not_chosen": float((learned & ~chosen).sum() / trained),
        "tokens/truncated": float((learned & (floors > -np.inf)).sum() / trained),
    }
