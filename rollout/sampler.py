"""Draw one token per row, so that a row's draw depends on nothing but that row.

The randomness of a token is keyed by (seed of its row, position in its row's stream);
neither the place in the batch nor its neighbours enter.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are drawn. All of it is traced: changing a value never recompiles."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_p: float = 1.0
    """Draw only from the smallest set of likeliest tokens that holds this much probability."""

    def __post_init__(self) -> None:
        """Refuse impossible settings, naming field, value and remedy."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be >= 0 (0 means greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]; 1 keeps every token")


def row_keys(seeds: UInt[Array, " b"], positions: Int[Array, " b"]) -> Key[Array, " b"]:
    """Key of the token at `positions` in the stream of the row seeded by `seeds`."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(seeds, positions)


def nucleus(
    log_probs: Float[Array, "b vocab"], top_p: Float[Array, " b"]
) -> Bool[Array, "b vocab"]:
    """True for the smallest set of likeliest tokens whose mass reaches `top_p`.

    The likeliest token is always in; tokens as likely as the last one that is in are in
    too. Source: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1.
    """
    ordered = -jnp.sort(-log_probs, axis=-1)
    mass_before = jnp.cumsum(jnp.exp(ordered), axis=-1) - jnp.exp(ordered)
    inside = mass_before < top_p[:, None]
    threshold = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return log_probs >= threshold


def _truncate(
    log_probs: Float[Array, "b vocab"], top_p: Float[Array, " b"]
) -> Float[Array, "b vocab"]:
    """`log_probs` with everything outside the nucleus at minus infinity."""
    # Sorting the vocabulary costs more than the rest of the sampler: skip it when nobody asks.
    return jax.lax.cond(
        jnp.any(top_p < 1),
        lambda: jnp.where(nucleus(log_probs, top_p), log_probs, -jnp.inf),
        lambda: log_probs,
    )


def sample(
    logits: Float[Array, "b vocab"],
    keys: Key[Array, " b"],
    temperature: Float[Array, " b"],
    top_p: Float[Array, " b"],
) -> tuple[Int[Array, " b"], Float[Array, " b"]]:
    """One token per row by the Gumbel-max trick, and its log-probability.

    The log-probability is that under the tempered, *untruncated* distribution, the one
    that the learner recomputes; greedy rows (temperature 0) report temperature 1.

        token = argmax(log_softmax(logits / temperature) + gumbel)

    Source of the trick: Maddison et al. 2014 (arXiv:1411.0030), section 2.
    """
    greedy = temperature == 0
    scale = jnp.where(greedy, 1.0, temperature)[:, None]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / scale, axis=-1)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    noise = jnp.where(greedy[:, None], 0.0, noise)
    tokens = jnp.argmax(_truncate(log_probs, top_p) + noise, axis=-1).astype(jnp.int32)
    return tokens, jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)[:, 0]
