"""Rows that hold a prompt once and, one behind the other, the streams that continue it:

    prompt | stream 1 | stream 2 | ... | padding

A token of a stream sees the prompt, and those before it in its stream (ADR 24).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from paravt_jax.pytrees import ArrayLike, pytree

TILE = 128
"""Fewest slots that a TPU's attention tells apart at a time: there streams begin at multiples of
it."""
NUMBER_BITS = 31
"""What that attention is told of each query is a number of so many bits (`Bounds.bits`)."""
ROUNDED_BY = 1024
"""Most slots by which it pads rows."""


def unit_of(platform: str, prompt: int = 0, own: int = 0, streams: int = 0) -> int:
    """`Bounds.unit` where rows are computed, of a prompt and so many streams of at most so many
    tokens: on a TPU the smallest that its attention can tell apart."""
    unit = TILE if platform == "tpu" else 1
    while unit > 1:
        slots = prompt + unit + streams * (own + unit) + ROUNDED_BY
        if sum(Bounds(prompt, own, unit).bits(slots)) <= NUMBER_BITS:
            break
        unit *= 2
    return unit


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Bounds:
    """What is known of rows when their program is compiled, besides their slots."""

    prompt: int
    """Most tokens of a prompt."""
    own: int
    """Most tokens of a stream."""
    unit: int = 1
    """Streams begin at multiples of this many slots."""

    def bits(self, slots: int) -> tuple[int, int, int]:
        """Bits of the number of a slot, of by how many units its stream began before, and of the
        units of its prompt."""
        sizes = slots - 1, (self.own - 1) // self.unit, -(-self.prompt // self.unit)
        return sizes[0].bit_length(), max(sizes[1], 0).bit_length(), sizes[2].bit_length()


@pytree
@dataclasses.dataclass(frozen=True)
class SharedRows:
    """Where prompts and streams stand in rows; `b` streams, neighbours being of one row."""

    prompt_lengths: Int[ArrayLike, " rows"]
    starts: Int[ArrayLike, " b"]
    """The slot of each stream's first token."""
    lengths: Int[ArrayLike, " b"]
    bounds: Bounds

    @property
    def per_row(self) -> int:
        """Streams of a row."""
        return self.starts.shape[0] // self.prompt_lengths.shape[0]

    def segments(self, slots: int) -> Int[Array, "rows slots"]:
        """What stands in each slot: 0 for the prompt, then streams from 1 on; -1 for padding."""
        inside, at = self._inside(slots), jnp.arange(slots, dtype=jnp.int32)[None]
        numbers = jnp.arange(1, self.per_row + 1, dtype=jnp.int32)[None, :, None]
        streams = jnp.sum(jnp.where(inside, numbers, 0), axis=1, dtype=jnp.int32)
        beyond = at >= jnp.asarray(self.prompt_lengths)[:, None]
        return jnp.where((streams == 0) & beyond, -1, streams)

    def begins(self, slots: int) -> Int[Array, "rows slots"]:
        """The slot where the stream of each slot begins; 0 outside of streams."""
        starts = jnp.asarray(self.starts).reshape(-1, self.per_row, 1)
        return jnp.sum(jnp.where(self._inside(slots), starts, 0), axis=1, dtype=jnp.int32)

    def seen(self, slots: int) -> Bool[Array, "rows streams slots"]:
        """Which slots are of each stream or of its prompt."""
        return self._inside(slots) | (self.segments(slots) == 0)[:, None]

    def streams(self, values: Shaped[ArrayLike, "rows t *shape"]) -> Shaped[Array, "b own *shape"]:
        """What stands at the tokens of each stream; zeros beyond them."""
        places, real = self._places()
        real = jnp.expand_dims(real, tuple(range(2, values.ndim)))
        return jnp.where(real, self._take(values, places), 0)

    def preceding(self, hidden: Float[Array, "rows t d"]) -> Float[Array, "b own d"]:
        """What stands before each token of each stream, the prompt's last token being before its
        first."""
        places, _ = self._places()
        last = jnp.repeat(jnp.asarray(self.prompt_lengths) - 1, self.per_row)
        before = jnp.concatenate([last[:, None], places[:, :-1]], axis=1)
        return self._take(hidden, before)

    def in_lanes(self, values: Float[Array, "rows t *shape"]) -> Float[Array, "rows s *shape"]:
        """Rows of `bounds.prompt` slots and then `bounds.own` for each stream: what every stream
        could need. What stands beyond prompts and streams means nothing."""
        prompt = values[:, : self.bounds.prompt]
        own = self._take(values, self._places()[0])
        return jnp.concatenate([prompt, own.reshape(len(prompt), -1, *own.shape[2:])], axis=1)

    def out_of_lanes(
        self, values: Float[Array, "rows s *shape"], slots: int
    ) -> Float[Array, "rows slots *shape"]:
        """Inverse of `in_lanes` for prompts and streams."""
        prompt = min(self.bounds.prompt, slots)
        at = jnp.arange(slots, dtype=jnp.int32)[None]
        lane, own = self._lane_places(slots)
        return _along(values, jnp.where(own, prompt + lane, jnp.minimum(at, prompt - 1)))

    def in_rows(
        self, values: Float[Array, "b own *shape"], slots: int, fill: float = 0.0
    ) -> Float[Array, "rows slots *shape"]:
        """Inverse of `streams`: values of their tokens where these stand, elsewhere `fill`."""
        lane, own = self._lane_places(slots)
        lanes = values.reshape(len(lane), -1, *values.shape[2:])
        found = _along(lanes, jnp.where(own, lane, 0))
        return jnp.where(jnp.expand_dims(own, tuple(range(2, lanes.ndim))), found, fill)

    def _lane_places(
        self, slots: int
    ) -> tuple[Int[Array, "rows slots"], Bool[Array, "rows slots"]]:
        """Where each slot is among the lanes of its row, and which are of a stream: elsewhere its
        place means nothing."""
        segments, at = self.segments(slots), jnp.arange(slots, dtype=jnp.int32)[None]
        return (segments - 1) * self.bounds.own + at - self.begins(slots), segments > 0

    def _inside(self, slots: int) -> Bool[Array, "rows streams slots"]:
        """Which slots are of each stream."""
        at = jnp.arange(slots, dtype=jnp.int32)[None, None]
        starts, lengths = (
            jnp.asarray(x).reshape(-1, self.per_row, 1) for x in (self.starts, self.lengths)
        )
        return (at >= starts) & (at < starts + lengths)

    def _places(self) -> tuple[Int[Array, "b own"], Bool[Array, "b own"]]:
        """Slots of the tokens of each stream, 0 beyond them; and which are no padding."""
        at = jnp.arange(self.bounds.own, dtype=jnp.int32)[None]
        real = at < jnp.asarray(self.lengths)[:, None]
        return jnp.where(real, jnp.asarray(self.starts)[:, None] + at, 0), real

    def _take(
        self, values: Shaped[ArrayLike, "rows t *shape"], places: Int[Array, "b own"]
    ) -> Shaped[Array, "b own *shape"]:
        values = jnp.asarray(values)
        found = _along(values, places.reshape(len(values), -1))
        return found.reshape(*places.shape, *values.shape[2:])


def _along(
    values: Shaped[Array, "rows t *shape"], places: Int[Array, "rows s"]
) -> Shaped[Array, "rows s *shape"]:
    """What stands in these slots of each row."""
    return jnp.take_along_axis(values, jnp.expand_dims(places, tuple(range(2, values.ndim))), 1)
