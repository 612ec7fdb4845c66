"""From token streams (examples, trajectories) to static shapes, and onto the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from paravt_jax.blocks import whole_stream
from paravt_jax.mesh import partition
from paravt_jax.patches import largest, restride, stack_patches
from paravt_jax.records import (
    Choices,
    Example,
    LearnerBatch,
    Pack,
    Prompt,
    RolloutGroup,
    Shown,
    Trajectory,
)
from paravt_jax.shapes import bucket


@dataclasses.dataclass(frozen=True)
class LearnerStream:
    """One row of a learner batch: a prompt, and per-token values of what came after it."""

    prompt: Prompt
    tokens: np.ndarray
    """int32 `[t]`."""
    loss_weights: np.ndarray
    """float32 `[t]`."""
    log_probs: np.ndarray
    """float32 `[t]`, the sampler's; 0 where it did not sample."""
    shown: tuple[Shown, ...] = ()
    """Frames that came after the prompt."""
    generated: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, bool))
    """bool `[t]`: what the sampler drew; empty without one."""
    choices: Choices | None = None
    """How the tokens were chosen; None if nothing but temperature shaped them."""

    @property
    def noted(self) -> Choices:
        """`choices`, of free tokens where there are none."""
        return self.choices or Choices.free(len(self.tokens))


def streams_of_examples(examples: Sequence[Example]) -> list[LearnerStream]:
    """Supervised streams: no sampler."""
    return [
        LearnerStream(e.prompt, e.tokens, e.weights, np.zeros_like(e.weights), e.shown)
        for e in examples
    ]


def streams_of_groups(
    groups: Sequence[RolloutGroup], mask_over_turn: bool = False
) -> list[LearnerStream]:
    """Streams of all rollouts, group by group; what the policy chose is trained, of `over_turn`
    rollouts nothing if so wished."""
    return [
        stream_of(t, not (mask_over_turn and t.over_turn))
        for group in groups
        for t in group.trajectories
    ]


def stream_of(rollout: Trajectory, learned: bool = True) -> LearnerStream:
    """One rollout, of a main agent or a sub-agent; what the policy chose is trained. What a grammar
    wrote in its place is not: it stays context."""
    weights = (rollout.chosen & learned).astype(np.float32)
    return LearnerStream(
        prompt=rollout.prompt,
        tokens=rollout.tokens,
        loss_weights=weights,
        log_probs=rollout.log_probs,
        shown=rollout.shown,
        generated=rollout.generated,
        choices=rollout.choices,
    )


def learner_batch(
    streams: Sequence[LearnerStream],
    *,
    length: int,
    pad_id: int,
    group_size: int = 1,
    frames: int = 0,
    frame_patches: int = 0,
) -> LearnerBatch:
    """Pad streams to `[b, length]`; each group's prompt shows at least `frames` frames of at least
    `frame_patches` patches, padding included.

    If tool responses brought frames into any stream, every row is a group of its own, with the
    frames of its prompt and then its own; their number is padded to one of few.

    Raises:
      ValueError: a stream is longer than `length` (the caller chose the bucket wrongly).
    """
    starts = [len(s.prompt.tokens) for s in streams]
    longest = max(start + len(s.tokens) for start, s in zip(starts, streams, strict=True))
    if longest > length:
        raise ValueError(f"a stream of {longest} tokens does not fit the batch length {length}")
    wholes = [whole_stream(s.prompt, s.tokens, s.shown) for s in streams]
    alone = any(s.shown for s in streams)
    groups = wholes[:: 1 if alone else group_size]
    most, _ = largest([whole.patches for whole in groups])
    # How many frames tool responses bring depends on what was said; prompts have few numbers.
    frames = max(frames, bucket(most) if alone else most)
    rows = functools.partial(_rows, length=length, starts=starts)
    noted = [s.noted for s in streams]
    return dataclasses.replace(
        _batch(wholes, groups, length, pad_id, frames, frame_patches),
        loss_weights=rows([s.loss_weights for s in streams], dtype=np.float32),
        behaviour_log_probs=rows([s.log_probs for s in streams], dtype=np.float32),
        prompt_lengths=np.array(starts, np.int32),
        floors=rows([own.floors for own in noted], fill=-np.inf, dtype=np.float32),
        grammar=rows([own.grammar for own in noted]),
    )


def packed_batch(
    packs: Sequence[Pack], *, length: int, pad_id: int, frames: int, frame_patches: int
) -> LearnerBatch:
    """Pad packs to `[b, length]`, each a group of its own with room for `frames` frames of at least
    `frame_patches` patches."""
    streams = [item.stream for item in packs]
    return dataclasses.replace(
        _batch(streams, streams, length, pad_id, frames, frame_patches),
        loss_weights=_rows([item.weights for item in packs], length, dtype=np.float32),
        segments=_rows([item.segments for item in packs], length),
    )


def blank_batch(rows: int, length: int) -> LearnerBatch:
    """A batch `[rows, length]` of zeros, from which nothing is learned."""
    integers, values = (np.zeros((rows, length), dtype) for dtype in (np.int32, np.float32))
    return LearnerBatch(
        tokens=integers,
        positions=np.zeros((rows, length, 3), np.int32),
        vision_index=integers,
        lengths=np.zeros(rows, np.int32),
        loss_weights=values,
        behaviour_log_probs=values,
        reference_log_probs=values,
        advantages=values,
        structural=values > 0,
        patches=None,
        grids=None,
        features=None,
    )


def turn_numbers(groups: Sequence[RolloutGroup], length: int) -> np.ndarray:
    """int32 `[b, length]`: `Trajectory.turn_numbers` in the rows of `streams_of_groups`."""
    rollouts = [t for group in groups for t in group.trajectories]
    starts = [len(t.prompt.tokens) for t in rollouts]
    return _rows([t.turn_numbers for t in rollouts], length, starts=starts)


def _batch(
    streams: Sequence[Prompt],
    groups: Sequence[Prompt],
    length: int,
    pad_id: int,
    frames: int,
    frame_patches: int,
) -> LearnerBatch:
    """Padded streams, and the frames of those that stand for their group."""
    seen = [stream.patches for stream in groups]
    most_frames, most_patches = largest(seen)
    most_patches = max(most_patches, frame_patches)
    patches, grids = stack_patches(seen, frames, most_patches) if most_frames else (None, None)
    index = [restride(stream, most_patches) for stream in streams]
    return dataclasses.replace(
        blank_batch(len(streams), length),
        tokens=_rows([stream.tokens for stream in streams], length, pad_id),
        positions=_rows([stream.positions for stream in streams], length),
        vision_index=_rows(index, length, -1),
        lengths=np.array([len(stream.tokens) for stream in streams], np.int32),
        patches=patches,
        grids=grids,
    )


def _rows(
    rows: Sequence[np.ndarray],
    length: int,
    fill: int | float = 0,
    dtype: type[np.number] = np.int32,
    starts: Sequence[int] | None = None,
) -> np.ndarray:
    """Rows of `length` that hold the given ones, from `starts` on, and elsewhere `fill`."""
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill, dtype)
    for target, row, start in zip(out, rows, starts or [0] * len(rows), strict=True):
        target[start : start + len(row)] = row
    return out


def to_mesh(tree: Any, mesh: Mesh) -> Any:
    """Put host arrays on the mesh, leading dimension split over the batch axes."""

    def put(x: np.ndarray) -> jax.Array:
        axes = ("batch", *(None,) * (np.ndim(x) - 1))
        spec = partition(dict(mesh.shape), axes, np.shape(x))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)
