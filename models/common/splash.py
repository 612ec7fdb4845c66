"""Attention on TPU by JAX's splash kernel: scores live in the chip's own memory, a block at a time,
and blocks in which no query sees a key are skipped.

The kernel is FlashAttention (arXiv 2205.14135) with a static mask, known when the program is
compiled, and segment ids, known when it runs. README.md of `models/qwen3_vl` says what runs in
which precision; `models.common.attention.reference` is what it must equal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

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

from models.common.kernels import on_mesh
from paravt_jax.mesh import platform

WIDTH = 128
"""Numbers side by side in a register of a TPU: heads and blocks are multiples of it."""

BLOCKS = (1024, 768, 512)
"""Queries, and keys, of a block. Its keys are read once for all of its queries, 4 FLOPs a query for
4 bytes: to compute longer than it reads, a v6e needs 560 queries, a v5p 170. Blocks of 2,048 leave
no room for the scores."""

SHORT = 256
"""Rows of fewer tokens are left to XLA: a block would be mostly padding."""

LANE_SHIFT = 18
"""A query is told to the kernel as one number: its slot, and above these bits its lane."""


@dataclasses.dataclass(frozen=True)
class StaticMask(masks.Mask):
    """What queries may see by where they stand; the kernel computes it from numbers of slots.

    With `lanes`, rows hold a prompt and then as many lanes, and a query sees the keys before it in
    the prompt and in its own lane. The kernel has no integer division: a query brings its lane.
    """

    slots: int
    prompt: int
    own: int
    """Slots of a lane; 0 without lanes."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.slots, self.slots

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        slots = np.arange(self.slots, dtype=np.int32)
        lanes = np.maximum(slots - self.prompt, 0) // self.own if self.own else 0 * slots
        return slots + (lanes << LANE_SHIFT)

    def mask_function(
        self, query: Array | np.ndarray, key: Array | np.ndarray
    ) -> Array | np.ndarray:
        if not self.own:
            return query >= key
        slot, lane = query & ((1 << LANE_SHIFT) - 1), query >> LANE_SHIFT
        return (slot >= key) & ((key < self.prompt) | (key >= self.prompt + lane * self.own))

    def __getitem__(self, blocks: tuple[slice, slice]) -> np.ndarray:
        keys = np.arange(*blocks[1].indices(self.slots), dtype=np.int32)
        return np.asarray(self.mask_function(self.q_sequence[blocks[0]][:, None], keys[None]))


def serves(query: Float[Array, "b t n h"], key: Float[Array, "b s k h"]) -> bool:
    """Whether `attend` takes these: on a TPU, tokens of a row among themselves, 16 bits. The kernel
    multiplies 16 bits at a time whatever it is given: float32 stays with what is exact."""
    narrow = query.dtype == key.dtype == jnp.bfloat16
    same = query.shape[1] == key.shape[1] and SHORT <= query.shape[1] < 1 << LANE_SHIFT
    return platform() == "tpu" and narrow and same


def attend(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    *,
    causal: bool,
    lanes: int = 0,
    prompt: int = 0,
    segments: Int[Array, "b t"] | None = None,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """Softmax attention with grouped heads, scaled by `h**-0.5`, of tokens among themselves.

    Queries see keys of their own segment; when `causal`, those up to themselves, and with `lanes`
    (which are causal) only what `StaticMask` says. Splits rows and heads over the active mesh.

    Args:
      lanes: equal parts of what follows the first `prompt` slots of each row.
      interpret: emulate the kernel, for tests without a TPU.
    """
    t = query.shape[1]
    padded, block = padded_length(t)
    own = (t - prompt) // lanes if lanes else 0
    mask = StaticMask(padded, prompt, own) if causal else masks.FullMask((padded, padded))
    kernel = _kernel(mask, block, interpret)
    if segments is None and padded > t and not causal:
        segments = jnp.zeros((query.shape[0], t), jnp.int32)
    if segments is not None:
        # Padding is a segment of its own: its queries must see something.
        segments = jnp.pad(segments, [(0, 0), (0, padded - t)], constant_values=-1)
    return on_mesh(functools.partial(_rows, kernel, padded), query, key, value, segments)


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
def _kernel(mask: masks.Mask, block: int, interpret: bool) -> Callable:
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
    kernel: Callable,
    slots: int,
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    segments: Int[Array, "b slots"] | None,
) -> Float[Array, "b t n h"]:
    t, h = query.shape[1], query.shape[3]

    def row(query: Array, key: Array, value: Array, segments: Array | None) -> Array:
        ids = None if segments is None else kernels.SegmentIds(q=segments, kv=segments)
        return kernel(query, key, value, segment_ids=ids)

    query, key, value = (_heads_first(x, slots) for x in (query * h**-0.5, key, value))
    mixed = jax.vmap(row)(query, key, value, segments)
    return mixed.swapaxes(1, 2)[:, :t, :, :h]


def _heads_first(x: Float[Array, "b t n h"], slots: int) -> Float[Array, "b n slots w"]:
    pads = [(0, 0), (0, slots - x.shape[1]), (0, 0), (0, -x.shape[3] % WIDTH)]
    return jnp.pad(x, pads).swapaxes(1, 2)
