"""Log-probabilities of chosen tokens, without ever holding `[b, t, vocab]`.

Only positions that count are sent through the vocabulary head: they are packed first, those of the
streams of one prompt into one row, then taken in chunks whose logits are recomputed in the
backward pass; chunks that hold none are not computed. Peak memory of the head is
`b * CHUNK * vocab`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from paravt_jax.mesh import by_width, platform
from paravt_jax.shaping import Shaper, Shaping, TokenPlaces, within
from paravt_jax.shared_rows import SharedRows

Head = Callable[[Float[Array, "rows c d"]], Float[Array, "rows c vocab"]]
UNSHAPED = Shaping()
CHUNK = 128
"""Positions of a stream whose logits exist at one time, at least 1."""
LOGITS_ON_CPU = 2**21
"""Logits of all streams that exist at one time on a CPU: more of them cost fresh pages."""
WIDTHS_ON_CPU = 2
"""Fewest positions of all streams there, as a multiple of the head's width: with fewer, adding up
its gradient costs more than logits do."""


def preceding(
    hidden: Float[Array, "rows t d"], shared: SharedRows | None = None
) -> Float[Array, "b own d"]:
    """The hidden states that predict the tokens of each stream: those of the tokens before them.

    Args:
      hidden: final hidden states of rows.
      shared: where prompts and streams stand in them; what predicts the first token of a stream is
        the last one of its prompt. None: rows are whole streams, whose first token nothing
        predicts: there stand zeros.
    """
    hidden = by_width(hidden)
    if shared is None:
        return jnp.pad(hidden[:, :-1], [(0, 0), (1, 0), (0, 0)])
    return shared.preceding(hidden)


def gathered_log_probs(
    before: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    chosen: Bool[Array, "b t"],
    head: Head,
    *,
    temperature: Float[Array, ""] | float,
    budget: int,
    lanes: int = 1,
    chunk: int | None = None,
    shaping: Shaping = UNSHAPED,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Log-probability of each chosen token given those before it, and the entropy there.

    `log p(y_t) = z_t[y_t] / T - logsumexp(z_t / T)` where `z_t` are the logits before t, penalised
    and restricted as they were when the token was drawn (`paravt_jax.shaping`).

    Args:
      before: what predicts each token, see `preceding`.
      tokens: of each stream.
      chosen: which of them count.
      head: maps hidden states to float32 logits.
      temperature: the sampler's temperature, so that learner and sampler agree.
      budget: most chosen tokens of a stream (static). Of the streams of a row, chosen tokens beyond
        theirs together are dropped, so the caller must pass a bound.
      lanes: neighbouring streams whose chosen tokens are packed into one row.
      chunk: positions of a stream whose logits exist at one time; None: as many as suit the
        device.
      shaping: what shaped the draws besides temperature.

    Returns:
      log-probabilities and entropies (no gradient), both 0 where not chosen.
    """
    vocab = _vocab(head, before)
    packing = Packing.of(chosen, budget, lanes, chunk or _chunk(before, budget, vocab))
    inputs, targets = packing.pack(before), packing.pack(tokens)
    shaper = Shaper(shaping, tokens, vocab, temperature, lanes)

    def statistics(own: Array, target: Array, places: TokenPlaces) -> tuple[Array, Array]:
        scores = shaper.tempered(head(own), places)
        return _token_statistics(scores, target, shaper.support(scores, target, places))

    pieces = inputs, targets, packing.places(shaping)
    log_probs, entropies = packing.in_chunks(jax.checkpoint(statistics), pieces)
    return packing.unpack(log_probs), jax.lax.stop_gradient(packing.unpack(entropies))


@dataclasses.dataclass(frozen=True)
class Packing:
    """The chosen tokens of the streams of a row, packed to its front."""

    index: Int[Array, "rows c"]
    """Number of each one in its row; beyond the chosen ones anything."""
    counts: Int[Array, " rows"]
    """Chosen tokens of each row."""
    lanes: int
    """Streams of a row."""
    length: int
    """Tokens of a stream."""
    chunk: int
    """Positions that are taken at a time."""

    @classmethod
    def of(cls, chosen: Bool[Array, "b t"], budget: int, lanes: int, chunk: int) -> Packing:
        """`lanes` neighbouring streams to a row, room for `budget` tokens of each, `chunk` of each
        at a time."""
        length = chosen.shape[1]
        flat, budget = chosen.reshape(-1, lanes * length), min(budget, length)
        chunk = min(chunk, budget)
        room, chunk = -(-budget // chunk) * chunk * lanes, chunk * lanes
        index = jax.vmap(lambda row: jnp.nonzero(row, size=room, fill_value=0)[0])(flat)
        counts = jnp.sum(flat, axis=1, dtype=jnp.int32)
        return cls(index.astype(jnp.int32), counts, lanes, length, chunk)

    def pack(self, values: Shaped[Array, "b t *shape"]) -> Shaped[Array, "rows c *shape"]:
        """What stands at the chosen tokens."""
        flat = values.reshape(-1, self.lanes * self.length, *values.shape[2:])
        return jnp.take_along_axis(flat, jnp.expand_dims(self.index, tuple(range(2, flat.ndim))), 1)

    def unpack(self, values: Float[Array, "rows c"]) -> Float[Array, "b t"]:
        """Values of chosen tokens back to where these stand; 0 elsewhere."""
        real = jnp.arange(self.index.shape[1])[None] < self.counts[:, None]
        nothing = jnp.zeros((len(values), self.lanes * self.length), values.dtype)
        back = jax.vmap(lambda own, place, value: own.at[place].add(value))
        return back(nothing, self.index, jnp.where(real, values, 0)).reshape(-1, self.length)

    def places(self, shaping: Shaping) -> TokenPlaces:
        """Where the chosen tokens stand in their streams, and what was noted there."""
        noted = (None if x is None else self.pack(jnp.asarray(x)) for x in shaping.noted)
        return TokenPlaces(self.index // self.length, self.index % self.length, *noted)

    def in_chunks(self, function: Callable[..., Any], pieces: tuple[Any, ...]) -> Any:
        """`function(*pieces)`, arrays `[rows, c]` of what is packed, chunk by chunk; zeros for
        chunks beyond the chosen tokens of all rows."""
        cut = _chunks(pieces, self.chunk)
        shapes = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], cut))
        most = jnp.max(self.counts)

        # What a branch keeps for the backward pass, the head, would be stacked for all chunks.
        @jax.checkpoint
        def one(_: None, piece: tuple[Array, Any]) -> tuple[None, Any]:
            start, own = piece
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return None, jax.lax.cond(start < most, lambda: function(*own), lambda: nothing)

        starts = jnp.arange(0, self.index.shape[1], self.chunk)
        return jax.tree.map(_unchunk, jax.lax.scan(one, None, (starts, cut))[1])


@dataclasses.dataclass(frozen=True)
class View:
    """What one policy makes of streams: those of the other policy, after prompts of its own."""

    before: Float[Array, "b t d"]
    """What predicts each of their tokens, see `preceding`."""
    head: Head


def teacher_gap(
    teacher: View,
    student: View,
    tokens: Int[Array, "b t"],
    chosen: Bool[Array, "b t"],
    *,
    support: int,
    full_weight: float = 0.0,
    temperature: Float[Array, ""] | float,
    budget: int,
    lanes: int = 1,
    chunk: int | None = None,
    shaping: Shaping = UNSHAPED,
) -> Float[Array, "b t"]:
    """By how much a teacher finds each chosen token likelier than the student does.

        delta_t = log p_T(y_t | S) - log p_S(y_t | S)

    where S holds the teacher's `support` likeliest tokens and y_t itself, and both policies are
    renormalised on it (VISD, arXiv 2605.06094): the tail of the vocabulary, where two policies
    differ by noise, has no say. Both are shaped as the student's draws were. No gradient.

    Args:
      support: likeliest tokens of the teacher.
      full_weight: share of the gap on the whole vocabulary in the result; 1 leaves nothing of S.
      tokens, chosen, temperature, budget, lanes, chunk, shaping: see `gathered_log_probs`.

    Returns:
      the gap at the chosen tokens, 0 elsewhere.
    """
    vocab = _vocab(student.head, student.before)
    packing = Packing.of(chosen, budget, lanes, chunk or _chunk(student.before, budget, vocab))
    ours, theirs = packing.pack(student.before), packing.pack(teacher.before)
    shaper = Shaper(shaping, tokens, vocab, temperature, lanes)

    def gap(own: Array, other: Array, target: Array, places: TokenPlaces) -> Array:
        # What the student had said and could say there holds for its teacher too.
        view = shaper.tempered(student.head(own), places)
        advised = shaper.tempered(teacher.head(other), places)
        inside = shaper.support(view, target, places)
        return _gap(within(inside, advised), within(inside, view), target, support, full_weight)

    gaps = packing.in_chunks(gap, (ours, theirs, packing.pack(tokens), packing.places(shaping)))
    return jax.lax.stop_gradient(packing.unpack(gaps))


def _gap(
    teacher: Float[Array, "b c vocab"],
    student: Float[Array, "b c vocab"],
    targets: Int[Array, "b c"],
    support: int,
    full_weight: float,
) -> Float[Array, "b c"]:
    _, likeliest = jax.lax.top_k(teacher, min(support, teacher.shape[-1]))
    among = jnp.any(likeliest == targets[..., None], axis=-1)

    def gain(logits: Float[Array, "b c vocab"]) -> Float[Array, "b c"]:
        """Log-probability of the token on S, mixed with that on the vocabulary."""
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)
        # The token counts once: alone only where it is not among the likeliest.
        once = jnp.where(among[..., None], -jnp.inf, own)
        on_support = jnp.concatenate([jnp.take_along_axis(logits, likeliest, axis=-1), once], -1)
        small, full = (jax.nn.logsumexp(z, axis=-1) for z in (on_support, logits))
        return own[..., 0] - (1 - full_weight) * small - full_weight * full

    return gain(teacher) - gain(student)


def _token_statistics(
    logits: Float[Array, "*b vocab"],
    targets: Int[Array, "*b"],
    support: Bool[Array, "*b vocab"] | None,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """Log-probabilities of the targets, which are in the support, and entropies."""
    if len(logits) == 1:  # an axis of one makes sums slow: `models.common.products.without_ones`
        found = _token_statistics(logits[0], targets[0], None if support is None else support[0])
        return found[0][None], found[1][None]
    logits = within(support, logits)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    probabilities = jnp.exp(logits - normaliser[..., None])
    # What is impossible has no part in the entropy: 0 times minus infinity is no number.
    possible = logits if support is None else jnp.where(support, logits, 0.0)
    entropy = normaliser - jnp.sum(probabilities * possible, axis=-1)
    return picked - normaliser, jax.lax.stop_gradient(entropy)


def _chunk(before: Float[Array, "b t d"], budget: int, vocab: int) -> int:
    """Positions of a stream at a time: on a CPU in even pieces, elsewhere what fills a tile."""
    if platform() != "cpu":
        return CHUNK
    streams, length, width = before.shape
    together = max(LOGITS_ON_CPU // vocab, WIDTHS_ON_CPU * width)
    most, budget = min(max(together // streams, 1), CHUNK), min(budget, length)
    return -(-budget // -(-budget // most))


def _vocab(head: Head, inputs: Float[Array, "b c d"]) -> int:
    return jax.eval_shape(head, inputs[:, :1]).shape[-1]


def _chunks(tree: Any, size: int) -> Any:
    """Every `[b, c, ...]` as `[c / size, b, size, ...]`."""

    def cut(x: Array) -> Array:
        rows, length = x.shape[:2]
        return jnp.swapaxes(x.reshape(rows, length // size, size, *x.shape[2:]), 0, 1)

    return jax.tree.map(cut, tree)


def _unchunk(x: Array) -> Array:
    pieces, rows, size = x.shape
    return jnp.swapaxes(x, 0, 1).reshape(rows, pieces * size)
