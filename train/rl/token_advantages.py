"""The advantage of every token: from rewards within each group, the format's at structural tags."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from paravt_jax.advantages import (
    AdvantageConfig,
    anchored_advantages,
    kl_to_go,
    rollout_advantages,
    whiten,
)
from paravt_jax.records import LearnerBatch, RolloutGroup
from train.rl.anchor import Anchor
from train.rl.subagents import subagent_advantages


@dataclasses.dataclass(frozen=True)
class TokenAdvantages:
    """Fills in the advantages of a batch."""

    settings: AdvantageConfig
    anchor: Anchor
    anchor_weight: float | None
    """Weight of the format anchor at structural tags; None where it is part of the reward that all
    tokens share, or of the loss."""
    subagent_credit: str = "none"
    """What sub-agents get of their episode's advantage, see `RlSettings`."""

    def __call__(
        self, groups: Sequence[RolloutGroup], batch: LearnerBatch, credit: Array | None = None
    ) -> LearnerBatch:
        """The batch with the advantage of every generated token filled in: from the rewards of its
        group, less the divergence from the reference, normalised over the batch, as configured.

        `credit` is that of `anchor_credit`, where it has been computed already."""
        main = self._anchored(groups, batch, credit)
        crops = batch.subagents
        if crops is None:
            (main,) = self._shaped([batch], [main])
            return dataclasses.replace(batch, advantages=main)
        episodes, rows = self._normalised(groups), len(crops.tokens) // len(groups)
        earned = subagent_advantages(groups, episodes, rows, self.subagent_credit)[:, None]
        of_crops = earned * (crops.loss_weights > 0).astype(np.float32)
        main, of_crops = self._shaped([batch, crops], [main, of_crops])
        crops = dataclasses.replace(crops, advantages=of_crops)
        return dataclasses.replace(batch, advantages=main, subagents=crops)

    def anchor_credit(self, groups: Sequence[RolloutGroup], batch: LearnerBatch) -> Array | None:
        """What the anchor is to each token, float32 `[b, own]`; None where it adds nothing of its
        own."""
        return None if self.anchor_weight is None else self.anchor.credit(groups, batch)

    def structural(self, credit: Array | None, batch: LearnerBatch) -> Array | None:
        """What the anchor, by its credit, adds to the advantage of each token."""
        if credit is None or self.anchor_weight is None:
            return None
        nothing = np.zeros(len(batch.loss_weights), np.float32)
        return anchored_advantages(nothing, credit, batch.loss_weights > 0, self.anchor_weight)

    def _anchored(
        self, groups: Sequence[RolloutGroup], batch: LearnerBatch, credit: Array | None
    ) -> Array:
        """Advantage per token. The anchor at positions, or one of the user's, acts on tags only."""
        shared, generated = self._normalised(groups), batch.loss_weights > 0
        credit = self.anchor_credit(groups, batch) if credit is None else credit
        if credit is None or self.anchor_weight is None:
            return shared[:, None] * generated.astype(np.float32)
        return anchored_advantages(shared, credit, generated, self.anchor_weight)

    def _normalised(self, groups: Sequence[RolloutGroup]) -> np.ndarray:
        """Advantages of the reward that all tokens share, without the anchor where that acts on
        tags only; float32 `[b]`."""
        rewards_P_G, total_P_G = (
            np.array([[t.rewards[name] for t in g.trajectories] for g in groups])
            for name in ("total" if self.anchor_weight is None else "task", "total")
        )
        advantages = rollout_advantages(rewards_P_G, self.settings, total_P_G)
        return advantages.reshape(-1).astype(np.float32)

    def _shaped(self, rows: Sequence[LearnerBatch], advantages: Sequence[Array]) -> list[Array]:
        """Advantages less the divergence from the reference, normalised over all rows together."""
        settings, shaped = self.settings, list(advantages)
        masks = [batch.loss_weights > 0 for batch in rows]
        if settings.kl_weight:
            for at, (batch, mask) in enumerate(zip(rows, masks, strict=True)):
                policies = batch.behaviour_log_probs, batch.reference_log_probs
                shaped[at] -= settings.kl_weight * kl_to_go(mask, *policies, settings.kl_estimator)
        if settings.whiten_tokens:
            # Main agents and sub-agents as one: apart, each would be centred on itself.
            flat, mask = (jnp.concatenate([x.ravel() for x in xs]) for xs in (shaped, masks))
            cuts = np.cumsum([x.size for x in shaped])[:-1]
            pieces = jnp.split(whiten(flat, mask, settings.eps), cuts)
            shaped = [x.reshape(old.shape) for x, old in zip(pieces, shaped, strict=True)]
        return shaped
