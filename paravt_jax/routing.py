"""How evenly a mixture of experts is used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from paravt_jax.shared_rows import SharedRows


def load_balance(
    router_logits: Float[Array, "l rows t e"],
    valid: Bool[Array, "rows t"],
    per_token: int,
    shared: SharedRows | None = None,
) -> Float[Array, " b"]:
    """The balance loss of each stream, mean over layers: 1 where all experts are used alike, up to
    `e / per_token` where the same ones serve every token.

        e / k * sum_e f_e P_e,  f_e: tokens that chose expert e, P_e: mean probability of e

    Per sequence, as DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20): a product of means over
    the batch (Switch, arXiv 2101.03961) would depend on how the batch is cut into micro-batches.

    Args:
      router_logits: of each sparse layer.
      valid: which tokens are real; a stream without any gets 0.
      per_token: experts that serve each token, k.
      shared: how rows hold streams, whose prompt then counts for each; None: rows are streams.
    """
    experts = router_logits.shape[-1]
    probabilities = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    _, choices = jax.lax.top_k(router_logits, per_token)
    chosen = jnp.sum(jax.nn.one_hot(choices, experts), axis=-2)
    real = valid[None, ..., None]
    sums = (_per_stream(jnp.where(real, x, 0), shared) for x in (chosen, probabilities))
    tokens = _per_stream(real.astype(jnp.float32), shared)
    share, probability = (x / jnp.maximum(tokens, 1) for x in sums)
    return experts / per_token * jnp.mean(jnp.sum(share * probability, axis=-1), axis=0)


def _per_stream(
    values: Float[Array, "l rows t e"], shared: SharedRows | None
) -> Float[Array, "l b e"]:
    """Sums over the tokens of each stream, its prompt included."""
    if shared is None:
        return jnp.sum(values, axis=2)
    visible = shared.seen(values.shape[2]).astype(values.dtype)
    sums = jnp.einsum("lrte,rnt->lrne", values, visible, precision="highest")
    return sums.reshape(len(values), -1, values.shape[3])
