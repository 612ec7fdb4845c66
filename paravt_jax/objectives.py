"""The policy-gradient objective, as pure functions of log-probabilities.

Everything here returns sums and counts. The caller adds them up over micro-batches and devices
and divides once, by the count of the whole batch, so that the loss depends on neither.

Shapes: b rows, t tokens; index t of every array concerns the token at t.
"""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Shaped

from paravt_jax.records import ArrayLike, pytree

_LARGEST_LOG_RATIO = 20.0
"""exp(20) = 5e8: far beyond any clip range, far below the overflow of float32."""
_LARGEST_KL = 10.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which policy-gradient objective. The defaults are those of the ParaVT release."""

    clip_low: float | int = 0.2
    """A ratio is clipped at 1 - clip_low ..."""
    clip_high: float | int = 0.2
    """... and at 1 + clip_high (DAPO, arXiv 2503.14476, sets it higher)."""
    dual_clip: float | int | None = None
    """Bound the loss of a negative advantage A at dual_clip * |A| (arXiv 1912.09729)."""
    behaviour_cap: float | int | None = 5.0
    """Drop tokens whose weight exp(proximal - behaviour) is above this; None keeps all."""
    ratio: str = "token"
    """One ratio per "token", or one per row ("sequence"), the geometric mean of its tokens' (GSPO,
    arXiv 2507.18071)."""
    surrogate: str = "clip"
    """PPO's "clip", or the smooth gate of SAPO, "soft" (arXiv 2511.20347)."""
    soft_positive: float | int = 1.0
    """Temperature of the soft gate where the advantage is positive."""
    soft_negative: float | int = 1.05
    """Temperature of the soft gate where the advantage is not positive."""
    kl_weight: float | int = 0.0
    """Weight of the divergence from the reference inside the loss."""
    kl_estimator: str = "k3"
    """One of "k1", "k2", "k3", see `divergence`; k1 has no useful gradient inside a loss."""
    anchor: str = "sequence"
    """Where the format anchor acts. "sequence": in the reward. "position": in the advantages of
    structural tokens. "logprob": as their likelihood in the loss, which alone is done here."""
    anchor_weight: float | int = 0.0
    """Weight of the "logprob" anchor."""
    anchor_paired_only: bool = False
    """Let the anchors at "position" and "logprob" act only on tags that are opened and closed as
    they should be (`structure`), instead of on every tag that was written."""
    aggregation: str = "token"
    """Mean over all tokens of the batch ("token"), or over rows of each row's mean ("sequence")."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value that has no meaning."""
        _check_range("clip_low", self.clip_low, 0.0, 1.0)
        for name in ("clip_high", "kl_weight", "anchor_weight"):
            _check_range(name, getattr(self, name), 0.0)
        for name in ("soft_positive", "soft_negative"):
            _check_range(name, getattr(self, name), 1e-6)
        _check_range("dual_clip", self.dual_clip, 1.0)
        _check_range("behaviour_cap", self.behaviour_cap, 1e-6)
        _check_choice("ratio", self.ratio, ("token", "sequence"))
        _check_choice("surrogate", self.surrogate, ("clip", "soft"))
        _check_choice("kl_estimator", self.kl_estimator, ("k1", "k2", "k3"))
        _check_choice("anchor", self.anchor, ("sequence", "position", "logprob"))
        _check_choice("aggregation", self.aggregation, ("token", "sequence"))


@pytree
@dataclasses.dataclass(frozen=True)
class ObjectiveMetrics:
    """What to watch, as float32 sums over trained tokens; `merge` adds up micro-batches."""

    tokens: Float[Array, ""]
    """Trained tokens."""
    ratio: Float[Array, ""]
    """Sum of pi / proximal."""
    clipped: Float[Array, ""]
    """Tokens where the clip stops the gradient."""
    dual_clipped: Float[Array, ""]
    """Tokens at the bound of the dual clip."""
    dropped: Float[Array, ""]
    """Tokens dropped by the behaviour cap."""
    kl: Float[Array, ""]
    """Sum of the estimated divergence from the reference; 0 without a reference."""
    gap: Float[Array, ""]
    """Sum of |proximal - behaviour|: how far sampler and learner disagree."""
    gap_max: Float[Array, ""]
    """Largest |proximal - behaviour|."""

    def merge(self, other: ObjectiveMetrics) -> ObjectiveMetrics:
        """Both together."""
        total = jax.tree.map(jnp.add, self, other)
        return dataclasses.replace(total, gap_max=jnp.maximum(self.gap_max, other.gap_max))

    def means(self) -> dict[str, Float[Array, ""]]:
        """Means over tokens, under the names of the metrics file; 0 without tokens."""
        count = jnp.maximum(self.tokens, 1.0)
        return {
            "ratio": self.ratio / count,
            "clip_fraction": self.clipped / count,
            "dual_clip_fraction": self.dual_clipped / count,
            "dropped_fraction": self.dropped / count,
            "kl": self.kl / count,
            "logprob/gap_mean": self.gap / count,
            "logprob/gap_max": self.gap_max,
        }


def policy_loss(
    log_probs: Float[ArrayLike, "b t"],
    proximal: Float[ArrayLike, "b t"],
    behaviour: Float[ArrayLike, "b t"],
    advantages: Float[ArrayLike, "b t"],
    mask: Shaped[ArrayLike, "b t"],
    config: ObjectiveConfig,
    reference: Float[ArrayLike, "b t"] | None = None,
    structure: Shaped[ArrayLike, "b t"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], ObjectiveMetrics]:
    """Decoupled PPO loss (arXiv 2110.00641; AReaL, arXiv 2505.24298), as a sum and its count.

        q_t = exp(log pi - log proximal),  w_t = exp(log proximal - log behaviour)
        l_t = max(-A q, -A clip(q, 1 - low, 1 + high)) * w_t * [w_t <= cap]
              + kl_weight * KL_t(pi, reference) - anchor_weight * s_t * log pi
        loss = sum_t m_t l_t / sum_t m_t                      (aggregation="token")

    Equations 10-12 of the ParaVT release. Dropped tokens stay in the count.

    Args:
        log_probs: of the policy that is trained; the only argument with a gradient.
        proximal: of the policy at the beginning of the step.
        behaviour: of the sampler.
        advantages: per token; averaged over a row's tokens if `config.ratio == "sequence"`.
        mask: weight of each token, 0 where not trained. What stands there is never looked at,
            not even if it is NaN.
        config: which objective.
        reference: of the frozen policy; needed if `config.kl_weight` is not 0.
        structure: nonzero on structural tokens; needed for anchor="logprob".

    Returns:
        `(loss_sum, count, metrics)`: divide the sum of sums by the sum of counts. The count is
        the sum of the mask, or with aggregation="sequence" the number of rows with any token.
        An empty mask gives a sum of 0, a count of 0 and gradients of 0.

    Raises:
        ValueError: `config` needs an argument that is None.
    """
    arrays = [log_probs, proximal, behaviour, advantages, mask]
    chex.assert_rank(arrays, 2)
    chex.assert_equal_shape(arrays)
    _require(config, reference, structure)
    weight = jnp.asarray(mask, jnp.float32)
    trained = weight > 0
    log_probs = _within(trained, log_probs)
    proximal, behaviour, advantages = (
        stop_gradient(_within(trained, x)) for x in (proximal, behaviour, advantages)
    )
    if config.ratio == "sequence":
        advantages = _row_mean(advantages, weight)
    log_ratio = _log_ratio(log_probs, proximal, weight, config.ratio)
    surrogate, clipped, dual_clipped = _surrogate(log_ratio, advantages, config)
    importance, kept = behaviour_weights(proximal, behaviour, config.behaviour_cap)
    loss = surrogate * importance
    kl = jnp.zeros_like(loss)
    if reference is not None:
        reference = stop_gradient(_within(trained, reference))
        kl = divergence(log_probs, reference, config.kl_estimator)
        loss += config.kl_weight * kl
    if config.anchor == "logprob" and structure is not None:
        loss -= config.anchor_weight * (jnp.asarray(structure) > 0) * log_probs
    metrics = _metrics(
        trained, jnp.exp(log_ratio), clipped, dual_clipped, ~kept, kl, proximal - behaviour
    )
    return *aggregate(loss, weight, config.aggregation), metrics


def aggregate(
    values: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    aggregation: str = "token",
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and count of a weighted mean over tokens, or over rows of the mean of each row."""
    values = jnp.where(weight > 0, values * weight, 0.0)
    if aggregation == "token":
        return values.sum(), weight.sum()
    row_weight = weight.sum(axis=1)
    rows = values.sum(axis=1) / jnp.where(row_weight > 0, row_weight, 1.0)
    return rows.sum(), (row_weight > 0).sum().astype(jnp.float32)


def behaviour_weights(
    proximal: Float[Array, "b t"], behaviour: Float[Array, "b t"], cap: float | int | None
) -> tuple[Float[Array, "b t"], Shaped[Array, "b t"]]:
    """w = exp(proximal - behaviour), 0 where above the cap, and where it was kept.

    Equation 10 of the ParaVT release: dropped, not truncated, and without a lower bound.
    """
    weights = _safe_exp(proximal - behaviour)
    kept = jnp.ones(weights.shape, bool) if cap is None else weights <= cap
    return jnp.where(kept, weights, 0.0), kept


def divergence(
    log_probs: Float[Array, "*b"],
    reference: Float[Array, "*b"],
    estimator: str = "k1",
) -> Float[Array, "*b"]:
    """Estimate of KL(pi || reference) from a sample of pi, token by token.

    With d = log pi - log reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
    (J. Schulman, "Approximating KL divergence", 2020). Clamped to [-10, 10].
    """
    _check_choice("kl_estimator", estimator, ("k1", "k2", "k3"))
    chex.assert_equal_shape([log_probs, reference])
    difference = log_probs - reference
    if estimator == "k2":
        difference = jnp.square(difference) / 2
    if estimator == "k3":
        difference = _safe_exp(-difference) - 1 + difference
    return jnp.clip(difference, -_LARGEST_KL, _LARGEST_KL)


def _require(config: ObjectiveConfig, reference: object, structure: object) -> None:
    if config.kl_weight and reference is None:
        raise ValueError(f"kl_weight={config.kl_weight} needs reference log-probs; pass reference")
    if config.anchor == "logprob" and structure is None:
        raise ValueError("anchor='logprob' needs the structural positions; pass structure")


def _within(trained: Shaped[Array, "b t"], values: ArrayLike) -> Float[Array, "b t"]:
    """Values where trained, else 0, so that padding can poison neither value nor gradient."""
    return jnp.where(trained, jnp.asarray(values, jnp.float32), 0.0)


def _row_mean(values: Float[Array, "b t"], weight: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """Weighted mean of each row, at each of its tokens."""
    count = weight.sum(axis=1, keepdims=True)
    mean = (values * weight).sum(axis=1, keepdims=True) / jnp.where(count > 0, count, 1.0)
    return jnp.broadcast_to(mean, values.shape)


def _log_ratio(
    log_probs: Float[Array, "b t"],
    proximal: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    level: str,
) -> Float[Array, "b t"]:
    """log q per token, or its mean over the row (GSPO), bounded so that exp cannot overflow."""
    log_ratio = log_probs - proximal
    if level == "sequence":
        log_ratio = _row_mean(log_ratio, weight)
    return jnp.clip(log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _surrogate(
    log_ratio: Float[Array, "b t"], advantages: Float[Array, "b t"], config: ObjectiveConfig
) -> tuple[Float[Array, "b t"], Shaped[Array, "b t"], Shaped[Array, "b t"]]:
    """Loss per token, where the clip binds, and where the dual clip binds."""
    ratio = jnp.exp(log_ratio)
    never = jnp.zeros(ratio.shape, bool)
    if config.surrogate == "soft":
        return _soft_gate(ratio, advantages, config), never, never
    free = -advantages * ratio
    bound = -advantages * jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    loss = jnp.maximum(free, bound)
    if config.dual_clip is None:
        return loss, free < bound, never
    ceiling = config.dual_clip * jnp.abs(advantages)
    return jnp.minimum(loss, ceiling), free < bound, ceiling < loss


def _soft_gate(
    ratio: Float[Array, "b t"], advantages: Float[Array, "b t"], config: ObjectiveConfig
) -> Float[Array, "b t"]:
    """-A * (4 / tau) * sigmoid(tau * (q - 1)); tau depends on the sign of A (SAPO)."""
    tau = jnp.where(advantages > 0, config.soft_positive, config.soft_negative)
    return -advantages * 4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0))


def _metrics(
    trained: Shaped[Array, "b t"],
    ratio: Float[Array, "b t"],
    clipped: Shaped[Array, "b t"],
    dual_clipped: Shaped[Array, "b t"],
    dropped: Shaped[Array, "b t"],
    kl: Float[Array, "b t"],
    gap: Float[Array, "b t"],
) -> ObjectiveMetrics:
    def total(values: Shaped[Array, "b t"]) -> Float[Array, ""]:
        return jnp.where(trained, stop_gradient(values), 0.0).sum().astype(jnp.float32)

    gap = stop_gradient(jnp.abs(gap))
    return ObjectiveMetrics(
        tokens=total(jnp.ones_like(ratio)),
        ratio=total(ratio),
        clipped=total(clipped),
        dual_clipped=total(dual_clipped),
        dropped=total(dropped),
        kl=total(kl),
        gap=total(gap),
        gap_max=jnp.where(trained, gap, 0.0).max(initial=0.0),
    )


def _safe_exp(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return jnp.exp(jnp.clip(x, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))


def _check_range(
    name: str, value: float | int | None, lowest: float, highest: float = float("inf")
) -> None:
    if value is not None and not lowest <= value <= highest:
        raise ValueError(f"{name}={value} must lie in [{lowest:g}, {highest:g}]")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(choices)}")
