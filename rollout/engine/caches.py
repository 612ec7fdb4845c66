"""The KV caches of an engine: allocated when rollouts begin, grown while they generate, freed after
them.

Rows rarely generate as many tokens as they may. So the pool with the largest cache begins small and
grows in a few steps that are known before the run (`PARTS`): each is a static shape, for which
append and decode are compiled once. All other pools have their full size at once: a second one that
grows would multiply the programs that decode several pools. Small caches do not grow at all:
compiling for their sizes takes longer than their memory is worth.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from paravt_jax.interfaces import Policy
from paravt_jax.kv_cache import SLOT_AXES, CacheArray, KVCache, PageTable, whole_tiles
from paravt_jax.mesh import AnyMesh, batch_shards, constrain, sharding
from paravt_jax.pytrees import ArrayLike, pytree

PAGE = 64
"""Slots of a page, rounded up to whole tiles."""
PARTS = (1 / 8, 1 / 3, 1 / 2, 1)
"""Sizes of a cache that grows, as shares of the pages that all rows need at their longest."""
GROWS_FROM = 32 * 2**20
"""Bytes of a pool's caches at their longest, over all devices, from which on they grow."""


@dataclasses.dataclass(frozen=True)
class SlotPool:
    """How many KV-cache slots there are for requests of one static shape."""

    prompts: int
    """Slots of prompts: so many run at a time."""
    copies: int
    """Rows that share one prompt: the group size for main agents, 1 for crops."""
    prompt_tokens: int
    """Longest prompt."""
    suffix: int
    """Most tokens of a row after its prompt."""
    page: int = PAGE
    """Tokens of a page of what follows prompts, at least."""

    def __post_init__(self) -> None:
        """Refuse impossible sizes, naming field, value and remedy."""
        for name in ("prompts", "copies", "prompt_tokens", "suffix", "page"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")

    @property
    def rows(self) -> int:
        """Rows of all prompts."""
        return self.prompts * self.copies

    @property
    def page_slots(self) -> int:
        """Tokens of a page."""
        return whole_tiles(min(self.page, self.suffix))

    @property
    def row_pages(self) -> int:
        """Pages of the longest row."""
        return -(-self.suffix // self.page_slots)


@pytree
@dataclasses.dataclass(frozen=True)
class PoolState:
    """What the slots of a pool hold on the device."""

    cache: KVCache
    hidden: Float[Array, "n d"]
    """Hidden state of each row's last token."""
    seen: Bool[Array, "n vocab"] | None = None
    """Tokens of each row after its prompt; kept only for repetition penalties."""

    @property
    def prompts(self) -> PromptState:
        """What prefilling changes."""
        cache = self.cache
        return PromptState(cache.prompt_keys, cache.prompt_values, self.hidden, self.seen)

    def with_prompts(self, new: PromptState) -> PoolState:
        """After prompts were prefilled."""
        cache = dataclasses.replace(self.cache, prompt_keys=new.keys, prompt_values=new.values)
        return PoolState(cache, new.hidden, new.seen)

    def with_lengths(
        self, prompts: Int[ArrayLike, " p"], rows: Int[ArrayLike, " n"], table: PageTable
    ) -> PoolState:
        """The state with the lengths and the page table of now, which the host keeps and sends
        along with every call."""
        cache = dataclasses.replace(self.cache, prompt_lengths=prompts, lengths=rows, table=table)
        return dataclasses.replace(self, cache=cache)


@pytree
@dataclasses.dataclass(frozen=True)
class PromptState:
    """The part of a pool's state that prompts are prefilled into. It has one size only, so that
    prefill need not be compiled for each size of caches."""

    keys: CacheArray
    values: CacheArray
    hidden: Any
    """`[n, d]`, see `PoolState`; or its shape, where programs are compiled ahead of time."""
    seen: Any
    """`[n, vocab]` or None, alike."""


class Caches:
    """The states of all pools, handed on from session to session until they are given back."""

    def __init__(
        self,
        policy: Policy,
        pools: Mapping[str, SlotPool],
        penalty_vocab: int,
        under_mesh: Callable[[Callable[..., Any]], Callable[..., Any]],
        shards: Callable[[], int],
        grows_from: int = GROWS_FROM,
    ) -> None:
        """
        Args:
            penalty_vocab: size of the vocabulary where repetition penalties need to know the
                tokens of each row; else 0.
            under_mesh: puts a jitted function under the mesh of the engine.
            shards: parts that this mesh splits rows into.
            grows_from: bytes of the caches of a pool from which on it grows, see `GROWS_FROM`.
        """
        self._grows_from = grows_from
        self._policy, self._pools = policy, dict(pools)
        self._penalty_vocab, self._shards = penalty_vocab, shards
        self._make = under_mesh(jax.jit(self._empty, static_argnums=(0, 1, 2)))
        self._grow = under_mesh(jax.jit(CacheArray.grown, static_argnums=(1, 2)))
        self.states: dict[str, PoolState] = {}
        """Empty while their memory is given back."""
        self._peak = 0
        self.fixed = False
        """Whether they stay at this size, and tokens without a page are dropped: in rehearsals."""
        self.growing = max(pools, key=lambda name: pools[name].rows * pools[name].suffix)
        """The pool that grows."""

    @property
    def rungs(self) -> int:
        """Sizes that the caches can have."""
        return len(self._pages(self.growing, self._shards()))

    def open(self, rung: int = 0) -> dict[str, PoolState]:
        """The states; if they were given back, new ones of this size."""
        if not self.states:
            for name, sizes in self._sizes(self._shards(), rung).items():
                self.states[name] = jax.tree.map(_commit, self._make(*sizes))
            self._note()
        return self.states

    def _sizes(self, shards: int, rung: int) -> dict[str, tuple[SlotPool, int, int]]:
        """Each pool, the groups of its rows, and the pages of a group."""
        sizes = {}
        for name, pool in self._pools.items():
            counts = self._pages(name, shards)
            count = counts[rung] if name == self.growing else counts[-1]
            sizes[name] = pool, _groups(pool, shards), count
        return sizes

    def _pages(self, name: str, shards: int) -> list[int]:
        """Pages of each group, step by step up to those of its rows at their longest."""
        pool = self._pools[name]
        groups = _groups(pool, shards)
        rows = pool.rows // groups
        longest = rows * pool.row_pages
        if self._shape_bytes(pool, groups, longest) < self._grows_from:
            return [longest]
        return sorted({max(rows, math.ceil(longest * part)) for part in PARTS})

    def _shape_bytes(self, pool: SlotPool, groups: int, count: int) -> int:
        return _bytes(jax.eval_shape(functools.partial(self._empty, pool, groups, count)).cache)

    def grow(self, name: str) -> int:
        """The next step of a pool; pages of each group from now on.

        Raises:
          ValueError: there is none.
        """
        pool, state = self._pools[name], self.states[name]
        groups, now = jnp.shape(state.cache.table.owners)
        larger = [count for count in self._pages(name, groups) if count > now]
        if not larger:
            raise ValueError(f"pool {name!r} has all of its {now} pages; widen its suffix")
        cache = state.cache
        for part in ("keys", "values"):
            # One after the other, so that only one of them is there twice.
            before = getattr(cache, part)
            cache = dataclasses.replace(cache, **{part: self._grow(before, groups, larger[0])})
            jax.tree.map(lambda x: x.delete(), before)
        table = _free_table(pool, groups, larger[0])
        cache = dataclasses.replace(cache, table=table)
        self.states[name] = dataclasses.replace(state, cache=cache)
        self._note()
        return larger[0]

    def release(self) -> None:
        """Give the memory back; the next session makes new states."""
        jax.tree.map(lambda x: x.delete() if isinstance(x, jax.Array) else None, self.states)
        self.states.clear()

    def take_peak(self) -> int:
        """The most bytes that there were since this was last asked."""
        peak, self._peak = self._peak, self._now()
        return peak

    def _note(self) -> None:
        self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        return sum(_bytes(state.cache) for state in self.states.values())

    def bytes(self, rung: int = -1) -> int:
        """Keys and values of all pools at this size, over all devices."""
        shapes = self._shapes(self._shards(), rung)
        return sum(_bytes(state.cache) for state in shapes.values())

    def abstract(self, mesh: AnyMesh) -> dict[str, PoolState]:
        """Shapes and shardings of the largest states, with no memory behind them. What comes from
        the host with every call has no sharding."""

        def lay_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            if leaf.dtype == jnp.int32:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            axes = SLOT_AXES[: leaf.ndim] if leaf.ndim > 2 else ("batch", None)
            placement = sharding(mesh, axes, leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

        return jax.tree.map(lay_out, self._shapes(batch_shards(dict(mesh.shape)), -1))

    def _shapes(self, shards: int, rung: int) -> dict[str, PoolState]:
        return {
            name: jax.eval_shape(functools.partial(self._empty, *sizes))
            for name, sizes in self._sizes(shards, rung).items()
        }

    def _empty(self, pool: SlotPool, groups: int, count: int) -> PoolState:
        sizes = pool.prompts, pool.copies, pool.prompt_tokens, pool.page_slots
        cache = self._policy.init_cache(*sizes)
        cache = dataclasses.replace(
            cache,
            keys=cache.keys.with_pages(groups * count),
            values=cache.values.with_pages(groups * count),
            table=_free_table(pool, groups, count),
        )
        hidden = jnp.zeros((pool.rows, self._policy.width))
        seen = jnp.zeros((pool.rows, self._penalty_vocab), bool) if self._penalty_vocab else None
        return PoolState(cache, *(split_rows(x) for x in (hidden, seen)))


def _groups(pool: SlotPool, shards: int) -> int:
    """Groups of the rows of a pool on a mesh that splits rows into so many parts."""
    return shards if pool.rows % shards == 0 else 1


def split_rows(tree: Any) -> Any:
    """Rows over the data axes of the mesh, as far as they divide."""
    return jax.tree.map(lambda leaf: constrain(leaf, "batch", *[None] * (leaf.ndim - 1)), tree)


def _free_table(pool: SlotPool, groups: int, count: int) -> PageTable:
    """Nobody has a page."""
    rows = pool.rows // groups
    return PageTable(
        jnp.full((groups, rows, pool.row_pages), count, jnp.int32),
        jnp.full((groups, count), rows, jnp.int32),
        jnp.zeros((groups, count), jnp.int32),
    )


def _bytes(cache: KVCache) -> int:
    parts = cache.prompt_keys, cache.prompt_values, cache.keys, cache.values
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(parts))


def _commit(x: Array) -> Array:
    """Committed to its devices, as whatever a jitted function of committed weights returns: for
    uncommitted caches, the second session would compile prefill once more."""
    return x if x.committed else jax.device_put(x, x.sharding)
