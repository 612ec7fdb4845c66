"""Rows that share prompts, and what their tokens see, written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from paravt_jax.shared_rows import Bounds, SharedRows
from train.batch import row_starts


def visible_in(shared: SharedRows, slots: int) -> jax.Array:
    """bool `[rows, t, t]`: which keys each query of rows of prompts and streams sees, written out.
    Padding sees itself."""
    at = jnp.arange(slots)
    before = at[None] <= at[:, None]

    def row(prompt, starts, lengths):
        told = (at < prompt)[None]
        visible = jnp.eye(slots, dtype=bool) | (before & told & told.T)
        for start, length in zip(starts, lengths, strict=True):
            own = (at >= start) & (at < start + length)
            visible |= own[:, None] & (told | (own[None] & before))
        return visible

    streams = (jnp.asarray(x).reshape(-1, shared.per_row) for x in (shared.starts, shared.lengths))
    return jnp.stack(
        [row(*x) for x in zip(jnp.asarray(shared.prompt_lengths), *streams, strict=True)]
    )


def shared_rows(prompt: int, own: int, unit: int = 1) -> tuple[SharedRows, int]:
    """Two rows of a prompt and three streams, each with one that is as long as may be, and their
    slots."""
    prompts, owns = [prompt, prompt // 3], [own, own // 5, own // 2, 1, own, own - 3]
    starts, ends = row_starts(prompts, owns, unit)
    lengths = (jnp.asarray(x, jnp.int32) for x in (prompts, starts, owns))
    return SharedRows(*lengths, Bounds(prompt, own, unit)), max(ends) + 5
