"""Anchors of your own: credit at structural tokens, from where the tags stand and what was earned.

    def closing_tags(structure, rewards):
        earned = rewards["format"] - rewards["format"].mean(axis=1, keepdims=True)
        return structure.mask("</think>", "</answer>") * earned.reshape(-1, 1)

With `objective.anchor=path/to/file.py:closing_tags` the advantage of a generated token is that of
its rollout plus `objective.anchor_weight` times this credit. The function is compiled: it computes
with jax.numpy, and shapes alone may decide what it does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, Bool, Float

from paravt_jax.plugins import load
from paravt_jax.structure import StructuralTokens, TagTable, tag_mask


@dataclasses.dataclass(frozen=True)
class Structure:
    """The tags of a batch of rollouts, rollouts of a prompt side by side."""

    found: StructuralTokens
    """All about every tag: its partner, whether it is astray, what stands beside it."""
    table: TagTable
    """What found them; `table.tags` names the tags by their numbers."""
    generated: Bool[Array, "b t"]
    """Where the policy chose the token."""

    def mask(self, *tags: str, only_paired: bool = False) -> Bool[Array, "b t"]:
        """Generated tokens of these tags that hold no content, see `structure.tag_mask`.

        Raises:
            ValueError: a tag that is not looked for.
        """
        unknown = set(tags) - set(self.table.tags)
        if unknown:
            raise ValueError(f"no tag {sorted(unknown)}; there are {', '.join(self.table.tags)}")
        return tag_mask(self.found, self.table, tags, only_paired) & self.generated


AnchorFunction = Callable[[Structure, Mapping[str, Float[Array, "p g"]]], Float[Array, "b t"]]
"""The credit of each token of `b = p * g` rollouts, from their tags and their rewards by term."""


def own_credit(
    anchor: str, structure: Structure, rewards: Mapping[str, Float[Array, "p g"]]
) -> Float[Array, "b t"]:
    """What the function of that name gives each token.

    Raises:
        ValueError: it gives something of another shape.
    """
    # A user's function may promote types and ranks, also where jax is told to refuse that.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        credit = load(anchor)(structure, rewards)
    if not isinstance(credit, jax.Array) or credit.shape != structure.generated.shape:
        raise ValueError(
            f"objective.anchor={anchor} returned no array of {structure.generated.shape}; return "
            "the credit of each token of each rollout"
        )
    # A mask of tags is a credit as well: of 1 where it holds.
    return credit.astype("float32")
