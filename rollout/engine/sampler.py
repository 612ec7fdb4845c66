"""Draw one token per row, so that a row's draw depends on nothing but that row.

The randomness of a token is keyed by (seed of its row, position in its row's stream);
neither the place in the batch nor its neighbours enter. All settings are arrays with one
value per row, so that requests of any kind share one compiled step.

The settings act in the order of transformers' logits processors: repetition penalty,
structural constraint, temperature, top-k, top-p, min-p. The log-probability of a token is that
under the distribution that they leave, and what the learner needs to compute it again is noted
(`paravt_jax.shaping`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from paravt_jax import ranges
from paravt_jax.marks import Mark
from paravt_jax.pytrees import ArrayLike, pytree
from paravt_jax.settings import Refused, Settings
from paravt_jax.shaping import penalised, within


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Settings):
    """How the tokens of one request are drawn. Changing a value never recompiles."""

    temperature: Annotated[float, ranges.at_least(0)] = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: Annotated[float, ranges.above_to(0, 1)] = 1.0
    """Draw only from the smallest set of likeliest tokens that holds this much probability."""
    top_k: Annotated[int, ranges.at_least(0)] = 0
    """Draw only from this many likeliest tokens; 0 keeps every token."""
    min_p: Annotated[float, ranges.within(0, 1)] = 0.0
    """Draw only tokens at least this likely relative to the likeliest; 0 keeps every token."""
    repetition_penalty: Annotated[float, ranges.above(0)] = 1.0
    """Makes tokens that the stream holds after its prompt, given ones included, less likely."""
    stop: Annotated[tuple[str, ...], Mark.MAY_BE_BLANK] = ()
    """Texts that end a turn. The token that completes one still belongs to the turn."""
    stop_ids: Annotated[tuple[int, ...], ranges.at_least(0)] = ()
    """Token ids that end a turn, besides the model's own."""
    constrain: Literal["", "calls"] = ""
    """The grammar that the turn must follow: `calls`, whose calls fit the tools' schemas; empty for
    free text."""

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are cut off."""
        return bool(self.top_k or self.top_p < 1 or self.min_p)

    def check_together(self) -> None:
        """Refuse a lone text where texts are expected."""
        if isinstance(self.stop, str):
            raise Refused(self, "{stop}: pass a tuple of texts")


@pytree
@dataclasses.dataclass(frozen=True)
class Draw:
    """What decides the draws of each row of a batch, all of it traced."""

    seeds: UInt[ArrayLike, " b"]
    limits: Int[ArrayLike, " b"]
    """Most tokens of the turn."""
    temperature: Float[ArrayLike, " b"]
    top_p: Float[ArrayLike, " b"]
    top_k: Int[ArrayLike, " b"]
    min_p: Float[ArrayLike, " b"]
    repetition_penalty: Float[ArrayLike, " b"]

    @classmethod
    def of(
        cls, sampling: Sequence[SamplingConfig], seeds: Sequence[int], limits: Sequence[int]
    ) -> Draw:
        """One row for each request, on the host.

        Raises:
            ValueError: the three sequences differ in length.
        """
        if not len(sampling) == len(seeds) == len(limits):
            raise ValueError(
                f"{len(sampling)} settings, {len(seeds)} seeds and {len(limits)} limits: "
                "pass one of each per row"
            )
        return cls(
            seeds=np.array(seeds, np.uint32),
            limits=np.array(limits, np.int32),
            temperature=np.array([own.temperature for own in sampling], np.float32),
            top_p=np.array([own.top_p for own in sampling], np.float32),
            top_k=np.array([own.top_k for own in sampling], np.int32),
            min_p=np.array([own.min_p for own in sampling], np.float32),
            repetition_penalty=np.array([own.repetition_penalty for own in sampling], np.float32),
        )


@pytree
@dataclasses.dataclass(frozen=True)
class Alternatives:
    """The likeliest tokens of a draw, likeliest first. One of log-probability minus infinity could
    not be drawn."""

    tokens: Int[ArrayLike, "*b k"]
    log_probs: Float[ArrayLike, "*b k"]

    @classmethod
    def none(cls, *shape: int) -> Alternatives:
        """Of draws that nobody asked about."""
        return cls(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


@pytree
@dataclasses.dataclass(frozen=True)
class Drawn:
    """One token per row."""

    tokens: Int[Array, " b"]
    log_probs: Float[Array, " b"]
    """Under the distribution that the token was drawn from: tempered, penalised, truncated and
    constrained. Greedy rows report temperature 1."""
    constrained: Bool[Array, " b"]
    """Whether the structural constraint changed the token."""
    forced: Bool[Array, " b"]
    """Whether it left no other."""
    floors: Float[Array, " b"]
    """Log-probability, before truncation, between those of the tokens that could be drawn and
    those that were cut off; minus infinity if none was."""
    alternatives: Alternatives | None = None
    """`[b, k]`, under the distribution of `log_probs`, where they are asked for."""


def row_keys(seeds: UInt[Array, " b"], positions: Int[Array, " b"]) -> Key[Array, " b"]:
    """Key of the token at `positions` in the stream of the row seeded by `seeds`."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(seeds, positions)


def draw_tokens(
    logits: Float[Array, "b vocab"],
    keys: Key[Array, " b"],
    draw: Draw,
    seen: Bool[Array, "b vocab"] | None = None,
    allowed: Bool[Array, "b vocab"] | None = None,
    listed: Bool[Array, " b"] | None = None,
    alternatives: int = 0,
) -> Drawn:
    """One token per row by the Gumbel-max trick.

        token = argmax(log_softmax(logits / temperature) + gumbel)

    Source of the trick: Maddison et al. 2014 (arXiv:1411.0030), section 2.

    Args:
        logits: of the next token, of any float type.
        keys: see `row_keys`.
        draw: settings of each row.
        seen: tokens to which the repetition penalty applies, see `mark_seen`. None: no penalty.
        allowed: tokens that the structural constraint permits, at least one per row. None: all.
        listed: rows whose likeliest tokens are wanted, `alternatives` of them; they cost a search
            of the vocabulary only while there is such a row. None: of no row, ever.
    """
    greedy = draw.temperature == 0
    scale = jnp.where(greedy, 1.0, draw.temperature)[:, None]
    logits = logits.astype(jnp.float32)
    if seen is not None:
        logits = penalised(logits, seen, jnp.asarray(draw.repetition_penalty)[:, None])
    scores = jax.nn.log_softmax(logits / scale, axis=-1)
    noise = _noise(keys, greedy, logits.shape[1])
    choice = _free(scores, noise, draw)
    if allowed is not None:
        choice = jax.lax.cond(
            jnp.all(allowed),
            lambda: choice,
            lambda: _obedient(scores, noise, draw, allowed, choice),
        )
    everything = jnp.zeros(len(scores)), jnp.full(len(scores), -jnp.inf)
    masses, floors = jax.lax.cond(
        jnp.all(choice.kept), lambda: everything, lambda: _extent(scores, choice.kept, allowed)
    )
    chosen = jnp.take_along_axis(scores, choice.tokens[:, None], axis=-1)[:, 0]
    likeliest = None
    if listed is not None:
        shares = within(choice.kept, scores) - masses[:, None]
        likeliest = _likeliest(shares, listed, alternatives)
    own = choice.tokens, chosen - masses, choice.constrained, choice.forced
    return Drawn(*own, floors, likeliest)


def _likeliest(
    shares: Float[Array, "b vocab"], listed: Bool[Array, " b"], count: int
) -> Alternatives:
    def found() -> Alternatives:
        log_probs, tokens = jax.lax.top_k(shares, count)
        return Alternatives(tokens.astype(jnp.int32), log_probs)

    nothing = Alternatives.none(len(shares), count)
    return jax.lax.cond(jnp.any(listed), found, lambda: nothing)


def mark_seen(
    seen: Bool[Array, "b vocab"], tokens: Int[Array, " b"], active: Bool[Array, " b"]
) -> Bool[Array, "b vocab"]:
    """`seen` with one more token in every active row."""
    return seen.at[jnp.arange(len(tokens)), tokens].max(active)


def lowest_score(scores: Float[Array, "b vocab"], draw: Draw) -> Float[Array, " b"]:
    """Tokens whose score is at least this stay in the draw; tokens that tie share their fate.

    Each truncation acts on what the ones before it left: top-k (Fan et al. 2018,
    arXiv:1805.04833), top-p (Holtzman et al. 2020, arXiv:1904.09751, section 3.1), min-p
    (Nguyen et al. 2024, arXiv:2407.01082). The likeliest token always stays.

    Args:
        scores: log-probabilities up to a constant per row; minus infinity excludes a token.
        draw: settings of each row.
    """
    none = jnp.full(scores.shape[0], -jnp.inf)
    by_count = jax.lax.cond(
        jnp.any(draw.top_k > 0), lambda: _top_k(scores, draw.top_k), lambda: none
    )
    by_mass = jax.lax.cond(
        jnp.any(draw.top_p < 1), lambda: _top_p(scores, by_count, draw.top_p), lambda: none
    )
    # A probability relative to the likeliest is a difference of scores: no normalisation.
    by_ratio = scores.max(axis=-1) + jnp.log(draw.min_p)
    return jnp.maximum(jnp.maximum(by_count, by_mass), by_ratio)


def _noise(
    keys: Key[Array, " b"], greedy: Bool[Array, " b"], vocab: int
) -> Float[Array, "b vocab"]:
    """Gumbel noise of each row; none for greedy rows, and none is made if all are greedy."""

    def drawn() -> Float[Array, "b vocab"]:
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(keys)
        return jnp.where(greedy[:, None], 0.0, noise)

    # Behind the branch the noise is an array: fused into the argmax, XLA computes it repeatedly.
    return jax.lax.cond(jnp.all(greedy), lambda: jnp.zeros((len(keys), vocab)), drawn)


@pytree
@dataclasses.dataclass(frozen=True)
class _Choice:
    """What is drawn, and which tokens could have been."""

    tokens: Int[Array, " b"]
    kept: Bool[Array, "b vocab"]
    constrained: Bool[Array, " b"]
    forced: Bool[Array, " b"]


def _free(scores: Float[Array, "b vocab"], noise: Float[Array, "b vocab"], draw: Draw) -> _Choice:
    """The draw without a constraint."""
    kept, never = _kept(scores, draw), jnp.zeros(len(scores), bool)
    return _Choice(_pick(scores, noise, kept), kept, never, never)


def _obedient(
    scores: Float[Array, "b vocab"],
    noise: Float[Array, "b vocab"],
    draw: Draw,
    allowed: Bool[Array, "b vocab"],
    free: _Choice,
) -> _Choice:
    """The draw under a constraint, and whether the same noise leads elsewhere without it.

    Without truncation, the tokens that both draws have in common are a fair sample of those drawn
    under the constraint: which token wins among the allowed ones says nothing about how high it
    wins, hence about whether another one wins over it.
    """
    kept = allowed & _kept(within(allowed, scores), draw)
    tokens = _pick(scores, noise, kept)
    return _Choice(tokens, kept, tokens != free.tokens, allowed.sum(axis=-1) == 1)


def _kept(scores: Float[Array, "b vocab"], draw: Draw) -> Bool[Array, "b vocab"]:
    """Tokens that truncation leaves."""
    return scores >= lowest_score(scores, draw)[:, None]


def _pick(
    scores: Float[Array, "b vocab"], noise: Float[Array, "b vocab"], kept: Bool[Array, "b vocab"]
) -> Int[Array, " b"]:
    """The token that wins among those that are kept."""
    return jnp.argmax(within(kept, scores + noise), axis=-1).astype(jnp.int32)


def _extent(
    scores: Float[Array, "b vocab"],
    kept: Bool[Array, "b vocab"],
    allowed: Bool[Array, "b vocab"] | None,
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """Log of the probability of all kept tokens, 0 if nothing is missing; and the floor of the
    truncation: halfway, so that rounding does not move a token to its other side."""
    mass = jnp.where(kept.all(axis=-1), 0.0, jax.nn.logsumexp(within(kept, scores), axis=-1))
    cut_off = ~kept if allowed is None else allowed & ~kept
    highest = within(cut_off, scores).max(axis=-1)
    lowest = jnp.where(kept, scores, jnp.inf).min(axis=-1)
    return mass, jnp.where(cut_off.any(axis=-1), (highest + lowest) / 2, -jnp.inf)


def _top_k(scores: Float[Array, "b vocab"], top_k: Int[ArrayLike, " b"]) -> Float[Array, " b"]:
    """Lowest score among the `top_k` highest."""
    reached = _reached(scores, jnp.ones_like(scores), top_k.astype(jnp.float32))
    return jnp.where(top_k > 0, reached, -jnp.inf)


def _top_p(
    scores: Float[Array, "b vocab"], floor: Float[Array, " b"], top_p: Float[ArrayLike, " b"]
) -> Float[Array, " b"]:
    """Lowest score in the nucleus of the tokens that score at least `floor`."""
    probs = jax.nn.softmax(jnp.where(scores >= floor[:, None], scores, -jnp.inf), axis=-1)
    # Rounded, the mass may reach 1 before the last token: a row that keeps all says so.
    return jnp.where(top_p < 1, _reached(scores, probs, top_p), -jnp.inf)


def _reached(
    scores: Float[Array, "b vocab"], weights: Float[Array, "b vocab"], total: Float[ArrayLike, " b"]
) -> Float[Array, " b"]:
    """The highest score s such that the tokens that score s or more weigh `total` together.

    Minus infinity if all together do not. A search over the 32 bits of s, exact because floats
    are in the order of their bits; it reads the scores 32 times, which is several times faster
    than sorting them.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits < sign, bits | sign, ~bits)

    def narrow(step: Int[Array, ""], found: UInt[Array, " b"]) -> UInt[Array, " b"]:
        tried = found | (sign >> step.astype(jnp.uint32))
        weight = jnp.where(order >= tried[:, None], weights, 0).sum(axis=-1)
        return jnp.where(weight >= total, tried, found)

    found = jax.lax.fori_loop(0, 32, narrow, jnp.zeros(len(total), jnp.uint32))
    value = jnp.where(found < sign, ~found, found ^ sign)
    return jnp.where(found > 0, jax.lax.bitcast_convert_type(value, jnp.float32), -jnp.inf)
