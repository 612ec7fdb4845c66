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

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paravt_jax.protocol import ANSWER_CLOSE, ANSWER_OPEN, GROUNDING_CLOSE, GROUNDING_OPEN
from paravt_jax.records import ArrayLike, pytree
from paravt_jax.structure import TagTable, structural_tokens

FIRST_VIDEO, LATER_VIDEOS = 1, 2
"""Bits: a vision token of the overview, and one of a clip that a tool showed."""


@pytree
@dataclasses.dataclass(frozen=True)
class HiddenKeys:
    """Tokens that some of the later ones may not see: key j is hidden from query i if
    `blind[i] & kinds[j]`."""

    blind: Int[ArrayLike, "b t"]
    """Bits of the kinds that a token may not see."""
    kinds: Int[ArrayLike, "b t"]
    """Bits of the kinds that a token is of."""

    def visible(self, queries: int, keys: int, first: int = 0) -> Bool[Array, "b q s"]:
        """Which of the first `keys` tokens are not hidden from `queries` tokens, from number
        `first` on."""
        blind = jnp.asarray(self.blind)[:, first : first + queries, None]
        return blind & jnp.asarray(self.kinds)[:, None, :keys] == 0


def task_masks(
    tokens: Int[ArrayLike, "b t"],
    written: Bool[ArrayLike, "b t"],
    videos: Int[ArrayLike, "b t"],
    rows: Bool[ArrayLike, " b"],
    tags: TagTable,
) -> HiddenKeys:
    """Task-decoupled attention masks of episodes (TDAM).

    The content of a span is what stands between its tags; the tags themselves, the reasoning and
    an unclosed span see everything.

    Args:
        tokens: whole streams.
        written: what the agent wrote, forced prefixes included: tags elsewhere do not count.
        videos: 1 for a vision token of the first video, 2 for one of a later one, 0 for words.
        rows: the rows to mask; one that shows a single video is left alone.
        tags: must hold the tags of `<answer>` and `<grounding>`.

    Raises:
        ValueError: `tags` lacks one of them.
    """
    wanted = (ANSWER_OPEN, ANSWER_CLOSE, GROUNDING_OPEN, GROUNDING_CLOSE)
    if missing := [tag for tag in wanted if tag not in tags.tags]:
        raise ValueError(f"tags lacks {', '.join(missing)}; tabulate them too (`tag_table`)")
    ids = jnp.where(written, structural_tokens(tokens, tags).ids, -1)
    answer, answers = _spans(ids, *(tags.tags.index(tag) for tag in wanted[:2]))
    call, calls = _spans(ids, *(tags.tags.index(tag) for tag in wanted[2:]))
    last = jnp.max(answers, axis=1, keepdims=True)
    first = jnp.min(jnp.where(calls > 0, calls, ids.shape[1]), axis=1, keepdims=True)
    blind = jnp.where((answer > 0) & (answer == last), FIRST_VIDEO, 0)
    blind |= jnp.where(call > first, LATER_VIDEOS, 0)
    acts = jnp.asarray(rows)[:, None] & jnp.any(jnp.asarray(videos) > 1, axis=1, keepdims=True)
    return HiddenKeys(jnp.where(acts, blind, 0), jnp.asarray(videos))


def _spans(ids: Int[Array, "b t"], opens: int, closes: int) -> tuple[Array, Array]:
    """Spans from an opening tag to the closing tag that follows it with no other between.

    Returns:
        int `[b, t]`: number, from 1, of the span that a token is content of; 0 if of none.
        int `[b, t]`: number of the span that a token closes; 0 if it closes none.
    """
    opening, closing = ids == opens, ids == closes
    begins = opening & ~jnp.roll(opening, 1, axis=1).at[:, 0].set(False)
    number = jnp.cumsum(begins, axis=1)
    is_open = _latest(opening) > _latest(closing)
    will_close = _latest(closing[:, ::-1])[:, ::-1] > _latest(opening[:, ::-1])[:, ::-1]
    content = is_open & will_close & ~opening
    just_closed = closing & jnp.roll(is_open, 1, axis=1).at[:, 0].set(False)
    return jnp.where(content, number, 0), jnp.where(just_closed, number, 0)


def _latest(marks: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Place of the last mark at or before each token; -1 if none."""
    places = jnp.where(marks, jnp.arange(marks.shape[1]), -1)
    return jax.lax.cummax(places, axis=1)
