"""What a policy-gradient loss does with the ratio of the policy to its proximal self.

Four pure functions, one per idea: at which level the ratio is taken, PPO's clip, SAPO's soft gate,
and Reg-GRPO's regression. `paravt_jax.objectives` puts them into a loss.

Shapes: b rows, t tokens; a row's `g` neighbours are the rollouts of one prompt.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float, Shaped

_LARGEST_LOG_RATIO = 20.0
"""exp(20) = 5e8: far beyond any clip range, far below the overflow of float32."""

Level = Literal["token", "sequence", "trajectory"]
"""Levels of `log_ratios`."""


def safe_exp(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """exp(x) that neither overflows nor has a gradient where it would."""
    return jnp.exp(jnp.clip(x, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))


def row_mean(values: Float[Array, "b t"], weight: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Weighted mean of each row, at each of its tokens; 0 in a row without weight."""
    count = weight.sum(axis=1, keepdims=True)
    mean = (values * weight).sum(axis=1, keepdims=True) / jnp.where(count > 0, count, 1.0)
    return jnp.broadcast_to(mean, values.shape)


def log_ratios(
    log_probs: Float[Array, "b t"],
    proximal: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    level: Level = "token",
) -> Float[Array, "b t"]:
    """Log of the ratio q at each token.

    Args:
        log_probs, proximal: log-probabilities of the tokens, 0 where the weight is 0.
        weight: of each token; trained ones are above 0.
        level: "token", each its own (PPO, arXiv 1707.06347). "sequence", the mean over the row's
            tokens, so that q is their geometric mean (GSPO, arXiv 2507.18071). "trajectory", the
            sum over the row's tokens, so that q is the ratio of the whole answer's probabilities,
            which takes the answer for one action (RLOO, arXiv 2402.14740).
    """
    difference = log_probs - proximal
    if level == "sequence":
        return row_mean(difference, weight)
    if level == "trajectory":
        total = jnp.where(weight > 0, difference, 0.0).sum(axis=1, keepdims=True)
        return jnp.broadcast_to(total, difference.shape)
    return difference


def clipped(
    log_ratio: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    low: float | int = 0.2,
    high: float | int = 0.2,
    dual: float | int | None = None,
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"], Bool[Array, "b t"]]:
    """PPO: max(-A q, -A clip(q, 1 - low, 1 + high)), at most dual * |A| (arXiv 1912.09729).

    Returns:
        the loss, where the clip stops the gradient, and where the dual clip does.
    """
    ratio = safe_exp(log_ratio)
    free, bound = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - low, 1 + high)
    loss = jnp.maximum(free, bound)
    if dual is None:
        return loss, free < bound, jnp.zeros(ratio.shape, bool)
    ceiling = dual * jnp.abs(advantages)
    return jnp.minimum(loss, ceiling), free < bound, ceiling < loss


def soft_gated(
    log_ratio: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    positive: float | int = 1.0,
    negative: float | int = 1.05,
) -> Float[Array, "b t"]:
    """SAPO (arXiv 2511.20347): -A (4 / tau) sigmoid(tau (q - 1)), tau by the sign of A."""
    tau = jnp.where(advantages > 0, positive, negative)
    return -advantages * 4.0 / tau * jax.nn.sigmoid(tau * (safe_exp(log_ratio) - 1.0))


def regressed(
    log_ratio: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    group_size: int,
    eps: float | int = 1e-2,
    detached: bool = True,
) -> Float[Array, "b t"]:
    """Reg-GRPO: (A_i - (rho_i - mean rho) / (std rho + eps))^2 (DeepVideo-R1, arXiv 2506.07464).

    rho_i is the log-ratio of rollout i and A_i its normalised reward. Instead of being followed
    along a gradient that a clip cuts off, the advantage is what the log-ratio is fitted to. Mean
    and std are over the group; a row without tokens has no part in them. Each row's loss stands at
    all of its tokens.

    The paper leaves open, and this is how we read it:

    * log pi(y|x) is the sum over tokens, as written: level="trajectory" of `log_ratios`;
      "sequence" is the mean, which does not weigh long answers more.
    * eps: at the first step on a batch all rho are 0 and so is their std. eps keeps the loss
      finite there, and its gradient is that of the policy gradient times 2 / eps.
    * the std is the unbiased one, as that of the rewards, so that the fit can be exact.
    * whether mean and std have gradients: not with `detached`, where each rollout is drawn to a
      target of its own. With them the gradient is that of the correlation of rho and A, which
      has no component along rho.

    Args:
        log_ratio: of each row, at each of its tokens.
        advantages: likewise.
        weight: of each token.
        group_size: neighbouring rows that answer one prompt; must divide the rows.
    """
    present = (weight.sum(axis=1) > 0).reshape(-1, group_size)
    rho = log_ratio[:, 0].reshape(-1, group_size)
    count = present.astype(jnp.float32).sum(axis=1, keepdims=True)
    mean = jnp.where(present, rho, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(present, rho - mean, 0.0)
    std = _root(jnp.square(centred).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1))
    if detached:
        centred, std = rho - stop_gradient(mean), stop_gradient(std)
    fitted = (centred / (std + eps)).reshape(-1, 1)
    return jnp.square(advantages - fitted)


def _root(x: Shaped[Array, "*b"]) -> Float[Array, "*b"]:
    """Square root whose gradient at 0 is 0 instead of infinite."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)
