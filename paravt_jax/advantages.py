"""From rewards to advantages.

Sequence-level functions run on the host in float64, because their inputs are a few hundred
numbers. Token-level functions are JAX, and sharded arrays are reduced over all devices.
Everywhere, index t of a token-level array concerns the token at t (not the prediction made there).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from paravt_jax.objectives import KlEstimator, divergence
from paravt_jax.pytrees import ArrayLike
from paravt_jax.ranges import above, at_least
from paravt_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class AdvantageConfig(Settings):
    """How rewards become advantages. The defaults are GRPO's.

    The released recipe is `reward_scale=10, reward_bias=-0.2, reward_clip=20, kl_weight=0.01,
    whiten_tokens=True`.
    """

    normalise: Literal["group", "batch", "none"] = "group"
    """Subtract the mean of the "group", of the whole "batch", or nothing ("none")."""
    scale_by_std: bool = True
    """Divide by the standard deviation; False is Dr. GRPO."""
    leave_one_out: bool = False
    """Leave each rollout out of its own mean; RLOO."""
    ddof: Literal[0, 1] = 1
    """1 divides the variance by n - 1, 0 by n. A single rollout has std 1 with 1."""
    eps: Annotated[float | int, above(0)] = 1e-5
    """Added to the standard deviation."""
    reward_scale: Annotated[float | int, above(0)] = 1.0
    """Rewards are first shaped as clip((r + bias) * scale, -clip, clip)."""
    reward_bias: float | int = 0.0
    """Added to rewards, see `reward_scale`."""
    reward_clip: Annotated[float | int | None, above(0)] = None
    """Largest size of a shaped reward, see `reward_scale`; None clips nothing."""
    difficulty_weighted: bool = False
    """Weigh each group by how hard it is; VITAL's DGRPO, see `difficulty_weights`."""
    kl_weight: Annotated[float | int, at_least(0)] = 0.0
    """Weight of the divergence from the reference inside the reward, see `kl_to_go`."""
    kl_estimator: KlEstimator = "k1"
    """Its estimator, see `objectives.divergence`."""
    whiten_tokens: bool = False
    """Normalise advantages over all generated tokens of the batch at the end, see `whiten`."""


def rollout_advantages(
    rewards: Float[np.ndarray, "p g"],
    config: AdvantageConfig,
    difficulty: Float[np.ndarray, "p g"] | None = None,
) -> Float[np.ndarray, "p g"]:
    """Shape the rewards, then `group_advantages`, then `difficulty_weights`, as `config` says.

    Args:
        rewards: what is normalised: the reward of each rollout, or one term of it.
        config: how.
        difficulty: what tells how hard a group is: the whole reward. None takes `rewards`.
    """
    advantages = group_advantages(shape_rewards(rewards, config), config)
    if not config.difficulty_weighted:
        return advantages
    return advantages * difficulty_weights(rewards if difficulty is None else difficulty)


def turn_advantages(
    values: Float[np.ndarray, "p g n"],
    config: AdvantageConfig,
    difficulty: Float[np.ndarray, "p g"],
) -> Float[np.ndarray, "p g n"]:
    """`rollout_advantages` of each turn among the turns of the same number.

    What one turn earns depends on no other turn of its rollout.

    Args:
        values: of each turn; NaN where a rollout has no such turn, whose advantage is 0.
        config: how they are normalised.
        difficulty: the whole rewards, see `rollout_advantages`.
    """
    # The weight is that of the whole rollout, applied once below.
    plain = dataclasses.replace(config, difficulty_weighted=False)
    pools = [slice(None)] if config.normalise == "batch" else range(len(values))
    advantages = np.zeros(values.shape)
    for pool, turn in itertools.product(pools, range(values.shape[2])):
        present = np.isfinite(values[pool, ..., turn])
        if present.any():
            of_turn = rollout_advantages(values[pool, ..., turn][present][None], plain)
            advantages[pool, ..., turn][present] = of_turn[0]
    if config.difficulty_weighted:
        advantages *= difficulty_weights(difficulty)[..., None]
    return advantages


def shape_rewards(
    rewards: Float[np.ndarray, "p g"], config: AdvantageConfig
) -> Float[np.ndarray, "p g"]:
    """r' = clip((r + bias) * scale, -clip, clip); equation 1 of the ParaVT release.

    The release uses scale 10, bias -0.2 and clip 20, which makes every reward above 2.2 the same.
    The default changes nothing.
    """
    shaped = (np.asarray(rewards, np.float64) + config.reward_bias) * config.reward_scale
    clip = config.reward_clip
    return shaped if clip is None else np.clip(shaped, -clip, clip)


def group_advantages(
    rewards: Float[np.ndarray, "p g"], config: AdvantageConfig = AdvantageConfig()
) -> Float[np.ndarray, "p g"]:
    """A_i = (r_i - mean) / (std + eps) over the g rollouts of each of p prompts.

    Equation 2 of the ParaVT release; GRPO (arXiv 2402.03300, section 4.1.2). Without
    `scale_by_std` it is Dr. GRPO (arXiv 2503.20783), with `leave_one_out` RLOO's baseline
    (arXiv 2402.14740), around which the std is then taken.

    Returns:
        float64 `[p, g]`; exactly 0 where all rewards of a group (or batch) are equal.

    Raises:
        ValueError: a reward is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    chex.assert_rank(rewards, 2)
    if not np.isfinite(rewards).all():
        raise ValueError("rewards hold NaN or infinity; check the reward function")
    if config.normalise == "none":
        return rewards
    groups = rewards if config.normalise == "group" else rewards.reshape(1, -1)
    centred = groups - _baseline(groups, config.leave_one_out)
    # Equal rewards: their mean may be off by one ulp, which eps would blow up.
    centred = np.where(np.ptp(groups, axis=1, keepdims=True) == 0, 0.0, centred)
    if config.scale_by_std:
        centred = centred / (_std(centred, config.ddof) + config.eps)
    return centred.reshape(rewards.shape)


def difficulty_weights(rewards: Float[np.ndarray, "p g"]) -> Float[np.ndarray, "p 1"]:
    """w = (clamp(2 - mean of the group, 0, 1) + 1) / 2, the difficulty weight of VITAL's DGRPO.

    Hard groups, of mean reward 1 at most, weigh 1; groups of mean 2 and more weigh 1/2 (arXiv
    2508.04416). It multiplies advantages, as in VITAL's code. On rewards, as its paper writes it,
    the standard deviation would divide it out again.
    """
    mean = np.asarray(rewards, np.float64).mean(axis=1, keepdims=True)
    return (np.clip(2.0 - mean, 0.0, 1.0) + 1.0) / 2.0


def has_reward_variance(rewards: Float[np.ndarray, "p g"]) -> Bool[np.ndarray, " p"]:
    """Which groups have a gradient: their rewards differ by more than rounding.

    Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2) trains on these groups alone.
    """
    # The same terms added in another order differ in their last bits.
    return np.ptp(np.asarray(rewards, np.float64), axis=1) > 1e-9


def overlong_penalty(
    lengths: Shaped[np.ndarray, "*b"], limit: int, margin: int
) -> Float[np.ndarray, "*b"]:
    """Soft over-long punishment of DAPO (arXiv 2503.14476, equation 13), in [-1, 0].

    0 up to `limit - margin` tokens, then falling linearly to -1 at `limit`, and -1 beyond.

    Raises:
        ValueError: the margin is not within (0, limit].
    """
    if not 0 < margin <= limit:
        raise ValueError(f"margin={margin}: must be above 0 and at most limit={limit}")
    return np.clip((limit - margin - np.asarray(lengths, np.float64)) / margin, -1.0, 0.0)


def kl_to_go(
    mask: Shaped[ArrayLike, "b t"],
    behaviour: Float[ArrayLike, "b t"],
    reference: Float[ArrayLike, "b t"],
    estimator: KlEstimator = "k1",
) -> Float[Array, "b t"]:
    """Divergence from the reference that each generated token is charged with: its own and that
    of all later ones, 0 where `mask` is 0.

    As a reward that every token pays, -kl_weight * KL_t, it enters the advantages of all tokens
    before it (InstructGPT, arXiv 2203.02155; equations 3-6 of the ParaVT release).
    """
    generated = jnp.asarray(mask, jnp.float32) > 0
    kl = divergence(jnp.asarray(behaviour), jnp.asarray(reference), estimator)
    # Masked before the sum: what stands between generated tokens may be NaN.
    paid = _sum_from_here(jnp.where(generated, kl, 0.0))
    return jnp.where(generated, paid, 0.0)


def whiten(
    values: Float[ArrayLike, "*b"],
    mask: Shaped[ArrayLike, "*b"],
    eps: float | int = 1e-5,
) -> Float[Array, "*b"]:
    """(x - mean) / (std + eps) over the masked values; equation 7 of the ParaVT release.

    Masked-out values become 0. If nothing is masked in, the values come back unchanged.
    """
    values, mask = jnp.asarray(values, jnp.float32), jnp.asarray(mask, jnp.float32) > 0
    chex.assert_equal_shape([values, mask])
    count = mask.sum().astype(jnp.float32)
    mean = jnp.where(mask, values, 0.0).sum() / jnp.maximum(count, 1)
    # Centred before squaring: in float32 the difference of two means of squares loses its digits.
    centred = jnp.where(mask, values - mean, 0.0)
    variance = jnp.square(centred).sum() / jnp.maximum(count - 1, 1)
    std = jnp.where(count > 1, jnp.sqrt(variance), 1.0)
    return jnp.where(count > 0, centred / (std + eps), values)


def anchored_advantages(
    task: Float[ArrayLike, " b"],
    anchor: Float[ArrayLike, "b t"],
    mask: Shaped[ArrayLike, "b t"],
    weight: float | int,
) -> Float[Array, "b t"]:
    """A_t = A_task + weight * A_anchor,t on generated tokens, 0 elsewhere.

    The "position" reading of ParaVT's selective anchoring (project page of arXiv 2605.20342):
    the anchored part of the format reward acts on structural tokens only.

    Args:
        task: group-normalised rewards without the anchor (`RewardBreakdown.task`).
        anchor: what the anchor is to each token, 0 off the tags (`structure.tag_credit`).
        mask: nonzero where the token was generated.
        weight: lambda, `RewardRules.anchor_weight`.
    """
    task, anchor = jnp.asarray(task, jnp.float32), jnp.asarray(anchor, jnp.float32)
    chex.assert_rank([task, anchor, mask], [1, 2, 2])
    advantages = task[:, None] + weight * anchor
    return jnp.where(jnp.asarray(mask, jnp.float32) > 0, advantages, 0.0)


def reweighted_advantages(
    advantages: Float[ArrayLike, "b t"],
    teacher_gap: Float[ArrayLike, "b t"],
    coefficient: float | int | Float[Array, ""] = 0.5,
    lowest: float | int = 0.8,
    highest: float | int = 1.2,
) -> Float[Array, "b t"]:
    """VISD's direction-magnitude decoupling (arXiv 2605.06094): A_t = A ((1 - s) + s w_t).

        w_t = clip(exp(sign(A) * teacher_gap_t), lowest, highest)

    The reward decides the direction, and a teacher that knows the answer decides how much each
    token matters: with A > 0 those that it finds likelier than the student does, with A < 0 those
    that it finds less likely. No advantage changes its sign while `lowest` is above 0.

    Args:
        advantages: per token; where they are 0 the gap is never looked at.
        teacher_gap: log-probability of the student's token under the teacher, minus that under
            the student.
        coefficient: s in [0, 1]; 0 leaves advantages as they are. See `annealed`.
        lowest, highest: bounds of the weight.
    """
    advantages = jnp.asarray(advantages, jnp.float32)
    # Tokens without an advantage may lack a gap: NaN times 0 would be NaN.
    gap = jnp.where(advantages == 0, 0.0, jnp.asarray(teacher_gap, jnp.float32))
    weight = jnp.clip(jnp.exp(jnp.sign(advantages) * gap), lowest, highest)
    return advantages * ((1.0 - coefficient) + coefficient * weight)


def annealed(start: float | int, step: int, steps: int) -> float:
    """`start` at step 0, falling linearly to 0 at `steps`, and 0 from there on."""
    return float(start) * max(0.0, 1.0 - step / steps)


def _baseline(groups: np.ndarray, leave_one_out: bool) -> np.ndarray:
    """Mean of each group, or of the others of the group (0 for a lone rollout)."""
    if not leave_one_out:
        return groups.mean(axis=1, keepdims=True)
    return (groups.sum(axis=1, keepdims=True) - groups) / max(groups.shape[1] - 1, 1)


def _std(centred: np.ndarray, ddof: int) -> np.ndarray:
    """Standard deviation of centred groups; 1 where `ddof` leaves no degree of freedom."""
    count = centred.shape[1] - ddof
    if count == 0:
        return np.ones((len(centred), 1))
    return np.sqrt(np.square(centred).sum(axis=1, keepdims=True) / count)


@jax.jit
def _sum_from_here(values: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """The sum of each value and all later ones of its row."""
    return jax.lax.associative_scan(jnp.add, values, axis=1, reverse=True)
