"""The vision tower: frames of patches to vision tokens.

One compiled tower serves all grids: the number of patch rows and columns of each frame is
data, not shape, and every position is integer arithmetic on it. A frame attends to itself
only, so its tokens do not depend on the other frames of its batch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.common.attention import Attending, attend
from models.common.kernels import AttentionSplit
from models.common.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    Remat,
    lookup,
    rotate,
    scan_layers,
)
from models.common.products import Weighted, add_bias, flat_rows, multiply
from models.qwen3_vl.config import VisionConfig
from paravt_jax.mesh import by_width, constrain, frames_axis
from paravt_jax.params import Constant, HfLayout, Normal, declare, stack
from paravt_jax.records import VisionFeatures

HF = "model.visual."


@dataclasses.dataclass(frozen=True)
class DctBasis:
    """Patch embedding that starts as a two-dimensional cosine transform of each channel.

    Units take the frequencies from lowest to highest, channel by channel, averaged over the
    temporal patch; the mean of the patch has unit gain and all other frequencies
    `detail_gain`. Units beyond the basis are normal. With independent random weights a small
    model sees colours long before shapes; from this start it learns both at once.
    """

    channels: int
    frames: int
    side: int
    detail_gain: float = 3.0
    stddev: float = 0.02

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        basis = self._basis()[:, : shape[1]]
        rest = self.stddev * jax.random.normal(key, (shape[0], shape[1] - basis.shape[1]), dtype)
        return jnp.concatenate([jnp.asarray(basis, dtype), rest], axis=1)

    def _basis(self) -> np.ndarray:
        """float64 `[channel * frame * row * column, frequency * channel]`."""
        n = self.side
        waves = np.cos(np.pi * (2 * np.arange(n) + 1) * np.arange(n)[:, None] / (2 * n))
        waves[1:] *= 2**0.5
        order = sorted(np.ndindex(n, n), key=lambda uv: (sum(uv), uv))
        planes = np.stack([np.outer(waves[u], waves[v]) for u, v in order]) / n**2
        planes[1:] *= self.detail_gain
        clips = np.repeat(planes[:, None], self.frames, axis=1) / self.frames
        units = np.einsum("utyx,ab->atyxub", clips, np.eye(self.channels))
        return units.reshape(self.channels * self.frames * n * n, -1)


class VisionAttention(Weighted, Attending):
    """Full attention among the patches of one frame."""

    def __init__(self, config: VisionConfig, hf: str, dtype: Any):
        d, init = config.hidden_size, Normal(config.initializer_range)
        self.heads, self.dtype = config.num_heads, jnp.dtype(dtype)
        # One tensor in checkpoints; a dimension of its own here, so that splitting the heads
        # over devices keeps each head's query, key and value together.
        self.qkv = declare(
            (d, 3, d), ("embed", None, "heads"), init, hf + "qkv.weight", HfLayout((3 * d, d))
        )
        self.qkv_bias = declare(
            (3, d),
            (None, "heads"),
            Constant(0.0),
            hf + "qkv.bias",
            HfLayout((3 * d,), swapped=False),
        )
        self.out = Linear(d, d, ("heads", "embed"), hf + "proj", init=init, bias=True, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "r p d"],
        rope: tuple[Float[Array, "r p h2"], Float[Array, "r p h2"]],
        counts: Int[Array, " r"],
    ) -> Float[Array, "r p d"]:
        query, key, value = (self._project(x, part) for part in range(3))
        query, key = rotate(query, *rope), rotate(key, *rope)
        split = AttentionSplit(frames_axis(x.shape[0]), "heads")
        mixed = attend(query, key, value, key_lengths=counts, kernels=self.kernels, split=split)
        return self.out(mixed.reshape(*x.shape[:2], -1))

    def _project(self, x: Float[Array, "r p d"], part: int) -> Float[Array, "r p n h"]:
        flat = flat_rows(x).astype(self.dtype)
        y = multiply(flat, self.qkv[:, part], ("embed", "heads"), self.wide_gradients)
        y = add_bias(y, self.qkv_bias[part], self.wide_gradients)
        return y.reshape(*x.shape[:2], self.heads, -1)


class VisionMlp(nnx.Module):
    """Two layers with a GELU between."""

    def __init__(self, config: VisionConfig, hf: str, dtype: Any):
        d, width, self.act = config.hidden_size, config.intermediate_size, config.hidden_act
        shared = {"init": Normal(config.initializer_range), "bias": True, "dtype": dtype}
        self.up = Linear(d, width, ("embed", "mlp"), hf + "linear_fc1", **shared)
        self.down = Linear(width, d, ("mlp", "embed"), hf + "linear_fc2", **shared)

    def __call__(self, x: Float[Array, "r p d"]) -> Float[Array, "r p d"]:
        return self.down(ACTIVATIONS[self.act](self.up(x)))


class VisionBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, hf: str, dtype: Any):
        self.attention_norm = LayerNorm(config.hidden_size, hf + "norm1")
        self.attention = VisionAttention(config, hf + "attn.", dtype)
        self.mlp_norm = LayerNorm(config.hidden_size, hf + "norm2")
        self.mlp = VisionMlp(config, hf + "mlp.", dtype)

    def __call__(
        self, x: Float[Array, "r p d"], rope: tuple[Array, Array], counts: Int[Array, " r"]
    ) -> Float[Array, "r p d"]:
        x = x + self.attention(self.attention_norm(x), rope, counts).astype(x.dtype)
        return x + self.mlp(self.mlp_norm(x)).astype(x.dtype)


class Merger(nnx.Module):
    """Folds each block of merge x merge patches into one token of the language model.

    DeepStack's mergers norm the folded block (`norm_folded`), the main one each patch. The
    GELU is the exact one, whatever the blocks use.
    """

    def __init__(self, config: VisionConfig, hf: str, dtype: Any, norm_folded: bool):
        shared = {"init": Normal(config.initializer_range), "bias": True, "dtype": dtype}
        self.folded = width = config.hidden_size * config.spatial_merge_size**2
        self.norm_folded = norm_folded
        self.norm = LayerNorm(self.folded if norm_folded else config.hidden_size, hf + "norm")
        self.up = Linear(width, width, ("embed", "mlp"), hf + "linear_fc1", **shared)
        out = config.out_hidden_size
        self.down = Linear(width, out, ("mlp", "embed"), hf + "linear_fc2", **shared)

    def __call__(self, x: Float[Array, "r p d"]) -> Float[Array, "r q e"]:
        folded = (x.shape[0], -1, self.folded)
        x = self.norm(x.reshape(folded)) if self.norm_folded else self.norm(x).reshape(folded)
        return self.down(ACTIVATIONS["gelu"](self.up(x)))


class VisionTower(nnx.Module):
    """Patch embedding, learned and rotary positions, blocks, mergers."""

    def __init__(self, config: VisionConfig, dtype: Any = "float32", remat: Remat | None = None):
        self.config, self.remat = config, remat
        c, d, side = config, config.hidden_size, config.patch_size
        self.patch_embedding = Linear(
            c.patch_values,
            d,
            (None, "embed"),
            HF + "patch_embed.proj",
            bias=True,
            dtype=dtype,
            init=DctBasis(c.in_channels, c.temporal_patch_size, side, stddev=c.initializer_range),
            hf_shape=(d, c.in_channels, c.temporal_patch_size, side, side),
        )
        self.positions = declare(
            (c.num_position_embeddings, d),
            ("positions", "embed"),
            Normal(c.initializer_range),
            HF + "pos_embed.weight",
        )
        self.blocks = stack(VisionBlock(c, HF + "blocks.{}.", dtype), range(c.depth))
        self.merger = Merger(c, HF + "merger.", dtype, norm_folded=False)
        taps = len(c.deepstack_visual_indexes)
        self.deepstack = (
            stack(Merger(c, HF + "deepstack_merger_list.{}.", dtype, norm_folded=True), range(taps))
            if taps
            else None
        )

    def __call__(
        self, patches: Float[Array, "b f p c"], grids: Int[Array, "b f 2"]
    ) -> VisionFeatures:
        """Vision tokens of all frames, frame-major; tokens beyond a frame's grid mean nothing."""
        b, f, p, c = patches.shape
        # Frames know nothing of each other: all devices share those of a few prompts.
        patches = constrain(patches.reshape(b * f, p, c), frames_axis(b * f), None, None)
        final, tapped = self.walk(patches, grids.reshape(b * f, 2))
        with jax.named_scope("mergers"):
            tokens = self.merger(final)
            tokens = tokens.reshape(b, -1, tokens.shape[-1])
            deepstack = self._merge_taps(tapped, b)
        return VisionFeatures(tokens=by_width(tokens), deepstack=by_width(deepstack))

    def embed(
        self, patches: Float[Array, "r p c"], grids: Int[Array, "r 2"]
    ) -> Float[Array, "r p d"]:
        """Patch embeddings plus the learned positions, resampled to each frame's grid."""
        row, col = patch_coordinates(grids, patches.shape[1], self.config.spatial_merge_size)
        # The residual stream stays float32: with bfloat16 the error of logits doubles (ADR 7).
        x = self.patch_embedding(patches).astype(jnp.float32)
        return x + self._learned_positions(row, col, grids).astype(x.dtype)

    def walk(
        self, patches: Float[Array, "r p c"], grids: Int[Array, "r 2"]
    ) -> tuple[Float[Array, "r p d"], Float[Array, "e r p d"]]:
        """Output of the last block, and of the blocks that DeepStack taps."""
        with jax.named_scope("patch_embedding"):
            x = self.embed(patches, grids)
        rope, counts = self.rope(grids, patches.shape[1]), grids[:, 0] * grids[:, 1]
        indexes = self.config.deepstack_visual_indexes
        tap_of_block = np.full(self.config.depth, len(indexes), np.int32)
        tap_of_block[list(indexes)] = np.arange(len(indexes))

        def step(block: VisionBlock, carry: tuple[Array, Array], tap: Array) -> Any:
            x, tapped = carry
            x = constrain(block(x, rope, counts), frames_axis(x.shape[0]), None, None)
            if indexes:
                # An untapped block points beyond the buffer, and its write is dropped.
                tapped = tapped.at[tap].set(x, mode="drop")
            return (x, tapped), None

        with jax.named_scope("vision_blocks"):
            start = x, jnp.zeros((len(indexes), *x.shape), x.dtype)
            (x, tapped), _ = scan_layers(
                self.blocks, step, start, jnp.asarray(tap_of_block), self.remat
            )
        return x, tapped

    def _merge_taps(self, tapped: Float[Array, "e r p w"], b: int) -> Float[Array, "b e v d"]:
        if self.deepstack is None:
            v = tapped.shape[1] // b * tapped.shape[2] // self.config.spatial_merge_size**2
            return jnp.zeros((b, 0, v, self.config.out_hidden_size), tapped.dtype)
        _, merged = scan_layers(
            self.deepstack, lambda merger, _, x: (None, merger(x)), None, tapped
        )
        return merged.reshape(merged.shape[0], b, -1, merged.shape[-1]).swapaxes(0, 1)

    def _learned_positions(
        self, row: Int[Array, "r p"], col: Int[Array, "r p"], grids: Int[Array, "r 2"]
    ) -> Float[Array, "r p d"]:
        """Bilinear resampling of the learned grid, corners aligned."""
        side, table = self.config.grid_side, self.positions[...]
        rows = _taps(row, grids[:, :1], side)
        cols = _taps(col, grids[:, 1:], side)
        corners = (
            lookup(table, r * side + c).astype(jnp.float32) * (wr * wc)[..., None]
            for r, wr in rows
            for c, wc in cols
        )
        return functools.reduce(jnp.add, corners)

    def rope(self, grids: Int[Array, "r 2"], p: int) -> tuple[Array, Array]:
        """Cosines and sines `[r, p, h/2]`: the first half turns with the row, the second with
        the column."""
        row, col = patch_coordinates(grids, p, self.config.spatial_merge_size)
        width = self.config.head_dim // 2
        exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
        frequency = 1 / np.float32(self.config.rope_theta) ** exponent
        angle = jnp.stack([row, col], axis=-1)[..., None].astype(jnp.float32)
        angle = angle * frequency[None, None, None]
        angle = angle.reshape(*row.shape, -1)
        return jnp.cos(angle), jnp.sin(angle)


def patch_coordinates(
    grids: Int[Array, "r 2"], p: int, merge: int
) -> tuple[Int[Array, "r p"], Int[Array, "r p"]]:
    """Row and column of each patch of each frame; patches come in blocks of merge x merge."""
    index = jnp.arange(p, dtype=grids.dtype)[None]
    block, inside = index // merge**2, index % merge**2
    # A padding frame has no columns; its coordinates mean nothing but must be defined.
    blocks_per_row = jnp.maximum(grids[:, 1:] // merge, 1)
    row = block // blocks_per_row * merge + inside // merge
    col = block % blocks_per_row * merge + inside % merge
    return row, col


def _taps(
    index: Int[Array, "r p"], size: Int[Array, "r 1"], side: int
) -> list[tuple[Int[Array, "r p"], Float[Array, "r p"]]]:
    """The two nearest entries of a table of `side` entries, with their weights."""
    where = index.astype(jnp.float32) * (side - 1) / jnp.maximum(size - 1, 1).astype(jnp.float32)
    # Padding patches lie beyond the grid: keep them inside the table.
    where = jnp.clip(where, 0, side - 1)
    low = jnp.floor(where)
    share = where - low
    below = low.astype(jnp.int32)
    return [(below, 1 - share), (jnp.minimum(below + 1, side - 1), share)]
