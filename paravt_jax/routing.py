"""Which experts of a mixture serve each token, and how evenly they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.pytrees import ArrayLike, pytree
from paravt_jax.shared_rows import SharedRows

UNKNOWN = -1
"""In the place of an expert where nobody noted which one served."""


@dataclasses.dataclass(frozen=True)
class RoutingShape:
    """Shape of a record of routing: per token its experts in the first layer that has any, then
    those of the next. 48 layers with 8 of 128 experts take 384 bytes, 3.8 MB for 10,000 tokens."""

    layers: int
    """Layers with experts."""
    per_token: int
    """Experts that serve a token."""
    experts: int

    @property
    def dtype(self) -> np.dtype:
        """Of a record: the smallest that holds every expert and `UNKNOWN`."""
        return np.dtype(np.int8 if self.experts <= 128 else np.int16)

    @property
    def choices(self) -> int:
        """Experts that serve a token in all layers."""
        return self.layers * self.per_token

    def unknown(self, *tokens: int) -> np.ndarray:
        """The record of tokens that nobody noted, `[*tokens, choices]`."""
        return np.full((*tokens, self.choices), UNKNOWN, self.dtype)


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts served the tokens of a stream when the sampler read and drew them."""

    prompt: np.ndarray
    """int8 or int16 `[t, choices]`, see `RoutingShape`; one array for all rollouts of a group."""
    own: np.ndarray
    """`[t, choices]`: of the tokens after the prompt."""

    @classmethod
    def joined(cls, parts: Sequence[Routing]) -> Routing:
        """That of several pieces of a stream, one after the other."""
        return cls(parts[0].prompt, np.concatenate([part.own for part in parts]))


@pytree
@dataclasses.dataclass(frozen=True)
class RoutingGap:
    """By how much the routers would have chosen otherwise than what was replayed; sums."""

    choices: Float[ArrayLike, ""]
    """Replayed experts that a router would not have chosen."""
    of_choices: Float[ArrayLike, ""]
    tokens: Float[ArrayLike, ""]
    """Tokens with such an expert in any layer."""
    of_tokens: Float[ArrayLike, ""]

    def means(self) -> dict[str, Array]:
        """Shares, for `metrics.jsonl`."""
        return {
            "router/choices_differ": self.choices / jnp.maximum(self.of_choices, 1),
            "router/tokens_differ": self.tokens / jnp.maximum(self.of_tokens, 1),
        }


def routing_gap(
    router_logits: Float[Array, "l rows t e"],
    routing: Int[Array, "rows t choices"],
    valid: Bool[Array, "rows t"],
) -> RoutingGap:
    """How far routers agree with a record of routing, on the valid tokens that it knows."""
    layers = len(router_logits)
    replayed = jnp.moveaxis(routing.reshape(*routing.shape[:2], layers, -1), 2, 0)
    known = (replayed[0, ..., 0] >= 0) & valid
    probabilities = jax.nn.softmax(router_logits, axis=-1)
    _, own = jax.lax.top_k(probabilities, replayed.shape[-1])
    found = jnp.any(replayed[..., :, None] == own[..., None, :].astype(replayed.dtype), axis=-1)
    differ = ~found & known[None, ..., None]
    tokens = jnp.sum(known, dtype=jnp.float32)
    return RoutingGap(
        choices=jnp.sum(differ, dtype=jnp.float32),
        of_choices=tokens * (layers * replayed.shape[-1]),
        tokens=jnp.sum(jnp.any(differ, axis=(0, 3)), dtype=jnp.float32),
        of_tokens=tokens,
    )


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
