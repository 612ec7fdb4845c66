"""The language model: grouped-query attention with interleaved M-RoPE, SwiGLU, DeepStack."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.common.attention import Attending, attend
from models.common.cached_attention import append_and_attend
from models.common.experts import Experts, Routed
from models.common.kernels import by_heads, to_tokens
from models.common.layers import ACTIVATIONS, Linear, Remat, RMSNorm, lookup, rotate, scan_layers
from models.qwen3_vl.config import TextConfig
from paravt_jax.kv_cache import KVCache
from paravt_jax.lora import NO_LORA, LoraConfig
from paravt_jax.mesh import by_tokens, by_width, constrain, platform
from paravt_jax.params import Normal, declare, stack
from paravt_jax.records import HiddenKeys, VisionFeatures
from paravt_jax.shared_rows import SharedRows

HF = "model.language_model."

LayerNumber = Int[Array, ""] | np.integer
"""Traced in a scan, known where layers are compiled one by one."""
Rope = tuple[Float[Array, "b t h2"], Float[Array, "b t h2"]]


@dataclasses.dataclass(frozen=True)
class AttentionContext:
    """What a layer does with keys, values and experts besides letting each token attend to those
    before it in its block and choose its own experts."""

    keep: bool = False
    """Return the keys and values of the block: prefill."""
    caches: tuple[KVCache, ...] = ()
    """Append the block to these caches and attend to them."""
    rows: Int[Array, " m"] | None = None
    """The rows of the only cache that the block continues; None for all rows of all caches."""
    segments: Int[Array, "b t"] | None = None
    """Which of several streams in one row each token belongs to: it attends to its own alone."""
    hidden_keys: HiddenKeys | None = None
    """What some tokens of the block may not attend to besides."""
    shared: SharedRows | None = None
    """The block is rows of a prompt and the streams that continue it; None: of whole streams."""
    routing: Int[Array, "b t choices"] | None = None
    """The experts that serve each token, of one sparse layer after the other; see `Experts`."""
    keep_choices: bool = False
    """Return which experts served each token."""


KeysAndValues = tuple[Float[Array, "b t k h"], Float[Array, "b t k h"]]


class Attention(Attending):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, config: TextConfig, hf: str, dtype: Any, lora: LoraConfig):
        c, h = config, config.head_dim
        shared = {"init": Normal(c.initializer_range), "bias": c.attention_bias}
        shared |= {"dtype": dtype, "lora": lora}
        n, k = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = h
        self.query = Linear(c.hidden_size, n * h, ("embed", "heads"), hf + "q_proj", **shared)
        self.key = Linear(c.hidden_size, k * h, ("embed", "kv"), hf + "k_proj", **shared)
        self.value = Linear(c.hidden_size, k * h, ("embed", "kv"), hf + "v_proj", **shared)
        self.out = Linear(n * h, c.hidden_size, ("heads", "embed"), hf + "o_proj", **shared)
        self.query_norm = RMSNorm(h, hf + "q_norm", c.rms_norm_eps)
        self.key_norm = RMSNorm(h, hf + "k_norm", c.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "b t d"], rope: Rope, context: AttentionContext, layer: LayerNumber
    ) -> tuple[Float[Array, "b t d"], AttentionContext, KeysAndValues | None]:
        heads = (*x.shape[:2], -1, self.head_dim)
        query = rotate(self.query_norm(self.query(x).reshape(heads)), *rope)
        key = rotate(self.key_norm(self.key(x).reshape(heads)), *rope)
        value = self.value(x).reshape(heads)
        query = constrain(query, "batch", "tokens", "heads", None)
        if context.caches:
            mixed, caches = append_and_attend(
                context.caches, context.rows, layer, query, key, value
            )
            context = dataclasses.replace(context, caches=caches)
        else:
            mixed = attend(
                *by_heads(query, key, value),
                causal=True,
                segments=context.segments,
                hidden_keys=context.hidden_keys,
                shared=context.shared,
                kernels=self.kernels,
            )
            mixed = to_tokens(mixed)
        kept = (key, value) if context.keep else None
        return self.out(mixed.reshape(*x.shape[:2], -1)), context, kept


class Mlp(nnx.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: TextConfig, hf: str, dtype: Any, lora: LoraConfig):
        d, width = config.hidden_size, config.intermediate_size
        shared = {"init": Normal(config.initializer_range), "dtype": dtype, "lora": lora}
        self.act = config.hidden_act
        self.gate = Linear(d, width, ("embed", "mlp"), hf + "gate_proj", **shared)
        self.up = Linear(d, width, ("embed", "mlp"), hf + "up_proj", **shared)
        self.down = Linear(width, d, ("mlp", "embed"), hf + "down_proj", **shared)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        wide = ACTIVATIONS[self.act](self.gate(x)) * self.up(x)
        return self.down(constrain(wide, "batch", "tokens", "mlp"))


def _experts(config: TextConfig, hf: str, dtype: Any) -> Experts:
    sizes = config.experts
    if sizes is None:
        raise ValueError("config.experts is None: a dense layer has an Mlp")
    return Experts(
        config.hidden_size,
        sizes.moe_intermediate_size,
        sizes.num_experts,
        sizes.num_experts_per_tok,
        config.hidden_act,
        Normal(config.initializer_range),
        hf,
        dtype,
    )


class DecoderLayer(nnx.Module):
    """Pre-norm decoder layer; a `sparse` one has experts instead of an MLP, without adapters."""

    def __init__(self, config: TextConfig, hf: str, dtype: Any, sparse: bool, lora: LoraConfig):
        self.attention_norm = RMSNorm(
            config.hidden_size, hf + "input_layernorm", config.rms_norm_eps
        )
        self.attention = Attention(config, hf + "self_attn.", dtype, lora)
        self.mlp_norm = RMSNorm(
            config.hidden_size, hf + "post_attention_layernorm", config.rms_norm_eps
        )
        mlp = hf + "mlp."
        self.mlp = _experts(config, mlp, dtype) if sparse else Mlp(config, mlp, dtype, lora)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        rope: Rope,
        context: AttentionContext,
        layer: LayerNumber,
        replayed: Int[Array, "b t k"] | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionContext, tuple[Routed | None, KeysAndValues | None]]:
        """Output, grown context, and what the router did and the keys and values, as far as there
        are any. `replayed`: see `Experts`."""
        with jax.named_scope("attention"):
            mixed, context, kept = self.attention(self.attention_norm(x), rope, context, layer)
        x = constrain(x + mixed.astype(x.dtype), "batch", "tokens", None)
        with jax.named_scope("mlp"):
            if isinstance(self.mlp, Experts):
                mixed, routed = self.mlp(self.mlp_norm(x), replayed)
            else:
                mixed, routed = self.mlp(self.mlp_norm(x)), None
        x = constrain(x + mixed.astype(x.dtype), "batch", "tokens", None)
        return x, context, (routed, kept)


class TextTower(nnx.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(
        self,
        config: TextConfig,
        dtype: Any = "float32",
        remat: Remat | None = None,
        lora: LoraConfig = NO_LORA,
    ):
        self.config, self.remat, self.dtype = config, remat, jnp.dtype(dtype)
        c = config
        self.embedding = declare(
            (c.vocab_size, c.hidden_size),
            ("vocab", "embed"),
            Normal(c.initializer_range),
            HF + "embed_tokens.weight",
        )
        self.layers, self.sparse_layers = (self._stack(sparse, lora) for sparse in (False, True))
        self.norm = RMSNorm(c.hidden_size, HF + "norm", c.rms_norm_eps)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
        context: AttentionContext = AttentionContext(),
    ) -> tuple[
        Float[Array, "b t d"],
        AttentionContext,
        Routed | None,
        tuple[Float[Array, "l b t k h"], Float[Array, "l b t k h"]] | None,
    ]:
        """Hidden states after the last norm; the context with grown caches, lengths
        untouched; what the routers of the sparse layers did, their choices and the keys and values
        of all layers if the context asks for them."""
        with jax.named_scope("embedding"):
            x = self.embed(tokens, vision_index, features)
        rope = mrope(positions, self.config)

        def step(layer: DecoderLayer, carry: Any, number: LayerNumber) -> Any:
            x, caches = carry
            before = dataclasses.replace(context, caches=caches)
            replayed = self._replayed(context.routing, number)
            x, after, (routed, kept) = layer(x, rope, before, number, replayed)
            if routed is not None:
                routed = routed._replace(choices=routed.choices if context.keep_choices else None)
            return (add_deepstack(x, vision_index, features, number), after.caches), (routed, kept)

        # On CPU, layers of a cache are arrays that take turns: a loop would copy them at each turn.
        unroll = bool(context.caches) and platform() == "cpu"
        # No gradients in rollouts, where blocks of layers would copy their weights for every token.
        remat = None if context.caches or context.keep else self.remat
        carry, routed, kept = (x, context.caches), [], []
        with jax.named_scope("decoder_layers"):
            for layers, rows, numbers in self._runs():
                carry, (own_routed, own_kept) = scan_layers(
                    layers, step, carry, numbers, remat, unroll, rows=rows
                )
                routed.append(own_routed)
                kept.append(own_kept)
        x, caches = carry
        context = dataclasses.replace(context, caches=caches)
        return self.norm(x), context, _stacked(routed), _stacked(kept)

    def _replayed(
        self, routing: Int[Array, "b t choices"] | None, layer: LayerNumber
    ) -> Int[Array, "b t k"] | None:
        """The part of a layer, which means nothing if the layer is not sparse."""
        if routing is None or self.config.experts is None:
            return None
        sparse = [self.config.is_sparse(i) for i in range(self.config.num_hidden_layers)]
        place = jnp.asarray(np.maximum(np.cumsum(sparse) - 1, 0), jnp.int32)[layer]
        # A slice of the last axis: an array by layer, with so few choices last, would be padded to
        # sixteen times its size on a TPU.
        size = self.config.experts.num_experts_per_tok
        return jax.lax.dynamic_slice_in_dim(routing, place * size, size, axis=2)

    def _stack(self, sparse: bool, lora: LoraConfig) -> DecoderLayer | None:
        """All layers of one kind; None if there is none."""
        c = self.config
        numbers = [i for i in range(c.num_hidden_layers) if c.is_sparse(i) == sparse]
        if not numbers:
            return None
        return stack(DecoderLayer(c, HF + "layers.{}.", self.dtype, sparse, lora), numbers)

    def _runs(self) -> Iterator[tuple[DecoderLayer, slice, Int[np.ndarray, " n"]]]:
        """Consecutive layers of one kind: their stack, their rows in it, their numbers."""
        done, numbers = {False: 0, True: 0}, range(self.config.num_hidden_layers)
        for sparse, group in itertools.groupby(numbers, self.config.is_sparse):
            run = list(group)
            rows = slice(done[sparse], done[sparse] + len(run))
            done[sparse] = rows.stop
            layers = self.sparse_layers if sparse else self.layers
            if layers is not None:
                yield layers, rows, np.asarray(run, np.int32)

    def embed(
        self,
        tokens: Int[Array, "b t"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None,
    ) -> Float[Array, "b t d"]:
        """Token embeddings, with vision tokens in their places."""
        # The residual stream stays float32: over 36 layers, bfloat16 doubles the error of logits.
        x = lookup(self.embedding[...], tokens).astype(jnp.float32)
        if features is not None:
            seen = take_tokens(features.tokens, vision_index).astype(x.dtype)
            x = jnp.where((vision_index >= 0)[..., None], seen, x)
        return constrain(x, "batch", "tokens", None)


def _stacked(runs: Sequence[Any]) -> Any:
    """Layers of all runs one after the other; None if none has any."""
    found = [run for run in runs if run is not None]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found) if found else None


def take_tokens(
    tokens: Float[Array, "b v d"], vision_index: Int[Array, "b t"]
) -> Float[Array, "b t d"]:
    """The vision token of each place; anything where `vision_index` is -1."""
    places = jnp.maximum(vision_index, 0)[..., None]
    return by_tokens(by_width(jnp.take_along_axis(by_width(tokens), places, axis=1)))


def add_deepstack(
    x: Float[Array, "b t d"],
    vision_index: Int[Array, "b t"],
    features: VisionFeatures | None,
    layer: LayerNumber,
) -> Float[Array, "b t d"]:
    """Add DeepStack's features of this layer at the vision tokens (Meng et al., 2024)."""
    if features is None or features.deepstack.shape[1] == 0:
        return x
    levels = features.deepstack.shape[1]

    def add(x: Array) -> Array:
        level = jax.lax.dynamic_index_in_dim(features.deepstack, layer, axis=1, keepdims=False)
        addend = take_tokens(level, vision_index).astype(x.dtype)
        return x + jnp.where((vision_index >= 0)[..., None], addend, 0)

    # All layers share one scanned body; where there is no level, nothing is gathered.
    with jax.named_scope("deepstack"):
        return jax.lax.cond(layer < levels, add, lambda x: x, x)


def mrope(positions: Int[Array, "b t 3"], config: TextConfig) -> Rope:
    """Cosines and sines of interleaved M-RoPE (Qwen3-VL): pairs take turns between time,
    height and width; pairs beyond `3 * mrope_section` follow time."""
    width = config.head_dim
    # Rounded to float32 at each step, as in transformers: at position 10,000 an angle differs.
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequency = 1 / np.float32(config.rope_theta) ** exponent
    turn = np.arange(width // 2)
    limit = 3 * np.array(config.mrope_section)[turn % 3]
    axis = np.where(turn < limit, turn % 3, 0)
    angle = by_tokens(positions[..., axis].astype(jnp.float32) * frequency[None, None])
    return jnp.cos(angle), jnp.sin(angle)
