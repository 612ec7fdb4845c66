"""Task-decoupled attention masks: what a supervised episode may not look back at, by task.

Video-o3 (arXiv 2601.23224) trains two skills in one stream, to look for evidence and to answer from
it. So that the answer is read from the clips and not guessed from the overview, the words of the
last answer do not see the first video; so that each next clip is found from the overview and from
reasoning, and not copied from the clips before, the words of all calls but the first do not see
the clips. The masks act on some of the rows only, a share that is drawn.

A mask is two small numbers per token, bits of what it is and of what it may not see. No array of
queries times keys is stored, and attention needs a single `&` per pair.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paravt_jax.protocol import ANSWER_CLOSE, ANSWER_OPEN, GROUNDING_CLOSE, GROUNDING_OPEN
from paravt_jax.records import ArrayLike, HiddenKeys
from paravt_jax.structure import StructuralTokens, TagTable, structural_tokens

FIRST_VIDEO, LATER_VIDEOS = 1, 2
"""Bits: a vision token of the overview, and one of a clip that a tool showed."""
ANSWER, CALL = (ANSWER_OPEN, ANSWER_CLOSE), (GROUNDING_OPEN, GROUNDING_CLOSE)


def task_masks(
    tokens: Int[ArrayLike, "b t"],
    written: Bool[ArrayLike, "b t"],
    videos: Int[ArrayLike, "b t"],
    rows: Bool[ArrayLike, " b"],
    tags: TagTable,
) -> HiddenKeys:
    """Task-decoupled attention masks of episodes (TDAM).

    The content of a span is what stands between two tags that belong together (see
    `structural_tokens`); the tags themselves, the reasoning and an unclosed span see everything.

    Args:
        tokens: whole streams.
        written: what the agent wrote, forced prefixes included: tags elsewhere do not count.
        videos: 1 for a vision token of the first video, 2 for one of a later one, 0 for words.
        rows: the rows to mask; one that shows a single video is left alone.
        tags: must hold the tags of `<answer>` and `<grounding>`.

    Raises:
        ValueError: `tags` lacks one of them.
    """
    if missing := [tag for tag in (*ANSWER, *CALL) if tag not in tags.tags]:
        raise ValueError(f"tags lacks {', '.join(missing)}; tabulate them too (`tag_table`)")
    found = structural_tokens(tokens, tags, written)
    answers, calls = (_closings(found, tags.tags.index(opening)) for opening, _ in (ANSWER, CALL))
    answer, call = _content(answers), _content(calls)
    last = jnp.max(answers, axis=1, keepdims=True)
    first = jnp.min(jnp.where(calls > 0, calls, calls.shape[1]), axis=1, keepdims=True)
    blind = jnp.where((answer > 0) & (answer == last), FIRST_VIDEO, 0)
    blind |= jnp.where(call > first, LATER_VIDEOS, 0)
    acts = jnp.asarray(rows)[:, None] & jnp.any(jnp.asarray(videos) > 1, axis=1, keepdims=True)
    return HiddenKeys(jnp.where(acts, blind, 0), jnp.asarray(videos))


def _closings(found: StructuralTokens, opening: int) -> Int[Array, "b t"]:
    """At the tokens of each opening tag that is closed, where its closing tag begins; else 0."""
    paired = (found.tags == opening) & (found.partners >= 0)
    return jnp.max(jnp.where(paired, found.partners, 0), axis=2)


def _content(closings: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """At what stands between tags, where the closing one begins, which tells spans apart; else
    0."""
    place = jnp.arange(closings.shape[1])
    opening = jax.lax.cummax(jnp.where(closings > 0, place, -1), axis=1)
    end = jnp.take_along_axis(closings, jnp.maximum(opening, 0), axis=1)
    return jnp.where((opening >= 0) & (opening < place) & (place < end), end, 0)
