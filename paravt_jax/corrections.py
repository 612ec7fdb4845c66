"""Off-policy corrections: importance weights, their bounds, and rejection.

Rollouts are drawn from the behaviour policy: by other programs than the learner's, perhaps in
another precision, from older weights. Learning from them as if the learner had drawn them is
biased. Here the ratio of both becomes weights, bounds on them, and the rejection of what is too far
away. Pure functions of log-probabilities, as sums and counts (law 5).

A sequence is one stream of tokens: a rollout with all its turns, or a sub-agent. Shapes: b
sequences, t tokens, whether or not several of them share a row in the learner's batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from paravt_jax.pytrees import ArrayLike, pytree
from paravt_jax.ranges import above
from paravt_jax.settings import Refused, Settings
from paravt_jax.surrogates import Level, log_ratios, safe_exp

_LEVELS: dict[str, Level] = {"token": "token", "geometric": "sequence", "product": "trajectory"}
"""Levels of weights as those of ratios."""


@dataclasses.dataclass(frozen=True)
class CorrectionConfig(Settings):
    """What makes up for a sampler that is not quite the learner. The defaults are the ParaVT
    release's; `docs/para_grpo.md` has those of other systems."""

    proximal: Literal["learner", "sampler"] = "learner"
    """From whose probabilities ratios are measured. "learner": its own at the beginning of the
    batch, and weights make up for the sampler (decoupled PPO, arXiv 2110.00641). "sampler": those
    that were drawn from (bypass): no forward pass for them, no weights, and clips act from the
    first optimiser step on."""
    weights: Literal["token", "product", "geometric", "none"] = "token"
    """Weight of a token's surrogate. "token": learner / behaviour of that token. "product": of all
    tokens of its sequence, multiplied. "geometric": their geometric mean. "none": always 1."""
    beyond: Literal["mask", "truncate"] = "mask"
    """A weight above `objective.behaviour_cap` or below `floor` becomes 0 ("mask") or that bound
    ("truncate"). The token stays in the count by which the loss is divided."""
    floor: Annotated[float | int | None, above(0)] = None
    """Lower bound of weights; None: there is none."""
    reject: Literal["token", "product", "geometric", "any"] | None = None
    """Leave out of the loss, and of its count, what has a weight beyond `reject_floor` or
    `reject_cap`: single tokens ("token"), or sequences by their "product" or "geometric" weight, or
    if the weight of "any" of their tokens is. None rejects nothing."""
    reject_floor: Annotated[float | int | None, above(0)] = None
    """Rejected below this; None: there is no such bound."""
    reject_cap: Annotated[float | int | None, above(0)] = None
    """Rejected above this; None: there is no such bound."""

    def check_together(self) -> None:
        """Refuse a rejection without bounds, and bounds the wrong way round."""
        if self.reject and self.reject_floor is None and self.reject_cap is None:
            raise Refused(
                self,
                "{reject} has nothing to reject by; set {reject_floor:name}, {reject_cap:name} or "
                "both",
            )
        if not _ordered(self.reject_floor, self.reject_cap):
            raise Refused(self, "{reject_floor} is above {reject_cap}; set it below")

    @property
    def bypass(self) -> bool:
        """Whether ratios are measured from the sampler's probabilities."""
        return self.proximal == "sampler"

    def check_cap(self, cap: float | int | None, section: Settings) -> None:
        """Refuse an upper bound of weights that does not fit the others.

        Raises:
            Refused: by `section`, which has the cap as `behaviour_cap` and this as `correction`.
        """
        if not _ordered(self.floor, cap):
            raise Refused(section, "{correction.floor} is above {behaviour_cap}; set it below")
        if self.beyond == "truncate" and self.floor is None and cap is None:
            raise Refused(
                section,
                "{correction.beyond} has nothing to truncate at; set {behaviour_cap:name}, "
                "{correction.floor:name} or both",
            )


def _ordered(low: float | int | None, high: float | int | None) -> bool:
    return low is None or high is None or low <= high


class Corrected(NamedTuple):
    """What becomes of each token."""

    factors: Float[Array, "b t"]
    """What its surrogate is multiplied with."""
    weights: Float[Array, "b t"]
    """Its importance: the factor, or in bypass the ratio learner / behaviour."""
    accepted: Bool[Array, "b t"]
    """Whether it is in the loss at all."""
    dropped: Bool[Array, "b t"]
    """Whether its weight was masked."""
    truncated: Bool[Array, "b t"]
    """Whether its weight was truncated."""


def correct(
    learner: Float[Array, "b t"],
    behaviour: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    config: CorrectionConfig,
    cap: float | int | None,
) -> Corrected:
    """What becomes of each token: w = learner / behaviour, bounded, and what is rejected.

    Which settings are which published method:

    * "token" with "truncate" and a cap: TIS (Yao et al. 2025, "Your Efficient RL Framework Secretly
      Brings You Off-Policy RL Training").
    * "token" with "mask" and a cap: equation 10 of the ParaVT release; with a floor too: IcePop
      (Ring-1T, arXiv 2510.18855).
    * "product" with "truncate" or "mask": Seq-TIS, Seq-MIS (Liu, Li et al. 2025, "When Speed Kills
      Stability", https://richardli.xyz/rl-collapse).
    * reject="geometric": Geo-RS (there, part 3), which does not reject long sequences for being
      long; the ratio of GSPO (arXiv 2507.18071). reject="any" with a floor: verl's veto.
    * proximal="sampler": verl's bypass mode.

    Args:
        learner: log-probabilities of the policy that weights correct towards; without a gradient.
        behaviour: of the sampler.
        weight: of each token; trained ones are above 0. Both log-probabilities are 0 elsewhere.
        config: which correction.
        cap: upper bound of weights; None: there is none.
    """

    ratio = functools.partial(_ratio, learner, behaviour, weight)
    accepted = _accepted(ratio, weight, config)
    never = jnp.zeros(weight.shape, bool)
    if config.bypass or config.weights == "none":
        ones = jnp.ones(weight.shape, jnp.float32)
        return Corrected(ones, ratio("token") if config.bypass else ones, accepted, never, never)
    weights = ratio(config.weights)
    beyond = ~inside(weights, config.floor, cap)
    if config.beyond == "truncate":
        weights = jnp.clip(weights, config.floor, cap)
        return Corrected(weights, weights, accepted, never, beyond)
    weights = jnp.where(beyond, 0.0, weights)
    return Corrected(weights, weights, accepted, beyond, never)


def _ratio(
    learner: Float[Array, "b t"],
    behaviour: Float[Array, "b t"],
    weight: Float[Array, "b t"],
    level: str,
) -> Float[Array, "b t"]:
    return safe_exp(log_ratios(learner, behaviour, weight, _LEVELS[level]))


def _accepted(
    ratio: Callable[[str], Float[Array, "b t"]],
    weight: Float[Array, "b t"],
    config: CorrectionConfig,
) -> Bool[Array, "b t"]:
    if config.reject is None:
        return jnp.ones(weight.shape, bool)
    ratios = ratio("token" if config.reject == "any" else config.reject)
    accepted = inside(ratios, config.reject_floor, config.reject_cap) | (weight <= 0)
    if config.reject == "any":
        return jnp.broadcast_to(accepted.all(axis=1, keepdims=True), accepted.shape)
    return accepted


def inside(
    values: Float[Array, "*b"], low: float | int | None, high: float | int | None
) -> Bool[Array, "*b"]:
    """Which values lie between bounds, of which None is none; NaN lies outside of any."""
    within = jnp.ones(values.shape, bool)
    if low is not None:
        within &= values >= low
    if high is not None:
        within &= values <= high
    return within


@pytree
@dataclasses.dataclass(frozen=True)
class CorrectionMetrics:
    """What the correction did, as float32 sums over trained tokens and their sequences."""

    sequences: Float[Array, ""]
    """Sequences with any trained token."""
    weight: Float[Array, ""]
    """Sum of the importance of tokens, 0 where they were rejected."""
    weight_squared: Float[Array, ""]
    """Sum of its squares."""
    dropped: Float[Array, ""]
    """Tokens whose weight was masked."""
    dropped_sequences: Float[Array, ""]
    """Sequences with any of them."""
    truncated: Float[Array, ""]
    """Tokens whose weight was truncated."""
    truncated_sequences: Float[Array, ""]
    """Sequences with any of them."""
    rejected: Float[Array, ""]
    """Rejected tokens."""
    rejected_sequences: Float[Array, ""]
    """Sequences with any of them."""

    @classmethod
    def of(cls, corrected: Corrected, trained: Shaped[Array, "b t"]) -> CorrectionMetrics:
        """Sums over tokens that are trained, and over sequences with any of these."""
        weights = jnp.where(trained & corrected.accepted, corrected.weights, 0.0)
        masks = {"dropped": corrected.dropped, "truncated": corrected.truncated}
        sums = {}
        for name, where in (masks | {"rejected": ~corrected.accepted}).items():
            sums[name] = _count(where & trained)
            sums[f"{name}_sequences"] = _count((where & trained).any(axis=1))
        squared = jnp.square(weights).sum()
        return cls(
            _count(trained.any(axis=1)), weight=weights.sum(), weight_squared=squared, **sums
        )

    def means(self, tokens: Float[ArrayLike, ""]) -> dict[str, Float[Array, ""]]:
        """Means over that many tokens and over sequences, under the names of the metrics file; 0
        without any."""
        tokens, sequences = jnp.maximum(tokens, 1.0), jnp.maximum(self.sequences, 1.0)
        squares = jnp.where(self.weight_squared > 0, self.weight_squared, 1.0)
        return {
            "dropped_fraction": self.dropped / tokens,
            "correction/dropped_sequences": self.dropped_sequences / sequences,
            "correction/truncated": self.truncated / tokens,
            "correction/truncated_sequences": self.truncated_sequences / sequences,
            "correction/rejected": self.rejected / tokens,
            "correction/rejected_sequences": self.rejected_sequences / sequences,
            "correction/weight_mean": self.weight / tokens,
            # Kish's: as many tokens of equal weight would tell as much.
            "correction/effective_share": jnp.square(self.weight) / squares / tokens,
        }


def _count(where: Shaped[Array, "*b"]) -> Float[Array, ""]:
    return jax.lax.stop_gradient(where).sum().astype(jnp.float32)
