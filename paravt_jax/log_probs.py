"""Log-probabilities of chosen tokens, without ever holding `[b, t, vocab]`.

Only positions that count are sent through the vocabulary head: they are gathered
first (a fixed number per row), then taken in chunks whose logits are recomputed in
the backward pass. Peak memory of the head is `b * chunk * vocab`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Head = Callable[[Float[Array, "b c d"]], Float[Array, "b c vocab"]]


def gathered_log_probs(
    hidden: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    chosen: Bool[Array, "b t"],
    head: Head,
    *,
    temperature: Float[Array, ""] | float,
    budget: int,
    chunk: int = 128,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Log-probability of each chosen token given those before it, and the entropy there.

    `log p(y_t) = z_t[y_t] / T - logsumexp(z_t / T)` where `z_t` are the logits at t - 1.

    Args:
      hidden: final hidden states of the whole stream.
      chosen: which tokens count; position 0 has no predecessor and never does.
      head: maps hidden states to float32 logits.
      temperature: the sampler's temperature, so that learner and sampler agree.
      budget: most chosen tokens in a row (static). Chosen tokens beyond it are dropped,
        so the caller must pass a bound.
      chunk: positions whose logits exist at one time.

    Returns:
      log-probabilities and entropies (no gradient), both 0 where not chosen.
    """
    chosen = chosen.at[:, 0].set(False)
    budget = -(-budget // chunk) * chunk if budget > chunk else budget
    chunk = min(chunk, budget)
    index = jax.vmap(lambda row: jnp.nonzero(row, size=budget, fill_value=0)[0])(chosen)
    inputs = jnp.take_along_axis(hidden, jnp.maximum(index - 1, 0)[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, index, axis=1)

    @jax.checkpoint
    def one_chunk(_, piece):
        return None, _token_statistics(head(piece[0]) / temperature, piece[1])

    pieces = (_chunks(inputs, chunk), _chunks(targets, chunk))
    _, (log_probs, entropies) = jax.lax.scan(one_chunk, None, pieces)
    back = jax.vmap(lambda place, value, size: size.at[place].add(value))
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    valid = index > 0
    scattered = [
        back(index, jnp.where(valid, _unchunk(x), 0.0), zeros) for x in (log_probs, entropies)
    ]
    return scattered[0], jax.lax.stop_gradient(scattered[1])


def _token_statistics(
    logits: Float[Array, "b c vocab"], targets: Int[Array, "b c"]
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    probabilities = jnp.exp(logits - normaliser[..., None])
    entropy = normaliser - jnp.sum(probabilities * logits, axis=-1)
    return picked - normaliser, jax.lax.stop_gradient(entropy)


def _chunks(x: Array, size: int) -> Array:
    rows, length = x.shape[:2]
    return jnp.swapaxes(x.reshape(rows, length // size, size, *x.shape[2:]), 0, 1)


def _unchunk(x: Array) -> Array:
    pieces, rows, size = x.shape
    return jnp.swapaxes(x, 0, 1).reshape(rows, pieces * size)
