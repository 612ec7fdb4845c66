"""Task-decoupled attention masks: what a supervised episode may not look back at, by task.

Video-o3 (arXiv 2601.23224) trains two skills in one stream, to look for evidence and to answer from
it. So that the answer is read from the clips and not guessed from the overview, the words of the
last answer do not see the first video; so that each next clip is found from the overview and from
reasoning, and not copied from the clips before, the words of all calls but the first do not see
the clips. The masks act on some of the rows only, a share that is drawn.

A word is predicted at the token before it, and the first one at a token of the opening tag. The
source leaves tags alone: there that token sees the video, and where the tokenizer glues a word to
the tag (in Qwen's, `<answer>B</answer>` is `<` `answer` `>B` `</` `answer` `>`) it is all that
decides a one-letter answer. So a token that holds words of a span counts as one of its words, and
the token that predicts the first word is masked with them, unless `sft.mask_predictor` is off.

A mask is two small numbers per token, bits of what it is and of what it may not see. No array of
queries times keys is stored, and attention needs a single `&` per pair.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paravt_jax.protocol import ANSWER_CLOSE, ANSWER_OPEN, GROUNDING_CLOSE, GROUNDING_OPEN
from paravt_jax.pytrees import ArrayLike
from paravt_jax.records import HiddenKeys
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
    predictor: bool = True,
) -> HiddenKeys:
    """Task-decoupled attention masks of episodes (TDAM).

    The words of a span are the tokens between two tags that belong together (see
    `structural_tokens`), and those that hold a tag's bytes and content of the span. Other tokens
    of tags, white space glued to them included, the reasoning and an unclosed span see everything.

    Args:
        tokens: whole streams.
        written: what the agent wrote, forced prefixes included: tags elsewhere do not count.
        videos: 1 for a vision token of the first video, 2 for one of a later one, 0 for words.
        rows: the rows to mask; one that shows a single video is left alone.
        tags: must hold the tags of `<answer>` and `<grounding>`.
        predictor: mask also the token that predicts the first word of a span; False, as in the
            source, masks words alone.

    Raises:
        ValueError: `tags` lacks one of them.
    """
    if missing := [tag for tag in (*ANSWER, *CALL) if tag not in tags.tags]:
        raise ValueError(f"tags lacks {', '.join(missing)}; tabulate them too (`tag_table`)")
    structure = structural_tokens(tokens, tags, written)
    answers, calls = (_spans(structure, *map(tags.tags.index, pair)) for pair in (ANSWER, CALL))
    last = structure.paired[:, tags.tags.index(ANSWER_OPEN), None, None]
    blind = jnp.where(((answers > 0) & (answers == last)).any(axis=2), FIRST_VIDEO, 0)
    blind |= jnp.where((calls > 1).any(axis=2), LATER_VIDEOS, 0)
    if predictor:
        blind |= jnp.pad(blind[:, 1:], [(0, 0), (0, 1)])
    acts = jnp.asarray(rows)[:, None] & jnp.any(jnp.asarray(videos) > 1, axis=1, keepdims=True)
    return HiddenKeys(jnp.where(acts, blind, 0), jnp.asarray(videos))


def _spans(structure: StructuralTokens, opening: int, closing: int) -> Int[Array, "b t gap"]:
    """Number of the span, counted from 1 in each row, whose content stands in each gap between the
    tags of each token; 0 where there is none."""
    ended = structure.tags[..., :-1]
    shape, paired = ended.shape, structure.partners[..., :-1] >= 0
    opened, closed = (
        jnp.cumsum(((ended == tag) & paired).reshape(shape[0], -1), axis=1).reshape(shape)
        for tag in (opening, closing)
    )
    bare = jnp.all(structure.tags < 0, axis=2, keepdims=True)
    return jnp.where((opened > closed) & (structure.filled | bare), opened, 0)
