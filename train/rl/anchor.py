"""Where the format anchor acts, and what it is to each token there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.advantages import AdvantageConfig, turn_advantages
from paravt_jax.anchors import Structure, own_credit
from paravt_jax.records import LearnerBatch, RolloutGroup
from paravt_jax.rewards.schemes.paravt import turn_anchors
from paravt_jax.structure import TagTable, anchor_tags, structural_tokens, tag_credit, tag_mask
from train.batch import to_mesh, turn_numbers


class Anchor:
    """The format anchor of a run, on token streams of its tokenizer."""

    def __init__(
        self,
        advantages: AdvantageConfig,
        call_syntax: str,
        only_paired: bool,
        table: TagTable,
        mesh: Mesh,
    ) -> None:
        """
        Args:
          advantages: how the anchor of each turn is normalised.
          call_syntax: which tags it acts on, see `AgentConfig`.
          only_paired: whether tags without a partner are left out.
          table: finds tags in tokens.
        """
        self._settings, self._table, self._mesh = advantages, table, mesh
        self._rules = {"anchors": anchor_tags(call_syntax), "only_paired": only_paired}
        self._find_tags = jax.jit(find_tags, static_argnames=tuple(self._rules))
        self._credit_tags = jax.jit(self._credit)

    def positions(
        self, groups: Sequence[RolloutGroup], batch: LearnerBatch
    ) -> tuple[Bool[Array, "b t"], Float[Array, ""]]:
        """Where the anchor may act in the rows of these groups, and which share of all spoken tags
        belongs to a pair."""
        spoken = to_mesh(turn_numbers(groups, batch.loss_weights.shape[1]) > 0, self._mesh)
        generated = batch.loss_weights > 0
        return self._find_tags(batch.own_tokens, spoken, generated, self._table, **self._rules)

    def credit(self, groups: Sequence[RolloutGroup], batch: LearnerBatch) -> Float[Array, "b t"]:
        """What the anchor is to each token, before its weight: the parts of each turn's anchor,
        normalised among turns of the same number, at the tags that they are about."""
        numbers = turn_numbers(groups, batch.loss_weights.shape[1])
        parts = turn_credits(groups, numbers, self._settings)
        arrays = (to_mesh(x, self._mesh) for x in (numbers > 0, *parts))
        return self._credit_tags(self._table, batch.own_tokens, *arrays)

    def _credit(
        self, table: TagTable, tokens: Array, spoken: Array, thinking: Array, acting: Array
    ) -> Array:
        tags, rules = structural_tokens(tokens, table, spoken), self._rules
        return tag_credit(tags, table, rules["anchors"], thinking, acting, rules["only_paired"])


class OwnAnchor(Anchor):
    """An anchor that is a function of the user's, see `paravt_jax.anchors`."""

    def __init__(self, name: str, *arguments: Any) -> None:
        """`name` is what `plugins.load` finds; `arguments` are those of `Anchor`."""
        super().__init__(*arguments)
        self._name = name
        self._credit_own = jax.jit(self._own, static_argnames="groups")

    def credit(self, groups: Sequence[RolloutGroup], batch: LearnerBatch) -> Float[Array, "b t"]:
        """What the function gives each token, before the anchor's weight."""
        rollouts = [t for group in groups for t in group.trajectories]
        numbers = turn_numbers(groups, batch.loss_weights.shape[1])
        rewards = {
            name: np.array([t.rewards[name] for t in rollouts], np.float32)
            for name in rollouts[0].rewards
        }
        arrays = to_mesh((numbers > 0, rewards), self._mesh)
        generated = batch.loss_weights > 0
        return self._credit_own(
            self._table, batch.own_tokens, generated, *arrays, groups=len(groups)
        )

    def _own(
        self,
        table: TagTable,
        tokens: Array,
        generated: Array,
        spoken: Array,
        rewards: dict[str, Array],
        groups: int,
    ) -> Array:
        structure = Structure(structural_tokens(tokens, table, spoken), table, generated)
        by_group = {name: values.reshape(groups, -1) for name, values in rewards.items()}
        return own_credit(self._name, structure, by_group)


def find_tags(
    tokens: Int[Array, "b t"],
    spoken: Bool[Array, "b t"],
    generated: Bool[Array, "b t"],
    table: TagTable,
    anchors: tuple[str, ...],
    only_paired: bool,
) -> tuple[Bool[Array, "b t"], Float[Array, ""]]:
    """Where the anchor may act, and which share of all spoken tags belongs to a pair.

    A forced tag pairs with a generated one, but nothing acts on it: the policy did not choose it.
    """
    structure = structural_tokens(tokens, table, spoken)
    anchored = tag_mask(structure, table, anchors, only_paired) & generated
    return anchored, structure.paired.sum() / jnp.maximum(structure.counts.sum(), 1)


def turn_credits(
    groups: Sequence[RolloutGroup], numbers: Int[np.ndarray, "b t"], config: AdvantageConfig
) -> Float[np.ndarray, "part b t"]:
    """The two parts of the anchor, thinking and acting, of the turn that each token belongs to,
    normalised; 0 between turns.

    Args:
        groups: scored rollouts.
        numbers: which turn each token belongs to, see `turn_numbers`.
        config: how they are normalised, see `turn_advantages`.
    """
    totals_P_G = np.array([[t.rewards["total"] for t in g.trajectories] for g in groups])
    turns = max(1, numbers.max(initial=0))
    # NaN, not 0: a rollout without such a turn has no part in the mean of those that have one.
    parts = np.full((2, *totals_P_G.shape, turns), np.nan)
    for place in np.ndindex(*totals_P_G.shape):
        rollout = groups[place[0]].trajectories[place[1]]
        anchors = turn_anchors([turn.text for turn in rollout.turns], rollout.call_syntax)
        for turn, anchor in enumerate(anchors):
            parts[:, *place, turn] = anchor.thinking, anchor.acting
    credits = np.stack([turn_advantages(part, config, totals_P_G) for part in parts])
    by_number = np.pad(credits.reshape(2, -1, turns), [(0, 0), (0, 0), (1, 0)])
    return np.take_along_axis(by_number, numbers[None], axis=2).astype(np.float32)
