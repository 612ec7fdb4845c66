"""From token streams (examples, trajectories) to the learner's static device shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from paravt_jax.records import Example, LearnerBatch, Patches, Prompt, RolloutGroup


@dataclasses.dataclass(frozen=True)
class Stream:
    """One row of a learner batch: a prompt and per-token values after it."""

    prompt: Prompt
    tokens: np.ndarray
    """int32 `[t]`, everything after the prompt."""
    loss_weights: np.ndarray
    """float32 `[t]`."""
    log_probs: np.ndarray
    """float32 `[t]`, the sampler's."""
    advantages: np.ndarray
    """float32 `[t]`."""


def streams_of_examples(examples: Sequence[Example]) -> list[Stream]:
    """Supervised streams: no sampler, no advantage."""
    return [
        Stream(e.prompt, e.tokens, e.weights, np.zeros_like(e.weights), np.zeros_like(e.weights))
        for e in examples
    ]


def streams_of_groups(
    groups: Sequence[RolloutGroup], advantages_P_G: np.ndarray
) -> list[Stream]:
    """Streams of all rollouts, group by group; one advantage per rollout spread over its tokens."""
    streams = []
    for group, advantages_G in zip(groups, advantages_P_G, strict=True):
        for trajectory, advantage in zip(group.trajectories, advantages_G, strict=True):
            generated = trajectory.generated.astype(np.float32)
            streams.append(
                Stream(
                    trajectory.prompt,
                    trajectory.tokens,
                    generated,
                    trajectory.log_probs,
                    generated * np.float32(advantage),
                )
            )
    return streams


def learner_batch(
    streams: Sequence[Stream], *, length: int, pad_id: int, group_size: int = 1, frames: int = 0
) -> LearnerBatch:
    """Pad streams to `[b, length]`; patches of each group's prompt, padded to `frames`.

    Raises:
      ValueError: a stream is longer than `length` (the caller chose the bucket wrongly).
    """
    longest = max(len(s.prompt.tokens) + len(s.tokens) for s in streams)
    if longest > length:
        raise ValueError(f"a stream of {longest} tokens does not fit the batch length {length}")
    patches, grids = _patches([s.prompt.patches for s in streams[::group_size]], frames)
    return LearnerBatch(
        tokens=_rows([np.concatenate([s.prompt.tokens, s.tokens]) for s in streams], length, pad_id),
        positions=_rows([_positions(s) for s in streams], length, 0),
        vision_index=_rows(
            [np.pad(s.prompt.vision_index, (0, len(s.tokens)), constant_values=-1) for s in streams],
            length,
            -1,
        ),
        lengths=np.array([len(s.prompt.tokens) + len(s.tokens) for s in streams], np.int32),
        loss_weights=_values([s.loss_weights for s in streams], streams, length),
        behaviour_log_probs=_values([s.log_probs for s in streams], streams, length),
        advantages=_values([s.advantages for s in streams], streams, length),
        patches=patches,
        grids=grids,
        features=None,
    )


def _positions(stream: Stream) -> np.ndarray:
    """Text after the prompt continues at the largest position so far plus one, in all three rows."""
    first = int(stream.prompt.positions.max()) + 1
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


def _patches(
    items: list[Patches | None], frames: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    present = [item for item in items if item is not None]
    if not present:
        return None, None
    frames = max(frames, *(len(item.grids) for item in present))
    count = max(item.values.shape[1] for item in present)
    values = np.zeros((len(items), frames, count, present[0].values.shape[2]), np.float32)
    grids = np.zeros((len(items), frames, 2), np.int32)
    for i, item in enumerate(items):
        if item is not None:
            values[i, : len(item.grids), : item.values.shape[1]] = item.values
            grids[i, : len(item.grids)] = item.grids
    return values, grids
