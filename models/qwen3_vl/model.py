"""Qwen3-VL as `Policy`: pure functions of a flat dict of weights."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from models.common import prepared
from models.common.attention import choose_kernels
from models.common.experts import Routed
from models.common.kernels import Kernels
from models.common.layers import Linear, Remat
from models.common.products import Weighted, multiply, widen_gradients
from models.common.weights import MAX_SHARD_BYTES, save_weights
from models.qwen3_vl.config import Qwen3VLConfig
from models.qwen3_vl.folder import write_config
from models.qwen3_vl.parts import part_of
from models.qwen3_vl.text import AttentionContext, TextTower
from models.qwen3_vl.vision import VisionTower
from paravt_jax.array_store import StoredArray
from paravt_jax.interfaces import Appended, Prefilled
from paravt_jax.kv_cache import CacheArray, KVCache, PageTable, empty_keys, whole_tiles
from paravt_jax.lora import NO_LORA, LoraConfig, Merged, adapter_table
from paravt_jax.mesh import split_columns
from paravt_jax.params import Blueprint, Normal, Params, Table
from paravt_jax.records import HiddenKeys, VisionFeatures
from paravt_jax.routing import RoutingShape
from paravt_jax.shared_rows import SharedRows

HEAD = "head.kernel"
"""The head in the table of parameters. Prepared weights hold one even where it is tied."""


class Qwen3VL(Weighted):
    """Both towers and the vocabulary head, abstract."""

    def __init__(
        self,
        config: Qwen3VLConfig,
        dtype: str = "float32",
        remat: Remat | None = None,
        lora: LoraConfig = NO_LORA,
    ):
        text = config.text
        self.dtype = jnp.dtype(dtype)
        self.vision = VisionTower(config.vision, dtype, remat)
        self.text = TextTower(text, dtype, remat, lora)
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
        """Float32 vocabulary logits."""
        return self._product(hidden, self.head_kernel)

    def split_logits(self) -> Callable[[Float[Array, "*b d"]], Float[Array, "*b vocab"]]:
        """`logits` for a scan, split over the vocabulary; see `split_columns`."""
        head = split_columns(self._product, lambda: self.head_kernel)
        # Cast first: what is gathered takes half.
        return lambda hidden: head(hidden.astype(self.dtype))

    @property
    def head_kernel(self) -> Float[Array, "d vocab"]:
        """A tied head is the transposed embedding."""
        return self.text.embedding[...].T if self.head is None else self.head.kernel[...]

    def _product(
        self, hidden: Float[Array, "*b d"], kernel: Float[Array, "d vocab"]
    ) -> Float[Array, "*b vocab"]:
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(self.dtype)
        # In bfloat16 logits near 20 are 0.125 apart, and log-probabilities would be as well.
        logits = multiply(flat, kernel, None, self.wide_gradients, jnp.float32)
        return logits.reshape(*hidden.shape[:-1], kernel.shape[-1])


@dataclasses.dataclass(frozen=True)
class Qwen3VLPolicy:
    """Implements `models.common.policy.ModelPolicy`. Hashable, cheap to close over.

    `compute_dtype` is the type of matrix products; weights are cast when used. With `remat`, the
    backward pass computes each layer's activations again, as `remat_keeps` and `remat_block` say
    (`Remat`). With `lora`, the language model has adapters, whose weights stand in the table beside
    the others. `cache_dtype` is the type that `init_cache` keeps keys and values in: `compute`, the
    type of products, or `int8`; `gradient_dtype` that of gradients of weights: `compute` or
    `float32`; `attention` says what computes it (`Kernels`).
    """

    config: Qwen3VLConfig
    compute_dtype: str = "float32"
    remat: bool = False
    lora: LoraConfig = NO_LORA
    cache_dtype: str = "compute"
    gradient_dtype: str = "compute"
    remat_keeps: str = "nothing"
    remat_block: int = 1
    attention: Kernels = "auto"

    @property
    def width(self) -> int:
        """Width of a hidden state."""
        return self.config.text.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.text.vocab_size

    @property
    def context_length(self) -> int:
        """Positions that the model was made for."""
        return self.config.text.max_position_embeddings

    @property
    def patch_sizes(self) -> tuple[int, int, int]:
        """Pixels of a patch's side, patches of a vision token's side, frames of a patch."""
        vision = self.config.vision
        return vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size

    @property
    def deepstack_levels(self) -> int:
        """Language layers that vision features are added to besides the embedding."""
        return len(self.config.vision.deepstack_visual_indexes)

    @property
    def experts_per_token(self) -> int:
        """Experts that serve each token; 0 for a dense model."""
        experts = self.config.text.experts
        return 0 if experts is None else experts.num_experts_per_tok

    @property
    def routing(self) -> RoutingShape | None:
        """Shape of a record of its routing; None for a dense model."""
        text = self.config.text
        if text.experts is None:
            return None
        layers = sum(text.is_sparse(number) for number in range(text.num_hidden_layers))
        experts = text.experts
        return RoutingShape(layers, experts.num_experts_per_tok, experts.num_experts)

    @property
    def splits(self) -> tuple[int, int, int]:
        """Heads of queries and of keys, and experts, 0 for none; see `ModelPolicy.splits`."""
        text = self.config.text
        experts = 0 if text.experts is None else text.experts.num_experts
        return text.num_attention_heads, text.num_key_value_heads, experts

    @property
    def table(self) -> Table:
        """The parameter table.

        Raises:
          ValueError: a projection that `lora` targets does not occur in this model.
        """
        return _blueprint(self).table

    @property
    def without_lora(self) -> Qwen3VLPolicy:
        """The same model without adapters."""
        return dataclasses.replace(self, lora=NO_LORA)

    def merge(self, params: Mapping[str, Array | StoredArray]) -> Merged:
        """Weights for `without_lora` that compute the same: adapters added to their kernels."""
        return Merged(params, self.lora)

    def save_folder(
        self,
        params: Mapping[str, Array | StoredArray],
        folder: str | os.PathLike,
        base: str | os.PathLike | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Write a folder that transformers loads, of merged weights; see `save_weights`."""
        describe = functools.partial(write_config, self.config)
        save_weights(params, self.without_lora.table, folder, base, max_shard_bytes, describe)

    def prepare(self, params: Params) -> Params:
        """Weights that compute the same, faster; see `prepared`."""
        return prepared.prepare(params, self.table, HEAD, jnp.dtype(self.compute_dtype))

    def shardings(self, params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
        """Where prepared weights live on a mesh."""
        return prepared.shardings(params, self.table, HEAD, mesh)

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
        segments: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """Final hidden states of right-padded rows; each token sees those before it, of its own
        segment if there are several."""
        arguments = tokens, positions, vision_index, features, segments
        return self.hidden_and_router(params, *arguments)[0]

    def hidden_and_router(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
        segments: Int[Array, "b t"] | None = None,
        hidden_keys: HiddenKeys | None = None,
        shared: SharedRows | None = None,
        routing: Int[Array, "b t choices"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b t e"] | None]:
        """As `hidden`, and the router's logits of the sparse layers, None for a dense model; see
        `TrainablePolicy.hidden_and_router`."""
        tower = self._bind(params).text
        context = AttentionContext(
            segments=segments, hidden_keys=hidden_keys, shared=shared, routing=routing
        )
        with jax.named_scope("language_model"):
            hidden, _, routed, _ = tower(tokens, positions, vision_index, features, context)
        return hidden, None if routed is None else routed.logits

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "l b k t h"], Float[Array, "l b k t h"]]:
        """Final hidden states of prompts, and the keys and values that continue them."""
        arguments = tokens, positions, vision_index, features
        return self._prefill(params, *arguments, AttentionContext(keep=True))[0]

    def prefill_and_routing(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None = None,
    ) -> tuple[Prefilled, Int[Array, "b t choices"]]:
        """As `prefill`, and the experts that served each token; see `RoutedPolicy`."""
        context = AttentionContext(keep=True, keep_choices=True)
        arguments = tokens, positions, vision_index, features
        prefilled, routed = self._prefill(params, *arguments, context)
        return prefilled, self._by_token(routed)

    def _prefill(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t 3"],
        vision_index: Int[Array, "b t"],
        features: VisionFeatures | None,
        context: AttentionContext,
    ) -> tuple[Prefilled, Routed | None]:
        tower = self._bind(params).text
        with jax.named_scope("language_model"):
            hidden, _, routed, kept = tower(tokens, positions, vision_index, features, context)
        assert kept is not None
        keys, values = (x.swapaxes(2, 3) for x in kept)
        return (hidden, keys, values), routed

    def _by_token(self, routed: Routed | None) -> Int[Array, "b t choices"]:
        """Choices of all sparse layers, side by side."""
        assert routed is not None and routed.choices is not None and self.routing is not None
        choices = jnp.moveaxis(routed.choices.astype(self.routing.dtype), 0, 2)
        return choices.reshape(*choices.shape[:2], -1)

    def append(
        self,
        params: Params,
        tokens: Int[Array, "m t"],
        positions: Int[Array, "m t 3"],
        vision_index: Int[Array, "m t"],
        features: VisionFeatures | None,
        caches: tuple[KVCache, ...],
        rows: Int[Array, " m"] | None = None,
    ) -> tuple[Float[Array, "m t d"], tuple[KVCache, ...]]:
        """Final hidden states of a block that continues running rows; see `Policy.append`."""
        tower = self._bind(params).text
        context = AttentionContext(caches=caches, rows=rows)
        with jax.named_scope("language_model"):
            hidden, context, _, _ = tower(tokens, positions, vision_index, features, context)
        return hidden, context.caches

    def append_and_routing(
        self,
        params: Params,
        tokens: Int[Array, "m t"],
        positions: Int[Array, "m t 3"],
        vision_index: Int[Array, "m t"],
        features: VisionFeatures | None,
        caches: tuple[KVCache, ...],
        rows: Int[Array, " m"] | None = None,
    ) -> tuple[Appended, Int[Array, "m t choices"]]:
        """As `append`, and the experts that served each token; see `RoutedPolicy`."""
        tower = self._bind(params).text
        context = AttentionContext(caches=caches, rows=rows, keep_choices=True)
        with jax.named_scope("language_model"):
            hidden, context, routed, _ = tower(tokens, positions, vision_index, features, context)
        return (hidden, context.caches), self._by_token(routed)

    def logits(self, params: Params, hidden: Float[Array, "*b d"]) -> Float[Array, "*b vocab"]:
        """Float32 vocabulary logits of hidden states."""
        with jax.named_scope("vocabulary_head"):
            return self._bind(params).logits(hidden)

    def head(self, params: Params) -> Callable[[Float[Array, "*b d"]], Float[Array, "*b vocab"]]:
        """What maps hidden states to float32 logits; see `TrainablePolicy.head`."""
        with jax.named_scope("vocabulary_head"):
            return self._bind(params).split_logits()

    def init_cache(
        self, prompts: int, copies: int, prompt_slots: int, suffix_slots: int
    ) -> KVCache:
        """An empty cache of `cache_dtype`."""
        rows = prompts * copies
        dtype = self.compute_dtype if self.cache_dtype == "compute" else self.cache_dtype
        prompt = self._cache_shape(prompts, prompt_slots)
        suffix = self._cache_shape(rows, suffix_slots)
        return KVCache(
            prompt_keys=empty_keys(prompt, dtype),
            prompt_values=CacheArray.empty(prompt, dtype),
            prompt_lengths=jnp.zeros(prompts, jnp.int32),
            keys=empty_keys(suffix, dtype),
            values=CacheArray.empty(suffix, dtype),
            lengths=jnp.zeros(rows, jnp.int32),
            table=PageTable.whole(rows),
        )

    def _cache_shape(self, rows: int, slots: int) -> tuple[int, int, int, int, int]:
        text = self.config.text
        heads, layers = text.num_key_value_heads, text.num_hidden_layers
        return layers, rows, heads, whole_tiles(slots), text.head_dim

    def _bind(self, params: Params) -> Qwen3VL:
        """The model with these weights; prepared ones hold a head even if it is tied."""
        config = self.config
        if config.tie_word_embeddings and HEAD in params:
            config = dataclasses.replace(config, tie_word_embeddings=False)
        return _blueprint(dataclasses.replace(self, config=config)).bind(params)


@functools.lru_cache(maxsize=16)
def _blueprint(policy: Qwen3VLPolicy) -> Blueprint[Qwen3VL]:
    remat = Remat(policy.remat_keeps, policy.remat_block) if policy.remat else None
    model = Qwen3VL(policy.config, policy.compute_dtype, remat, policy.lora)
    if policy.gradient_dtype == "float32" != policy.compute_dtype:
        widen_gradients(model)
    choose_kernels(model, policy.attention)
    blueprint = Blueprint(model, part_of)
    _check_targets(policy.lora, blueprint.table)
    return blueprint


def _check_targets(lora: LoraConfig, table: Table) -> None:
    adapted = {spec.hf_name.split(".")[-3] for spec in adapter_table(table).values()}
    absent = [target for target in lora.targets if target not in adapted]
    if lora.rank and absent:
        raise ValueError(
            f"model.lora.targets={','.join(lora.targets)}: this model has no {', '.join(absent)} "
            "outside its experts; leave it out"
        )
