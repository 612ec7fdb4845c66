"""What shapes the distribution that a token is drawn from, the same for sampler and learner.

    z = penalised(logits, seen) / temperature
    S = tokens that the grammar allows and whose log softmax(z) is at least the floor
    log mu(a) = z_a - logsumexp of z over S

The sampler decides S and notes for each token what brings it back: the state of the grammar and
the floor of the truncation. What was seen follows from the stream. The learner computes mu with
these, and its gradient runs through the normaliser (`docs/adr/0020`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.pytrees import ArrayLike, pytree

DEAD = -1
"""In a table of automata: a token that the state does not allow."""


@dataclasses.dataclass(frozen=True)
class Shaping:
    """What shaped the tokens of a batch besides temperature; None where no setting does."""

    penalty: float | None = None
    """Repetition penalty."""
    prompt_lengths: Int[ArrayLike, " b"] | None = None
    """What a stream holds from here on counts as seen; None: all of it."""
    floors: Float[ArrayLike, "b t"] | None = None
    """Log-probability below which tokens were cut off; minus infinity where none was."""
    grammar: Int[ArrayLike, "b t"] | None = None
    """State of `table` before each token."""
    table: Int[ArrayLike, "state vocab"] | None = None
    """State after a token, `DEAD` where it is not allowed."""

    @property
    def noted(self) -> tuple[ArrayLike | None, ArrayLike | None]:
        """What was noted of each token: `floors` and `grammar`."""
        return self.floors, self.grammar


@pytree
@dataclasses.dataclass(frozen=True)
class TokenPlaces:
    """Some tokens of the streams of each row: where they stand, and what was noted there."""

    lane: Int[Array, "b c"]
    """Which of the row's streams they are of."""
    index: Int[Array, "b c"]
    """Where in it."""
    floors: Float[Array, "b c"] | None
    grammar: Int[Array, "b c"] | None


class Shaper:
    """Shapes the logits of some tokens of a batch, those of `lanes` streams in one row."""

    def __init__(
        self,
        shaping: Shaping,
        tokens: Int[Array, "b t"],
        vocab: int,
        temperature: Float[Array, ""] | float,
        lanes: int = 1,
    ) -> None:
        self._shaping, self._temperature = shaping, temperature
        self._first = None
        if shaping.penalty is not None:
            first = first_seen(tokens, shaping.prompt_lengths, vocab)
            self._first = first.reshape(-1, lanes, vocab)

    def tempered(
        self, logits: Float[Array, "b c vocab"], places: TokenPlaces
    ) -> Float[Array, "b c vocab"]:
        """z of all tokens."""
        if self._first is not None and self._shaping.penalty is not None:
            first = jnp.take_along_axis(self._first, places.lane[..., None], axis=1)
            seen = first < places.index[..., None]
            logits = penalised(logits, seen, self._shaping.penalty)
        return logits / self._temperature

    def support(
        self, scores: Float[Array, "b c vocab"], targets: Int[Array, "b c"], places: TokenPlaces
    ) -> Bool[Array, "b c vocab"] | None:
        """S; None where it holds all tokens.

        At the edge of a truncation the learner may find a score on the other side of the floor,
        by rounding or because its weights have moved on. What was drawn is in S whatever happens.
        """
        inside = None
        if places.floors is not None:
            normaliser = jax.nn.logsumexp(scores, axis=-1)
            inside = scores >= (places.floors + normaliser)[..., None]
        if places.grammar is not None and self._shaping.table is not None:
            allowed = jnp.asarray(self._shaping.table)[places.grammar] != DEAD
            inside = allowed if inside is None else inside & allowed
        if inside is None:
            return None
        return inside | (jnp.arange(scores.shape[-1])[None, None] == targets[..., None])


def within(
    inside: Bool[Array, "*b vocab"] | None, scores: Float[Array, "*b vocab"]
) -> Float[Array, "*b vocab"]:
    """Scores, minus infinity outside of a set; None is the set of all."""
    return scores if inside is None else jnp.where(inside, scores, -jnp.inf)


def penalised(
    logits: Float[Array, "*b vocab"],
    seen: Bool[Array, "*b vocab"],
    penalty: Float[ArrayLike, "*#b 1"] | float,
) -> Float[Array, "*b vocab"]:
    """Logits of seen tokens moved towards less likely.

    Source: Keskar et al. 2019 (arXiv:1909.05858), section 4.1, with transformers' multiplication
    of negative logits, which a division would make likelier.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def first_seen(
    tokens: Int[Array, "b t"], prompt_lengths: Int[ArrayLike, " b"] | None, vocab: int
) -> Int[Array, "b vocab"]:
    """Where each token of the vocabulary first stands behind the prompt of a stream (None: there
    is no prompt in it); the length of the stream if nowhere. Token v counts as seen at t if this
    is below t."""
    rows, length = tokens.shape
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
    if prompt_lengths is not None:
        at = jnp.where(at < jnp.asarray(prompt_lengths)[:, None], length, at)
    nowhere = jnp.full((rows, vocab), length, jnp.int32)
    return nowhere.at[jnp.arange(rows)[:, None], tokens].min(at)
