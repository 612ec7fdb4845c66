"""From token streams (examples, trajectories) to the learner's static device shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from paravt_jax.patches import largest, restride, stack_patches
from paravt_jax.records import Example, LearnerBatch, Prompt, RolloutGroup
from paravt_jax.rope_index import next_position


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


def streams_of_examples(examples: Sequence[Example]) -> list[Stream]:
    """Supervised streams: no sampler."""
    return [Stream(e.prompt, e.tokens, e.weights, np.zeros_like(e.weights)) for e in examples]


def streams_of_groups(groups: Sequence[RolloutGroup]) -> list[Stream]:
    """Streams of all rollouts, group by group; what the policy generated is trained."""
    return [
        Stream(t.prompt, t.tokens, t.generated.astype(np.float32), t.log_probs)
        for group in groups
        for t in group.trajectories
    ]


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

    Raises:
      ValueError: a stream is longer than `length` (the caller chose the bucket wrongly).
    """
    longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
    if longest > length:
        raise ValueError(f"a stream of {longest} tokens does not fit the batch length {length}")
    shown = [s.prompt.patches for s in streams[::group_size]]
    most_frames, most_patches = largest(shown)
    patches, grids = None, None
    if most_frames:
        most_patches = max(most_patches, frame_patches)
        patches, grids = stack_patches(shown, max(frames, most_frames), most_patches)
    zeros = np.zeros((len(streams), length), np.float32)
    return LearnerBatch(
        tokens=_rows(
            [np.concatenate([s.prompt.tokens, s.tokens]) for s in streams], length, pad_id
        ),
        positions=_rows([_positions(s) for s in streams], length, 0),
        vision_index=_rows([_vision_index(s, most_patches) for s in streams], length, -1),
        lengths=np.array([len(s.prompt.tokens) + len(s.tokens) for s in streams], np.int32),
        loss_weights=_values([s.loss_weights for s in streams], streams, length),
        behaviour_log_probs=_values([s.log_probs for s in streams], streams, length),
        reference_log_probs=zeros,
        advantages=zeros,
        structural=zeros > 0,
        patches=patches,
        grids=grids,
        features=None,
    )


def _vision_index(stream: Stream, patches: int) -> np.ndarray:
    index = restride(stream.prompt, patches)
    return np.pad(index, (0, len(stream.tokens)), constant_values=-1)


def _positions(stream: Stream) -> np.ndarray:
    """Text after the prompt continues at the largest position so far plus one, on all axes."""
    first = next_position(stream.prompt.positions)
    text = np.arange(first, first + len(stream.tokens), dtype=np.int32)
    return np.concatenate([stream.prompt.positions, np.repeat(text[:, None], 3, axis=1)])


def _rows(rows: list[np.ndarray], length: int, fill: int) -> np.ndarray:
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill, np.int32)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out


def _values(values: list[np.ndarray], streams: Sequence[Stream], length: int) -> np.ndarray:
    out = np.zeros((len(values), length), np.float32)
    for target, value, stream in zip(out, values, streams, strict=True):
        start = len(stream.prompt.tokens)
        target[start : start + len(value)] = value
    return out
