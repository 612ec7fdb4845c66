"""How evenly a mixture of experts is used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def load_balance(
    router_logits: Float[Array, "l b t e"], valid: Bool[Array, "b t"], per_token: int
) -> Float[Array, " b"]:
    """The balance loss of each row, mean over layers: 1 where all experts are used alike, up to
    `e / per_token` where the same ones serve every token.

        e / k * sum_e f_e P_e,  f_e: tokens that chose expert e, P_e: mean probability of e

    Per sequence, as DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20): a product of means over
    the batch (Switch, arXiv 2101.03961) would depend on how the batch is cut into micro-batches.

    Args:
      router_logits: of each sparse layer.
      valid: which tokens are real; a row without any gets 0.
      per_token: experts that serve each token, k.
    """
    experts = router_logits.shape[-1]
    probabilities = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    _, choices = jax.lax.top_k(router_logits, per_token)
    chosen = jnp.sum(jax.nn.one_hot(choices, experts), axis=-2)
    weight = valid / jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    share, probability = (jnp.einsum("lbte,bt->lbe", x, weight) for x in (chosen, probabilities))
    return experts / per_token * jnp.mean(jnp.sum(share * probability, axis=-1), axis=0)
