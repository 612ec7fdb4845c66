"""The policy-gradient objective, as pure functions of log-probabilities.

Everything here returns sums and counts. The caller adds them up over micro-batches and devices
and divides once, by the count of the whole batch, so that the loss depends on neither.

Shapes: b rows, t tokens; index t of every array concerns the token at t.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Literal

import chex
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Shaped

from paravt_jax.anchors import AnchorFunction
from paravt_jax.corrections import Corrected, CorrectionConfig, CorrectionMetrics, correct
from paravt_jax.plugins import Own, load
from paravt_jax.pytrees import ArrayLike, pytree
from paravt_jax.ranges import at_least, within
from paravt_jax.settings import Refused, Settings
from paravt_jax.surrogates import (
    Level,
    clipped,
    log_ratios,
    regressed,
    row_mean,
    safe_exp,
    soft_gated,
)

KlEstimator = Literal["k1", "k2", "k3"]
"""See `divergence`."""
# A token that the policy has all but given up must not be the whole loss of its batch.
_LARGEST_KL = 10.0
Surrogate = Callable[[Float[Array, "b t"], Float[Array, "b t"]], Float[Array, "b t"]]
"""A surrogate of your own: the loss of each token, from the ratio pi / proximal and the advantage
(0 where not trained). Only the ratio has a gradient."""


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Settings):
    """Which policy-gradient objective. The defaults are those of the ParaVT release."""

    clip_low: Annotated[float | int, within(0, 1)] = 0.2
    """A ratio is clipped at 1 - clip_low."""
    clip_high: Annotated[float | int, at_least(0)] = 0.2
    """A ratio is clipped at 1 + clip_high (DAPO, arXiv 2503.14476, sets it higher)."""
    dual_clip: Annotated[float | int | None, at_least(1)] = None
    """Bound the loss of a negative advantage A at dual_clip * |A| (arXiv 1912.09729)."""
    behaviour_cap: Annotated[float | int | None, at_least(1e-6)] = 5.0
    """Upper bound of the weights that make up for the sampler, exp(proximal - behaviour): by
    default tokens above it are dropped. None: there is none."""
    correction: CorrectionConfig = CorrectionConfig()
    ratio: Level = "token"
    """One ratio per "token", or one per row: the geometric mean of its tokens' ("sequence", GSPO),
    or their product ("trajectory", RLOO). See `surrogates.log_ratios`."""
    surrogate: Literal["clip", "soft", "regression"] | Own | Surrogate = "clip"
    """PPO's "clip", the smooth gate of SAPO ("soft"), the "regression" of DeepVideo-R1, or a
    function of your own (`Surrogate`), as `path/to/file.py:name` or `package.module:name`."""
    soft_positive: Annotated[float | int, at_least(1e-6)] = 1.0
    """Temperature of the soft gate where the advantage is positive."""
    soft_negative: Annotated[float | int, at_least(1e-6)] = 1.05
    """Temperature of the soft gate where the advantage is not positive."""
    regression_eps: Annotated[float | int, at_least(1e-6)] = 1e-2
    """Added to the standard deviation of log-ratios, see `surrogates.regressed`."""
    regression_detached: bool = True
    """Whether mean and standard deviation of log-ratios are constants to the gradient."""
    kl_weight: Annotated[float | int, at_least(0)] = 0.0
    """Weight of the divergence from the reference inside the loss."""
    kl_estimator: KlEstimator = "k3"
    """One of "k1", "k2", "k3", see `divergence`; k1 has no useful gradient inside a loss."""
    anchor: Literal["sequence", "position", "logprob"] | Own | AnchorFunction = "sequence"
    """Where the format anchor acts. "sequence": in the reward. "position": in the advantages of
    structural tokens. "logprob": as their likelihood in the loss, which alone is done here. Or in
    advantages as a function of your own says, given as `path/to/file.py:name` or
    `package.module:name`; see `paravt_jax.anchors`."""
    anchor_weight: Annotated[float | int, at_least(0)] = 0.0
    """Weight of the "logprob" anchor, or of your own."""
    anchor_paired_only: bool = False
    """Let the anchors at "position" and "logprob" act only on tags that are opened and closed as
    they should be (`structure`), instead of on every tag that was written."""
    aggregation: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of the batch ("token", DAPO), over rows of each row's mean ("sequence",
    GRPO), or over rows of each row's sum divided by `constant_length` ("constant", Dr. GRPO)."""
    constant_length: Annotated[int | None, at_least(1)] = None
    """Tokens that stand for the length of every row (Dr. GRPO: the most that one may have)."""

    def check_together(self) -> None:
        """Refuse a level without rows, a mean without their length, and bounds that contradict
        one another."""
        if self.surrogate == "regression" and self.ratio == "token":
            raise Refused(
                self,
                "{surrogate} compares whole rollouts, and {ratio} has none; set "
                "{ratio:=trajectory}, or {ratio:=sequence} for a mean over tokens",
            )
        if self.aggregation == "constant" and self.constant_length is None:
            raise Refused(self, "{aggregation} divides by a length; set {constant_length:name}")
        self.correction.check_cap(self.behaviour_cap, self)

    def computes_proximal(self, updates: int) -> bool:
        """Whether a batch that gets so many optimiser steps takes a forward pass for the
        log-probabilities that ratios are measured from."""
        return updates > 1 and not self.correction.bypass

    @property
    def own_surrogate(self) -> bool:
        """Whether the surrogate is a function of the user's."""
        return isinstance(self.surrogate, Own)

    @property
    def own_anchor(self) -> bool:
        """Whether the anchor is a function of the user's."""
        return isinstance(self.anchor, Own)


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
    kl: Float[Array, ""]
    """Sum of the estimated divergence from the reference; 0 without a reference."""
    entropy: Float[Array, ""]
    """Sum of the policy's entropy where each token was chosen; 0 where it is not given."""
    gap: Float[Array, ""]
    """Sum of |learner - behaviour|: how far sampler and learner disagree."""
    gap_max: Float[Array, ""]
    """Largest |learner - behaviour|."""
    correction: CorrectionMetrics

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
            "kl": self.kl / count,
            "entropy": self.entropy / count,
            "logprob/gap_mean": self.gap / count,
            "logprob/gap_max": self.gap_max,
            **self.correction.means(self.tokens),
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
    entropy: Float[ArrayLike, "b t"] | None = None,
    group_size: int | None = None,
    added: Float[ArrayLike, "b t"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], ObjectiveMetrics]:
    """Decoupled PPO loss (arXiv 2110.00641; AReaL, arXiv 2505.24298), as a sum and its count.

        q_t = exp(log pi - log proximal),  w_t = exp(log proximal - log behaviour)
        l_t = max(-A q, -A clip(q, 1 - low, 1 + high)) * w_t * [w_t <= cap]
              + kl_weight * KL_t(pi, reference) - anchor_weight * s_t * log pi
        loss = sum_t m_t l_t / sum_t m_t                      (aggregation="token")

    Equations 10-12 of the ParaVT release. Other settings put another surrogate for the maximum
    (`paravt_jax.surrogates`), other weights for w_t, and 0 for m_t of what is rejected
    (`paravt_jax.corrections`), or another mean (`aggregate`).

    Args:
        log_probs: of the policy that is trained; but for `added` the only argument with a gradient.
        proximal, behaviour: of the policy at the beginning of the step, and of the sampler, from
            which q_t is measured in bypass.
        advantages: per token; averaged over a row's tokens unless `config.ratio == "token"`.
        mask: weight of each token, 0 where not trained; what stands there, NaN too, is not seen.
        config: which objective.
        reference: of the frozen policy; needed if `config.kl_weight` is not 0.
        structure: nonzero on structural tokens; needed for anchor="logprob".
        entropy: of the policy where each token was chosen, for the metrics alone.
        group_size: neighbouring rows that answer one prompt, whole; for surrogate="regression".
        added: loss of each token besides, in the same mean.

    Returns:
        `(loss_sum, count, metrics)`: divide the sum of sums by the sum of counts, see `aggregate`.
        An empty mask gives 0 for all, and for gradients.

    Raises:
        ValueError: `config` needs an argument that is None, or groups do not fill the rows.
    """
    arrays = [log_probs, proximal, behaviour, advantages, mask]
    _require(config, arrays, reference, structure, group_size)
    weight = jnp.asarray(mask, jnp.float32)
    trained = weight > 0
    log_probs, fixed = _within(trained, log_probs), functools.partial(_fixed, trained)
    learner, behaviour, advantages = map(fixed, (proximal, behaviour, advantages))
    reference = None if reference is None else fixed(reference)
    corrected = correct(learner, behaviour, weight, config.correction, config.behaviour_cap)
    weight = jnp.where(corrected.accepted, weight, 0.0)
    policies = log_probs, behaviour if config.correction.bypass else learner, reference
    factors = corrected.factors, advantages, weight
    loss, watched = _token_losses(*policies, *factors, config, group_size)
    loss += _besides(log_probs, structure, added, config)
    gap = jnp.abs(learner - behaviour)
    metrics = _metrics(trained, corrected, gap, entropy=entropy, **watched)
    return *aggregate(loss, weight, config.aggregation, config.constant_length), metrics


def _token_losses(
    log_probs: Float[Array, "b t"],
    proximal: Float[Array, "b t"],
    reference: Float[Array, "b t"] | None,
    factors: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    config: ObjectiveConfig,
    group_size: int | None,
) -> tuple[Float[Array, "b t"], dict[str, Shaped[Array, "b t"]]]:
    """Surrogate and divergence of each token, and what to watch of them."""
    if config.ratio != "token":
        advantages = row_mean(advantages, weight)
    log_ratio = log_ratios(log_probs, proximal, weight, config.ratio)
    surrogate, clip, dual_clip = _surrogate(log_ratio, advantages, weight, config, group_size)
    # With one step per batch the ratio is 1, and this weight still acts: it measures how far the
    # sampler's numerics, or its older weights, are from the learner's.
    loss = surrogate * factors
    kl = jnp.zeros_like(loss)
    if reference is not None:
        kl = divergence(log_probs, reference, config.kl_estimator)
        loss += config.kl_weight * kl
    ratio = safe_exp(log_ratio)
    return loss, {"ratio": ratio, "clipped": clip, "dual_clipped": dual_clip, "kl": kl}


def _besides(
    log_probs: Float[Array, "b t"],
    structure: Shaped[ArrayLike, "b t"] | None,
    added: Float[ArrayLike, "b t"] | None,
    config: ObjectiveConfig,
) -> Float[Array, "b t"] | float:
    """What a token loses besides its surrogate and divergence."""
    loss = 0.0 if added is None else jnp.asarray(added)
    if config.anchor == "logprob" and structure is not None:
        structural = jnp.asarray(structure, jnp.float32) > 0
        loss -= config.anchor_weight * structural.astype(jnp.float32) * log_probs
    return loss


def aggregate(
    values: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    aggregation: str = "token",
    constant_length: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum and count of a mean over the tokens of a batch, so that parts of it can be added up.

    * "token": sum of w_t l_t over all tokens; the count is the sum of w_t (DAPO, arXiv 2503.14476).
    * "sequence": sum over rows of each row's weighted mean; the count is the number of rows with
      any token (GRPO, arXiv 2402.03300).
    * "constant": sum of w_t l_t over all tokens / `constant_length`; the count is that number of
      rows. Long rows weigh neither more nor less per token (Dr. GRPO, arXiv 2503.20783).
    """
    # Not a bare product: 0 times the NaN of padding is NaN.
    values = jnp.where(weight > 0, values * weight, 0.0)
    if aggregation == "token":
        return values.sum(), weight.sum()
    row_weight = weight.sum(axis=1)
    rows = (row_weight > 0).sum().astype(jnp.float32)
    if aggregation == "constant":
        return values.sum() / (constant_length or 1), rows
    means = values.sum(axis=1) / jnp.where(row_weight > 0, row_weight, 1.0)
    return means.sum(), rows


def divergence(
    log_probs: Float[Array, "*b"],
    reference: Float[Array, "*b"],
    estimator: KlEstimator = "k1",
) -> Float[Array, "*b"]:
    """Estimate of KL(pi || reference) from a sample of pi, token by token.

    With d = log pi - log reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d
    (J. Schulman, "Approximating KL divergence", 2020). Clamped to [-10, 10].
    """
    chex.assert_equal_shape([log_probs, reference])
    difference = log_probs - reference
    if estimator == "k2":
        difference = jnp.square(difference) / 2
    if estimator == "k3":
        difference = safe_exp(-difference) - 1 + difference
    return jnp.clip(difference, -_LARGEST_KL, _LARGEST_KL)


def _require(
    config: ObjectiveConfig,
    arrays: list[ArrayLike],
    reference: object,
    structure: object,
    group_size: int | None,
) -> None:
    chex.assert_rank(arrays, 2)
    chex.assert_equal_shape(arrays)
    rows = len(arrays[0])
    if config.kl_weight and reference is None:
        raise ValueError(f"kl_weight={config.kl_weight} needs reference log-probs; pass reference")
    if config.anchor == "logprob" and structure is None:
        raise ValueError("anchor='logprob' needs the structural positions; pass structure")
    if config.surrogate == "regression" and (not group_size or rows % group_size):
        raise ValueError(
            f"surrogate='regression' compares the rollouts of a prompt: group_size={group_size} "
            f"must divide the {rows} rows"
        )


def _within(trained: Shaped[Array, "b t"], values: ArrayLike) -> Float[Array, "b t"]:
    """Values where trained, else 0, so that padding can poison neither value nor gradient."""
    return jnp.where(trained, jnp.asarray(values, jnp.float32), 0.0)


def _fixed(trained: Shaped[Array, "b t"], values: ArrayLike) -> Float[Array, "b t"]:
    return stop_gradient(_within(trained, values))


def _surrogate(
    log_ratio: Float[Array, "b t"],
    advantages: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    config: ObjectiveConfig,
    group_size: int | None,
) -> tuple[Float[Array, "b t"], Shaped[Array, "b t"], Shaped[Array, "b t"]]:
    """Loss per token, where the clip binds, and where the dual clip binds."""
    if config.surrogate == "clip":
        return clipped(log_ratio, advantages, config.clip_low, config.clip_high, config.dual_clip)
    if config.own_surrogate:
        loss = _own_loss(str(config.surrogate), safe_exp(log_ratio), advantages)
    elif config.surrogate == "soft":
        loss = soft_gated(log_ratio, advantages, config.soft_positive, config.soft_negative)
    else:
        eps, detached = config.regression_eps, config.regression_detached
        loss = regressed(log_ratio, advantages, weight, group_size or 1, eps, detached)
    never = jnp.zeros(loss.shape, bool)
    return loss, never, never


def _own_loss(
    surrogate: str, ratio: Float[Array, "b t"], advantages: Float[Array, "b t"]
) -> Float[Array, "b t"]:
    # A user's function may promote types and ranks, also where jax is told to refuse that.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loss = load(surrogate)(ratio, advantages)
    if not isinstance(loss, jax.Array) or loss.shape != ratio.shape:
        raise ValueError(
            f"objective.surrogate={surrogate} returned {jnp.shape(loss)} for ratios of "
            f"{ratio.shape}; return one loss per token"
        )
    return loss.astype(jnp.float32)


def _metrics(
    trained: Shaped[Array, "b t"],
    corrected: Corrected,
    gap: Float[Array, "b t"],
    **values: Shaped[ArrayLike, "b t"] | None,
) -> ObjectiveMetrics:
    """Sums over trained tokens of what `ObjectiveMetrics` names; 0 of what is not given."""

    def within(x: Shaped[ArrayLike, "b t"] | None) -> Float[Array, "b t"]:
        x = jnp.zeros(trained.shape) if x is None else jnp.asarray(x)
        return jnp.where(trained, stop_gradient(x).astype(jnp.float32), 0.0)

    return ObjectiveMetrics(
        tokens=trained.sum().astype(jnp.float32),
        gap=within(gap).sum(),
        gap_max=within(gap).max(initial=0.0),
        correction=CorrectionMetrics.of(corrected, trained),
        **{name: within(x).sum() for name, x in values.items()},
    )
