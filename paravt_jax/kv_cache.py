"""The KV cache: keys and values of prompts, shared by their samples, and of what follows them.

What follows a prompt lies in pages, so that memory is taken by what is there and not by what might
come. Rows lie in `g` groups, one for each part that a mesh splits them into, and a row has pages of
its own group only: no device reads another's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from paravt_jax.mesh import constrain, platform
from paravt_jax.pytrees import ArrayLike, pytree

SLOT_AXES = ("layers", "batch", "row_heads", None, None)
"""Logical axes of slots; scales lack the last one."""
TILE = 128
"""Slots of a cache on a TPU are a multiple of this many."""
LARGEST_INT8 = 127
"""Its negative has a positive counterpart: -128 stays unused."""


def whole_tiles(slots: int) -> int:
    """The slots of a cache that holds so many. A TPU keeps them in tiles: where slots do not fill
    whole ones, the scatter that appends picks another layout than attention reads, and the whole
    cache is copied in each layer of every token."""
    return -(-slots // TILE) * TILE if platform() == "tpu" else slots


@pytree
@dataclasses.dataclass(frozen=True)
class CacheArray:
    """Keys or values of tokens, as they are or as int8.

    In int8, each token of each key head has its own scale, its largest magnitude / 127: symmetric
    and token-wise, as ZeroQuant (arXiv 2206.01861) does activations, so that a slot is written once
    and never scaled again. Fewer bits would need scales per channel for keys (KIVI, arXiv
    2402.02750). What 8 bits change is measured in `docs/log.md`.
    """

    stacks: tuple[Float[Array, "l b k _ _"] | Int8[Array, "l b k _ _"], ...]
    """`[l, b, k, s, h]`: one of all layers, which a scan over them indexes. On a CPU one of each,
    the next layer's first: a part of an array is copied there before a product reads it."""
    scales: tuple[Float[Array, "l b k s"], ...] | None = None
    """What int8 is multiplied with; None where nothing is int8."""

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int, int], dtype: Any) -> CacheArray:
        """Zeros of shape `[l, b, k, s, h]`.

        Raises:
          ValueError: `dtype` is neither a type of floats nor int8.
        """
        dtype = jnp.dtype(dtype)
        if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"dtype={dtype}: a KV cache holds floats or int8; choose one of them")
        layers, *rest = shape
        each, count = (1, layers) if platform() == "cpu" else (layers, 1)
        stored = each, *cls._order(rest)
        stacks, scales = tuple(jnp.zeros(stored, dtype) for _ in range(count)), None
        if dtype == jnp.int8:
            scales = tuple(jnp.zeros((each, *rest[:-1]), jnp.float32) for _ in range(count))
        # Laid out at once: an engine's cache may not fit the one device that makes it.
        return cls(stacks, scales).sharded()

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`[l, b, k, s, h]`, of all layers."""
        each, *stored = self.stacks[0].shape
        rows, heads, slots, width = self._order(stored)
        return each * len(self.stacks), rows, heads, slots, width

    @property
    def dtype(self) -> Any:
        """In which numbers are kept."""
        return self.stacks[0].dtype

    @property
    def count(self) -> int:
        """Slots of each row."""
        return self.shape[3]

    def turned(self) -> CacheArray:
        """With the next layer first, where each has an array of its own."""
        scales = self.scales and (*self.scales[1:], self.scales[0])
        return type(self)((*self.stacks[1:], self.stacks[0]), scales)

    def write(self, layer: Any, where: tuple[Any, ...], x: Float[Array, "... h"]) -> CacheArray:
        """With `x` at these indices of `[b, k, s]` of a layer, the one that comes next; what falls
        outside is dropped."""

        def put(stacks: tuple[Array, ...], at: tuple[Any, ...], x: Array) -> tuple[Array, ...]:
            return stacks[0].at[at].set(x.astype(stacks[0].dtype), mode="drop"), *stacks[1:]

        at = self._index(layer, where)
        # An array of slots puts their axis where it stands in `x`, a slice where the stack has it.
        ordered = self._swapped if isinstance(where[-1], slice) else jnp.asarray
        if self.scales is None:
            return type(self)(put(self.stacks, at, ordered(x)))
        x = x.astype(jnp.float32)
        scales = jnp.max(jnp.abs(x), axis=-1) / LARGEST_INT8
        # A scale of 0 belongs to zeros alone, which stay zeros under any other.
        levels = jnp.round(x / jnp.where(scales > 0, scales, 1)[..., None])
        written = put(self.stacks, at, ordered(levels))
        return type(self)(written, put(self.scales, (self._place(layer), *where), scales))

    def read(self, layer: Any, where: tuple[Any, ...], dtype: Any) -> Float[Array, "... h"]:
        """What stands at these indices of `[b, k, s]` of a layer, the one that comes next, in this
        type. Slots are a slice."""
        stored = self.stacks[0][self._index(layer, where)]
        return self._valued(stored, lambda x: x[(self._place(layer), *where)], dtype)

    def first_pages(
        self, layer: Any, groups: int, count: int, dtype: Any
    ) -> Float[Array, "gc k s h"]:
        """The first `count` pages of each group."""
        place = self._place(layer)
        return self._read_pages(groups, lambda x: x[place, :, :count], dtype)

    def pages(self, layer: Any, ids: Int[Array, "g r"], dtype: Any) -> Float[Array, "gr k s h"]:
        """These pages, each counted within its group."""
        place = self._place(layer)

        def pick(x: Array) -> Array:
            read = jax.vmap(lambda x, ids: x.at[place, ids].get(mode="clip"), (1, 0))
            return read(x, ids)

        return self._read_pages(len(ids), pick, dtype)

    def _read_pages(self, groups: int, pick: Callable[[Array], Array], dtype: Any) -> Array:
        """What is picked from `[l, g, pages, ...]`, in this type."""

        def read(x: Array) -> Array:
            picked = pick(x.reshape(x.shape[0], groups, -1, *x.shape[2:]))
            return picked.reshape(-1, *x.shape[2:])

        return self._valued(read(self.stacks[0]), read, dtype)

    def _valued(self, stored: Array, scales: Callable[[Array], Array], dtype: Any) -> Array:
        """What was stored as `[..., s, h]` of this type; `scales` reads theirs from a stack."""
        ordered = self._swapped(stored)
        if self.scales is None:
            return ordered.astype(dtype)
        return (ordered.astype(jnp.float32) * scales(self.scales[0])[..., None]).astype(dtype)

    def _place(self, layer: Any) -> Any:
        """Where the first stack has the layer that comes next."""
        return layer if len(self.stacks) == 1 else 0

    def _index(self, layer: Any, where: tuple[Any, ...]) -> tuple[Any, ...]:
        """Indices of a stack that stand for these of `[b, k, s]` of a layer."""
        return self._place(layer), *where

    @staticmethod
    def _order(sizes: Sequence[int]) -> Sequence[int]:
        """`[b, k, s, h]` as stacks have them, and back."""
        return sizes

    @staticmethod
    def _swapped(x: Array) -> Array:
        """`[..., s, h]` in the order of stacks, and back."""
        return x

    def with_rows(self, rows: Int[Array, " b"], x: Float[Array, "l b k t h"]) -> CacheArray:
        """With the first slots of these rows written, in all layers."""
        where = rows, slice(None), slice(0, x.shape[3])
        if len(self.stacks) == 1:
            return self.write(slice(None), where, x)
        grown = self
        for layer in x:
            grown = grown.write(0, where, layer).turned()
        return grown

    def with_pages(self, count: int) -> CacheArray:
        """An empty one with so many pages instead."""
        layers, _, heads, slots, width = self.shape
        return self.empty((layers, count, heads, slots, width), self.dtype)

    def grown(self, groups: int, count: int) -> CacheArray:
        """With so many pages in each group: its own, and empty ones behind them."""

        def grow(x: Array) -> Array:
            x = x.reshape(x.shape[0], groups, -1, *x.shape[2:])
            more = [(0, 0), (0, 0), (0, count - x.shape[2]), *[(0, 0)] * (x.ndim - 3)]
            return jnp.pad(x, more).reshape(x.shape[0], groups * count, *x.shape[3:])

        return jax.tree.map(grow, self).sharded()

    def sharded(self) -> CacheArray:
        """Rows over the data axes of the mesh, heads over `tensor` and `context`."""
        return jax.tree.map(lambda leaf: constrain(leaf, *SLOT_AXES[: leaf.ndim]), self)


@pytree
@dataclasses.dataclass(frozen=True)
class SlotsLast(CacheArray):
    """Stacks are `[l, b, k, h, s]`. A CPU multiplies the one token of a row with keys two to three
    times faster so; elsewhere the compiler chooses the order in memory."""

    def _index(self, layer: Any, where: tuple[Any, ...]) -> tuple[Any, ...]:
        *before, slots = where
        return self._place(layer), *before, slice(None), slots

    @staticmethod
    def _order(sizes: Sequence[int]) -> Sequence[int]:
        return *sizes[:-2], sizes[-1], sizes[-2]

    @staticmethod
    def _swapped(x: Array) -> Array:
        return x.swapaxes(-2, -1)


def empty_keys(shape: tuple[int, int, int, int, int], dtype: Any) -> CacheArray:
    """Keys of shape `[l, b, k, s, h]`, see `CacheArray.empty`."""
    return (SlotsLast if platform() == "cpu" else CacheArray).empty(shape, dtype)


@pytree
@dataclasses.dataclass(frozen=True)
class PageTable:
    """Which row has which pages, from both sides. Rows and pages are counted within their group."""

    pages: Int[ArrayLike, "g r m"]
    """The pages of each row, first tokens first; `u` where it has none yet."""
    owners: Int[ArrayLike, "g u"]
    """The row that has the page; `r` where it is free."""
    order: Int[ArrayLike, "g u"]
    """Which of that row's pages it is, from 0."""

    @classmethod
    def whole(cls, rows: int) -> PageTable:
        """Every row has one page."""
        one = jnp.arange(rows, dtype=jnp.int32)
        return cls(one[None, :, None], one[None], jnp.zeros((1, rows), jnp.int32))


@pytree
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of running requests of one static shape: `p` prompts, and `n = p * copies`
    rows that continue them, prompt-major. All copies of a prompt share one cache of it.

    Heads come before slots, so that attention's products read memory in order. Slots are filled
    from 0 without holes.
    """

    prompt_keys: CacheArray
    """Of `p` rows."""
    prompt_values: CacheArray
    prompt_lengths: Int[ArrayLike, " p"]
    """Filled slots of each prompt; 0 where there is none."""
    keys: CacheArray
    """Of pages: what each row generated, and was given, after its prompt."""
    values: CacheArray
    lengths: Int[ArrayLike, " n"]
    """Filled slots of each row, its prompt not counted."""
    table: PageTable

    @property
    def copies(self) -> int:
        """Rows of one prompt."""
        return self.lengths.shape[0] // self.prompt_lengths.shape[0]

    @property
    def totals(self) -> Int[Array, " n"]:
        """Tokens of each row's stream, its prompt included."""
        return jnp.repeat(self.prompt_lengths, self.copies) + self.lengths

    def places(
        self, rows: Int[Array, " m"], at: Int[Array, "m t"]
    ) -> tuple[Int[Array, "m t"], Int[Array, "m t"]]:
        """Page (over all groups) and slot of these tokens of rows; a page beyond the last where
        the row, or a page for the token, does not exist."""
        groups, per_group, most = self.table.pages.shape
        count = self.keys.shape[1] // groups
        table = jnp.asarray(self.table.pages).reshape(-1, most)
        ids = table.at[rows[:, None], at // self.keys.count].get(mode="fill", fill_value=count)
        pages = ids + (rows // per_group)[:, None] * count
        return jnp.where(ids < count, pages, groups * count), at % self.keys.count

    def with_prompts(
        self,
        slots: Int[Array, " b"],
        keys: Float[Array, "l b k t h"],
        values: Float[Array, "l b k t h"],
    ) -> KVCache:
        """These prompts in these places; lengths stay as they are."""
        return dataclasses.replace(
            self,
            prompt_keys=self.prompt_keys.with_rows(slots, keys),
            prompt_values=self.prompt_values.with_rows(slots, values),
        )

    def turned(self) -> KVCache:
        """With the next layer first, see `CacheArray.turned`."""
        return self._each(CacheArray.turned)

    def sharded(self) -> KVCache:
        """Laid out over the mesh, see `CacheArray.sharded`."""
        return self._each(CacheArray.sharded)

    def _each(self, change: Callable[[CacheArray], CacheArray]) -> KVCache:
        names = ("prompt_keys", "prompt_values", "keys", "values")
        return dataclasses.replace(self, **{name: change(getattr(self, name)) for name in names})
