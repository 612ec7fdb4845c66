"""Attention on TPU by JAX's splash kernel: scores live in the chip's own memory, a block at a time,
and blocks in which no query sees a key are skipped.

The kernel is FlashAttention (arXiv 2205.14135) with a static mask, known when the program is
compiled, and segment ids, known when it runs. README.md of `models/qwen3_vl` says what runs in
which precision; `models.common.attention.reference` is what it must equal.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import (
    process_mask,
    process_mask_dkv,
)
from jaxtyping import Array, Float, Int

from models.common.kernels import WHOLE_ROWS, AttentionSplit, on_mesh
from paravt_jax.mesh import platform
from paravt_jax.shared_rows import NUMBER_BITS, TILE, Bounds, SharedRows

WIDTH = 128
"""Numbers side by side in a register of a TPU: heads and blocks are multiples of it."""

BLOCKS = (1024, 768, 512)
"""Queries, and keys, of a block. Its keys are read once for all of its queries, 4 FLOPs a query for
4 bytes: to compute longer than it reads, a v6e needs 560 queries, a v5p 170. Blocks of 2,048 leave
no room for the scores."""

SHORT = 256
"""Rows of fewer tokens are left to XLA: a block would be mostly padding."""


@dataclasses.dataclass(frozen=True)
class StaticMask(masks.Mask):
    """What queries may see by where they stand; the kernel computes it from numbers of slots.

    With `own`, rows hold prompts and streams: of what is known when a program is compiled, a query
    may see the first `prompt` keys and the last `own` before it. What it does see is told when it
    runs, by `mask_numbers`; and the kernel has no integer division.
    """

    slots: int
    prompt: int = 0
    own: int = 0
    """0 without streams."""
    unit: int = TILE

    @property
    def _bounds(self) -> Bounds:
        return Bounds(self.prompt, self.own, self.unit)

    @property
    def shape(self) -> tuple[int, int]:
        return self.slots, self.slots

    @property
    def q_sequence(self) -> np.ndarray:
        return np.arange(self.slots, dtype=np.int32)

    def mask_function(
        self, query: Array | np.ndarray, key: Array | np.ndarray
    ) -> Array | np.ndarray:
        if not self.own:
            return query >= key
        (slots, ages, _), shift = self._bounds.bits(self.slots), _shift(self.unit)
        slot, age = query & ((1 << slots) - 1), (query >> slots) & ((1 << ages) - 1)
        begin = ((slot >> shift) - age) << shift
        prompt = (query >> (slots + ages)) << shift
        return (slot >= key) & ((key < prompt) | (key >= begin))

    def __getitem__(self, blocks: tuple[slice, slice]) -> np.ndarray:
        (start, end, _), (first, last, _) = (block.indices(self.slots) for block in blocks)
        own = max(self.own, self.unit) if self.own else self.slots
        # Of 131,072 slots there are 16,384 blocks, of which a few hundred are seen in part.
        if first >= end or (first >= self.prompt and last <= start - own + 1):
            return _constant(False, end - start, last - first)
        if last <= start + 1 and (last <= self.prompt or first > end - 1 - own):
            return _constant(True, end - start, last - first)
        query = np.arange(start, end, dtype=np.int32)[:, None]
        key = np.arange(first, last, dtype=np.int32)[None]
        return (query >= key) & ((key < self.prompt) | (key > query - own))


@functools.cache
def _constant(value: bool, queries: int, keys: int) -> np.ndarray:
    return np.full((queries, keys), value)


def _shift(unit: int) -> int:
    return unit.bit_length() - 1


def mask_numbers(shared: SharedRows, slots: int) -> Int[Array, "rows slots"]:
    """What the mask of rows with streams knows of each query, packed into a number."""
    segments, at = shared.segments(slots), jnp.arange(slots, dtype=jnp.int32)[None]
    (slot_bits, age_bits, _), unit = shared.bounds.bits(slots), shared.bounds.unit
    begins = jnp.where(segments >= 0, shared.begins(slots), at)
    prompts = -(-jnp.asarray(shared.prompt_lengths) // unit)[:, None]
    # A prompt is no stream that began before: all of it up to a query is its prompt.
    ages = jnp.where(segments > 0, at // unit - begins // unit, 0)
    return at | (ages << slot_bits) | (prompts << (slot_bits + age_bits))


def serves(query: Float[Array, "b t n h"], key: Float[Array, "b s k h"]) -> bool:
    """Whether `attend` takes these: on a TPU, tokens of a row among themselves, 16 bits. The kernel
    multiplies 16 bits at a time whatever it is given: float32 stays with what is exact."""
    narrow = query.dtype == key.dtype == jnp.bfloat16
    same = query.shape[1] == key.shape[1] and query.shape[1] >= SHORT
    return platform() == "tpu" and narrow and same


def holds(bounds: Bounds, slots: int) -> bool:
    """Whether `mask_numbers` can tell of rows of so many slots within these bounds."""
    tiles = bounds.unit % TILE == 0 and bounds.unit & (bounds.unit - 1) == 0
    return tiles and sum(bounds.bits(padded_length(slots)[0])) <= NUMBER_BITS


def attend(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    *,
    causal: bool,
    shared: SharedRows | None = None,
    segments: Int[Array, "b t"] | None = None,
    split: AttentionSplit = WHOLE_ROWS,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped heads, scaled by `h**-0.5`, of tokens among themselves.

    Queries see keys of their own segment; when `causal`, those up to themselves, and where prompts
    are `shared` (then it is causal, and without segments), of these only those of their prompt and
    of their stream. Splits rows and heads over the active mesh.

    Args:
      interpret: emulate the kernel, for tests without a TPU.
    """
    t = query.shape[1]
    padded, block = padded_length(t)
    numbers = None if shared is None else mask_numbers(shared, padded)
    if shared is not None:
        # Streams end before their last tile does, and prompts.
        segments = jnp.minimum(shared.segments(t), 0)
    bounds = () if shared is None else dataclasses.astuple(shared.bounds)
    mask = StaticMask(padded, *bounds) if causal else masks.FullMask((padded, padded))
    kernel = _kernel(mask, block, interpret)
    if segments is None and padded > t and not causal:
        segments = jnp.zeros((query.shape[0], t), jnp.int32)
    if segments is not None:
        # Padding is a segment of its own: its queries must see something.
        segments = jnp.pad(segments, [(0, 0), (0, padded - t)], constant_values=-1)
    rows = functools.partial(_rows, kernel, padded)
    return on_mesh(rows, query, key, value, (segments, numbers), split)


def padded_length(tokens: int) -> tuple[int, int]:
    """Slots for so many tokens, and the size of their blocks: the fewest slots, then the largest
    block."""
    if tokens <= min(BLOCKS):
        block = -(-tokens // WIDTH) * WIDTH
        return block, block

    def slots(block: int) -> int:
        return -(-tokens // block) * block

    block = min(BLOCKS, key=lambda block: (slots(block), -block))
    return slots(block), block


@functools.lru_cache(maxsize=64)
def _kernel(mask: masks.Mask, block: int, interpret: bool) -> kernels.SplashAttentionKernel:
    """The kernel, which visits the blocks in which a query may see a key. They are found in numpy,
    once for a mask: a second or two at 20,000 tokens."""
    inner = block // 2 if block in BLOCKS else block
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=inner,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=inner,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # One mask serves all heads, whatever their number on a device. `make_splash_mha` would put it
    # on a device, where there may be none of the kind that is compiled for.
    heads, shards = masks.MultiHeadMask([mask]), {"head_shards": 1, "q_seq_shards": 1}
    queries, function = process_mask(heads, (block, block), **shards)
    keys, _ = process_mask_dkv(heads, (block, block), **shards)
    if isinstance(mask, StaticMask) and mask.own:
        # What may be seen need not be: no block is taken as it is.
        queries, keys = (
            info._replace(block_mask=np.minimum(info.block_mask, 1)) for info in (queries, keys)
        )
    return kernels.SplashAttentionKernel(
        queries,
        queries,
        keys,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=function,
        interpret=interpret,
    )


def _rows(
    kernel: kernels.SplashAttentionKernel,
    slots: int,
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    of_rows: tuple[Int[Array, "b slots"] | None, Int[Array, "b slots"] | None],
) -> Float[Array, "b t n h"]:
    t, h = query.shape[1], query.shape[3]

    def row(
        query: Array, key: Array, value: Array, of_row: tuple[Array | None, Array | None]
    ) -> Any:
        segments, numbers = of_row
        ids = None if segments is None else kernels.SegmentIds(q=segments, kv=segments)
        attention = kernel if numbers is None else _with_numbers(kernel, numbers)
        return attention(query, key, value, segment_ids=ids)

    query, key, value = (_heads_first(x, slots) for x in (query * h**-0.5, key, value))
    mixed = jax.vmap(row)(query, key, value, of_rows)
    return mixed.swapaxes(1, 2)[:, :t, :, :h]


def _with_numbers(
    kernel: kernels.SplashAttentionKernel, numbers: Int[Array, " slots"]
) -> kernels.SplashAttentionKernel:
    """The kernel with other numbers for its mask to work with."""
    infos: Any = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
    return kernels.SplashAttentionKernel(
        *(info._replace(q_sequence=numbers) for info in infos), **kernel.kwargs
    )


def _heads_first(x: Float[Array, "b t n h"], slots: int) -> Float[Array, "b n slots w"]:
    pads = [(0, 0), (0, slots - x.shape[1]), (0, 0), (0, -x.shape[3] % WIDTH)]
    return jnp.pad(x, pads).swapaxes(1, 2)
