"""From token streams (examples, trajectories) to static shapes, and onto the mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from paravt_jax.blocks import join_blocks, own_block, whole_stream
from paravt_jax.mesh import put_rows
from paravt_jax.patches import FrameRows, largest, restride
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
from paravt_jax.rope_index import next_position
from paravt_jax.routing import UNKNOWN, Routing, RoutingShape
from paravt_jax.shapes import bucket
from paravt_jax.shared_rows import Bounds


@dataclasses.dataclass(frozen=True)
class LearnerStream:
    """One stream of a learner batch: a prompt, and per-token values of what came after it."""

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
    routing: Routing | None = None
    """Which experts served prompt and tokens; None if nobody noted it."""

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
        routing=rollout.routing,
    )


def learner_batch(
    streams: Sequence[LearnerStream],
    *,
    length: int,
    pad_id: int,
    group_size: int = 1,
    frames: int = 0,
    frame_patches: int = 0,
    routing: RoutingShape | None = None,
) -> LearnerBatch:
    """Pad whole streams to `[b, length]`, a row each; each group's prompt shows at least `frames`
    frames of at least `frame_patches` patches, padding included.

    If tool responses brought frames into any stream, every row is a group of its own, with the
    frames of its prompt and then its own; their number is padded to one of few.

    With `routing`, the batch says which experts serve the tokens of streams that know it.

    Raises:
      ValueError: a stream is longer than `length` (the caller chose the bucket wrongly).
    """
    starts = [len(s.prompt.tokens) for s in streams]
    _check_fit("a stream", [len(s.prompt.tokens) + len(s.tokens) for s in streams], length)
    wholes = [whole_stream(s.prompt, s.tokens, s.shown) for s in streams]
    # Frames of a tool response are one rollout's: the rows of a group then no longer see the same.
    alone = any(s.shown for s in streams)
    groups = wholes[:: 1 if alone else group_size]
    seen = _frames(groups, _room(groups, frames, alone), frame_patches)
    return dataclasses.replace(
        _batch(wholes, seen, length, pad_id),
        prompt_lengths=np.array(starts, np.int32),
        routing=routing and _routing_rows(routing, streams, length),
        **_values(streams, starts, length),
    )


def shared_batch(
    streams: Sequence[LearnerStream],
    *,
    slots: int,
    bounds: Bounds,
    pad_id: int,
    group_size: int,
    per_row: int,
    frames: int = 0,
    frame_patches: int = 0,
    routing: RoutingShape | None = None,
) -> LearnerBatch:
    """Streams in rows of `per_row` neighbours that share a prompt, which stands there once; see
    `SharedRows`.

    Args:
      slots: of a row; see `row_starts`.
      bounds: of prompts and streams.
      group_size: neighbours that share frames: those of their prompts, and then those that tool
        responses brought into each of them, whose number is padded to one of few.
      per_row: divides it. In different rows prompts may differ in words.
      frames, frame_patches, routing: see `learner_batch`.

    Raises:
      ValueError: a prompt, what follows it or a row is longer (the caller chose the bucket
        wrongly).
    """
    heads = [stream.prompt for stream in streams[::per_row]]
    prompts, owns = ([len(x.tokens) for x in part] for part in (heads, streams))
    starts, ends = row_starts(prompts, owns, bounds.unit)
    _check_fit("a prompt", prompts, bounds.prompt)
    _check_fit("what follows a prompt", owns, bounds.own)
    _check_fit("a prompt with what follows it", ends, slots)
    blocks = [own_block(stream.tokens, stream.shown) for stream in streams]
    groups = [
        join_blocks([streams[at].prompt, *blocks[at : at + group_size]])
        for at in range(0, len(streams), group_size)
    ]
    room = _room(groups, frames, any(stream.shown for stream in streams))
    patches, grids, width = _frames(groups, room, frame_patches)
    first = [next_position(stream.prompt.positions) for stream in streams]
    positions = [block.positions + start for block, start in zip(blocks, first, strict=True)]
    rows = functools.partial(_shared_rows, starts, slots)
    return dataclasses.replace(
        blank_batch(len(heads), slots, len(streams), bounds.own),
        tokens=rows([head.tokens for head in heads], [block.tokens for block in blocks], pad_id),
        positions=rows([head.positions for head in heads], positions),
        vision_index=rows(
            [restride(head, width) for head in heads], _own_index(groups, blocks, width), -1
        ),
        lengths=np.array(owns, np.int32),
        patches=patches,
        grids=grids,
        prompt_lengths=np.array(prompts, np.int32),
        starts=np.array(starts, np.int32),
        bounds=bounds,
        routing=routing and _shared_routing(routing, streams, starts, slots, per_row),
        **_values(streams, [0] * len(streams), bounds.own),
    )


def _shared_rows(
    starts: Sequence[int],
    slots: int,
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    fill: int = 0,
    dtype: Any = np.int32,
) -> np.ndarray:
    """Rows of what prompts have, and of what each of their streams has from its start on."""
    out, per_row = _rows(before, slots, fill, dtype), len(after) // len(before)
    for number, (start, values) in enumerate(zip(starts, after, strict=True)):
        out[number // per_row, start : start + len(values)] = values
    return out


def _shared_routing(
    shape: RoutingShape,
    streams: Sequence[LearnerStream],
    starts: Sequence[int],
    slots: int,
    per_row: int,
) -> np.ndarray:
    """Which experts serve the tokens of rows that share a prompt, and its record."""
    known = [_routing_of(shape, stream) for stream in streams]
    prompts, owns = [one.prompt for one in known[::per_row]], [one.own for one in known]
    return _shared_rows(starts, slots, prompts, owns, UNKNOWN, shape.dtype)


def _routing_rows(shape: RoutingShape, streams: Sequence[LearnerStream], length: int) -> np.ndarray:
    """Which experts serve the tokens of whole streams."""
    known = [_routing_of(shape, stream) for stream in streams]
    rows = [np.concatenate([one.prompt, one.own]) for one in known]
    return _rows(rows, length, UNKNOWN, shape.dtype)


def _routing_of(shape: RoutingShape, stream: LearnerStream) -> Routing:
    """The record of a stream; where there is none, the learner's routers choose."""
    if stream.routing is None:
        return Routing(shape.unknown(len(stream.prompt.tokens)), shape.unknown(len(stream.tokens)))
    return stream.routing


def row_starts(
    prompts: Sequence[int], owns: Sequence[int], unit: int
) -> tuple[list[int], list[int]]:
    """Where streams of these lengths begin in the rows of their prompts, at multiples of `unit`,
    equally many neighbours in each; and where the rows end."""
    starts, ends, per_row = [], [], len(owns) // len(prompts)
    for row, end in enumerate(prompts):
        for own in owns[row * per_row : (row + 1) * per_row]:
            starts.append(-(-end // unit) * unit)
            end = starts[-1] + own
        ends.append(end)
    return starts, ends


def _own_index(
    groups: Sequence[Prompt], blocks: Sequence[Prompt], patches: int
) -> list[np.ndarray]:
    """The vision index of each block in the frames of its group: a prompt, then equally many
    blocks."""
    found, size = [], len(blocks) // len(groups)
    for number, group in enumerate(groups):
        lengths = [len(block.tokens) for block in blocks[number * size : (number + 1) * size]]
        first = len(group.tokens) - sum(lengths)
        cuts = first + np.cumsum([0, *lengths[:-1]])
        found += np.split(restride(group, patches), cuts)[1:]
    return found


def _check_fit(what: str, lengths: Sequence[int], room: int) -> None:
    if max(lengths) > room:
        raise ValueError(f"{what} of {max(lengths)} tokens does not fit the batch length {room}")


def packed_batch(
    packs: Sequence[Pack], *, length: int, pad_id: int, frames: int, frame_patches: int
) -> LearnerBatch:
    """Pad packs to `[b, length]`, each a group of its own with room for `frames` frames of at least
    `frame_patches` patches."""
    streams = [item.stream for item in packs]
    return dataclasses.replace(
        _batch(streams, _frames(streams, frames, frame_patches), length, pad_id),
        loss_weights=_rows([item.weights for item in packs], length, dtype=np.float32),
        segments=_rows([item.segments for item in packs], length),
    )


def blank_batch(rows: int, length: int, streams: int = 0, own: int = 0) -> LearnerBatch:
    """A batch of rows `[rows, length]` and streams `[streams, own]` of zeros, from which nothing is
    learned; by default rows are streams."""
    integers = np.zeros((rows, length), np.int32)
    values = np.zeros((streams or rows, own or length), np.float32)
    return LearnerBatch(
        tokens=integers,
        positions=np.zeros((rows, length, 3), np.int32),
        vision_index=integers,
        lengths=np.zeros(len(values), np.int32),
        loss_weights=values,
        behaviour_log_probs=values,
        reference_log_probs=values,
        advantages=values,
        structural=values > 0,
        patches=None,
        grids=None,
        features=None,
    )


def turn_numbers(groups: Sequence[RolloutGroup], own: int) -> np.ndarray:
    """int32 `[b, own]`: `Trajectory.turn_numbers` in the streams of `streams_of_groups`, from the
    first token after their prompts on."""
    return _rows([t.turn_numbers for group in groups for t in group.trajectories], own)


_Seen = tuple[Any, np.ndarray | None, int]
"""Patches (an array, or with several hosts `FrameRows`) and grids of groups, and the patches of a
frame."""


def _frames(groups: Sequence[Prompt], frames: int, frame_patches: int) -> _Seen:
    """The frames of groups, padded to `frames` of at least `frame_patches` patches."""
    seen = [group.patches for group in groups]
    most, width = largest(seen)
    width = max(width, frame_patches)
    if not most:
        return None, None, width
    rows = FrameRows(seen, frames, width)
    return rows if jax.process_count() > 1 else rows[:], rows.grids, width


def _room(groups: Sequence[Prompt], frames: int, shown: bool) -> int:
    """Frames that groups are padded to, at least `frames`; with `shown`, tool responses brought
    some: how many they bring depends on what was said, and prompts have few numbers."""
    most, _ = largest([group.patches for group in groups])
    return max(frames, bucket(most) if shown else most)


def _values(
    streams: Sequence[LearnerStream], starts: Sequence[int], length: int
) -> dict[str, np.ndarray]:
    """What is known of every token of streams, which stand from `starts` on."""
    rows = functools.partial(_rows, length=length, starts=starts)
    noted = [stream.noted for stream in streams]
    return {
        "loss_weights": rows([s.loss_weights for s in streams], dtype=np.float32),
        "behaviour_log_probs": rows([s.log_probs for s in streams], dtype=np.float32),
        # Below every logit: where the sampler cut nothing off, the learner must not either.
        "floors": rows([own.floors for own in noted], fill=-np.inf, dtype=np.float32),
        "grammar": rows([own.grammar for own in noted]),
    }


def _batch(streams: Sequence[Prompt], seen: _Seen, length: int, pad_id: int) -> LearnerBatch:
    """Whole streams, padded, and the frames of their groups."""
    patches, grids, width = seen
    index = [restride(stream, width) for stream in streams]
    return dataclasses.replace(
        blank_batch(len(streams), length),
        tokens=_rows([stream.tokens for stream in streams], length, pad_id),
        positions=_rows([stream.positions for stream in streams], length),
        # 0 would be the first vision token.
        vision_index=_rows(index, length, -1),
        lengths=np.array([len(stream.tokens) for stream in streams], np.int32),
        patches=patches,
        grids=grids,
    )


def _rows(
    rows: Sequence[np.ndarray],
    length: int,
    fill: int | float = 0,
    dtype: Any = np.int32,
    starts: Sequence[int] | None = None,
) -> np.ndarray:
    """Rows of `length` that hold the given ones, from `starts` on, and elsewhere `fill`."""
    out = np.full((len(rows), length, *rows[0].shape[1:]), fill, dtype)
    for target, row, start in zip(out, rows, starts or [0] * len(rows), strict=True):
        target[start : start + len(row)] = row
    return out


def to_mesh(tree: Any, mesh: Mesh) -> Any:
    """Put host arrays on the mesh, leading dimension split over the batch axes."""
    return jax.tree.map(lambda x: put_rows(x, mesh), tree)
