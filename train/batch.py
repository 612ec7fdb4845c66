"""From token streams (examples, trajectories) to static shapes, and onto the mesh."""

from __future__ import annotations

import dataclasses
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
class Stream:
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


def streams_of_examples(examples: Sequence[Example]) -> list[Stream]:
    """Supervised streams: no sampler."""
    return [
        Stream(e.prompt, e.tokens, e.weights, np.zeros_like(e.weights), e.shown) for e in examples
    ]


def streams_of_groups(groups: Sequence[RolloutGroup], mask_over_turn: bool = False) -> list[Stream]:
    """Streams of all rollouts, group by group; what the policy chose is trained, of `over_turn`
    rollouts nothing if so wished."""
    return [
        stream_of(t, not (mask_over_turn and t.over_turn))
        for group in groups
        for t in group.trajectories
    ]


def stream_of(rollout: Trajectory, learned: bool = True) -> Stream:
    """One rollout, of a main agent or a sub-agent; what the policy chose is trained. What a grammar
    wrote in its place is not: it stays context."""
    weights = (rollout.chosen & learned).astype(np.float32)
    return Stream(
        prompt=rollout.prompt,
        tokens=rollout.tokens,
        loss_weights=weights,
        log_probs=rollout.log_probs,
        shown=rollout.shown,
        generated=rollout.generated,
        choices=rollout.choices,
    )


def learner_batch(
    streams: Sequence[Stream],
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
    longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
    if longest > length:
        raise ValueError(f"a stream of {longest} tokens does not fit the batch length {length}")
    wholes = [whole_stream(s.prompt, s.tokens, s.shown) for s in streams]
    alone = any(s.shown for s in streams)
    seen = [whole.patches for whole in wholes[:: 1 if alone else group_size]]
    most_frames, most_patches = largest(seen)
    patches, grids = None, None
    if most_frames:
        most_frames = max(frames, bucket(most_frames) if alone else most_frames)
        most_patches = max(most_patches, frame_patches)
        patches, grids = stack_patches(seen, most_frames, most_patches)
    zeros = np.zeros((len(streams), length), np.float32)
    noted = [s.noted for s in streams]
    return LearnerBatch(
        tokens=_rows([whole.tokens for whole in wholes], length, pad_id),
        positions=_rows([whole.positions for whole in wholes], length, 0),
        vision_index=_rows([restride(whole, most_patches) for whole in wholes], length, -1),
        lengths=np.array([len(whole.tokens) for whole in wholes], np.int32),
        loss_weights=_values([s.loss_weights for s in streams], streams, length),
        behaviour_log_probs=_values([s.log_probs for s in streams], streams, length),
        reference_log_probs=zeros,
        advantages=zeros,
        structural=zeros > 0,
        patches=patches,
        grids=grids,
        features=None,
        prompt_lengths=np.array([len(s.prompt.tokens) for s in streams], np.int32),
        floors=_values([own.floors for own in noted], streams, length, -np.inf),
        grammar=_values([own.grammar for own in noted], streams, length, 0, np.int32),
    )


def packed_batch(
    packs: Sequence[Pack], *, length: int, pad_id: int, frames: int, frame_patches: int
) -> LearnerBatch:
    """Pad packs to `[b, length]`, each a group of its own with room for `frames` frames of at least
    `frame_patches` patches."""
    streams = [item.stream for item in packs]
    seen = [stream.patches for stream in streams]
    most_frames, most_patches = largest(seen)
    most_patches = max(most_patches, frame_patches)
    patches, grids = stack_patches(seen, frames, most_patches) if most_frames else (None, None)
    zeros = np.zeros((len(packs), length), np.float32)
    return LearnerBatch(
        tokens=_rows([stream.tokens for stream in streams], length, pad_id),
        positions=_rows([stream.positions for stream in streams], length, 0),
        vision_index=_rows([restride(stream, most_patches) for stream in streams], length, -1),
        lengths=np.array([len(stream.tokens) for stream in streams], np.int32),
        loss_weights=_rows([item.weights for item in packs], length, 0, np.float32),
        behaviour_log_probs=zeros,
        reference_log_probs=zeros,
        advantages=zeros,
        structural=zeros > 0,
        patches=patches,
        grids=grids,
        features=None,
        segments=_rows([item.segments for item in packs], length, 0),
    )


def turn_numbers(groups: Sequence[RolloutGroup], length: int) -> np.ndarray:
    """int32 `[b, length]`: `Trajectory.turn_numbers` in the rows of `streams_of_groups`."""
    rollouts = [t for group in groups for t in group.trajectories]
    numbers = np.zeros((len(rollouts), length), np.int32)
    for row, rollout in zip(numbers, rollouts, strict=True):
        start = len(rollout.prompt.tokens)
        row[start : start + len(rollout.tokens)] = rollout.turn_numbers
    return numbers


def _rows(
    rows: list[np.ndarray], length: int, fill: int, dtype: type[np.number] = np.int32
) -> np.ndarray:
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill, dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def _values(
    values: list[np.ndarray],
    streams: Sequence[Stream],
    length: int,
    fill: float | int = 0.0,
    dtype: type[np.number] = np.float32,
) -> np.ndarray:
    out = np.full((len(values), length), fill, dtype)
    for target, value, stream in zip(out, values, streams, strict=True):
        start = len(stream.prompt.tokens)
        target[start : start + len(value)] = value
    return out


def to_mesh(tree: Any, mesh: Mesh) -> Any:
    """Put host arrays on the mesh, leading dimension split over the batch axes."""

    def put(x: np.ndarray) -> jax.Array:
        axes = ("batch", *(None,) * (np.ndim(x) - 1))
        spec = partition(dict(mesh.shape), axes, np.shape(x))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)
