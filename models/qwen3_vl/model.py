"""Qwen3-VL as `Policy`: pure functions of a flat dict of weights."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.qwen3_vl.config import Qwen3VLConfig
from models.qwen3_vl.layers import Linear, precision
from models.qwen3_vl.text import TextTower
from models.qwen3_vl.vision import VisionTower
from paravt_jax.mesh import constrain
from paravt_jax.params import Blueprint, Normal, Params, Table
from paravt_jax.records import KVCache, VisionFeatures


class Qwen3VL(nnx.Module):
    """Both towers and the vocabulary head, abstract."""

    def __init__(self, config: Qwen3VLConfig, dtype: str = "float32", remat: bool = False):
        text = config.text
        self.dtype = jnp.dtype(dtype)
        self.vision = VisionTower(config.vision, dtype, remat)
        self.text = TextTower(text, dtype, remat)
        self.head = (
            None
            if config.tie_word_embeddings
            else Linear(
                text.hidden_size,
                text.vocab_size,
                ("embed", "vocab"),
                "lm_head",
                init=Normal(text.initializer_range),
                dtype=dtype,
            )
        )

    def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Float32 vocabulary logits; a tied head is the transposed embedding."""
        kernel = self.text.embedding[...].T if self.head is None else self.head.kernel[...]
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(self.dtype)
        logits = jnp.matmul(
            flat,
            kernel.astype(self.dtype),
            precision=precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits.reshape(*hidden.shape[:-1], kernel.shape[-1])


@dataclasses.dataclass(frozen=True)
class Qwen3VLPolicy:
    """Implements `paravt_jax.interfaces.Policy`. Hashable, cheap to close over.

    `compute_dtype` is the type of matrix products and of the cache; weights are cast when used.
    With `remat`, the backward pass computes each layer's activations again.
    """

    config: Qwen3VLConfig
    compute_dtype: str = "float32"
    remat: bool = False

    @property
    def table(self) -> Table:
        """The parameter table."""
        return _blueprint(self).table

    def encode(
        self, params: Params, patches: Float[Array, "b f p c"], grids: Int[Array, "b f 2"]
    ) -> VisionFeatures:
        """Run the vision tower over the frames of each prompt; `v = f * p / merge**2`."""
        with jax.named_scope("vision_tower"):
            return self._bind(params).vision(patches, grids)

    def hidden(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
        cache: KVCache | None = None,
        lengths: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Final hidden states of a right-padded block; see `Policy.hidden`."""
        tower = self._bind(params).text
        with jax.named_scope("language_model"):
            hidden, cache = tower(tokens, positions, vision_index, features, cache)
        if cache is not None:
            grown = cache.lengths + (tokens.shape[1] if lengths is None else lengths)
            cache = dataclasses.replace(cache, lengths=grown)
        return hidden, cache

    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Float32 vocabulary logits of hidden states."""
        with jax.named_scope("vocabulary_head"):
            return self._bind(params).logits(hidden)

    def init_cache(self, batch: int, slots: int) -> KVCache:
        """An empty cache in the compute dtype."""
        text = self.config.text
        shape = (text.num_hidden_layers, batch, slots, text.num_key_value_heads, text.head_dim)
        keys, values = (
            constrain(jnp.zeros(shape, self.compute_dtype), "layers", "batch", None, "kv", None)
            for _ in range(2)
        )
        return KVCache(keys=keys, values=values, lengths=jnp.zeros(batch, jnp.int32))

    def _bind(self, params: Params) -> Qwen3VL:
        return _blueprint(self).bind(params)


@functools.lru_cache(maxsize=16)
def _blueprint(policy: Qwen3VLPolicy) -> Blueprint[Qwen3VL]:
    return Blueprint(Qwen3VL(policy.config, policy.compute_dtype, policy.remat))
