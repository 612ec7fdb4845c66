"""Configuration of Qwen3-VL, as found in a Hugging Face `config.json`.

Only fields that change what the model computes (or its initial weights) are kept, plus the
few that other programs read from the file; see `NUMERICALLY_SILENT`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

NUMERICALLY_SILENT = {
    "max_position_embeddings": "a limit that callers may check; rotary positions have no table",
    "vision_start_token_id": "a marker for text processing; the model embeds it as any token",
    "vision_end_token_id": "a marker for text processing; the model embeds it as any token",
    "initializer_range": "changes freshly initialised weights only",
}
"""Fields that do not change the logits of given weights, and why they are kept."""

ARCHITECTURES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
"""`model_type` of a config.json -> the class of transformers that computes it."""

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")

LAYERS, WIDTH, IDS = 1000, 2**20, 2**31 - 1
MOST = {
    **dict.fromkeys(("depth", "num_hidden_layers", "decoder_sparse_step"), LAYERS),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads"), 4096),
    **dict.fromkeys(("num_experts", "num_experts_per_tok"), 4096),
    **dict.fromkeys(("in_channels", "temporal_patch_size", "spatial_merge_size"), 64),
    "patch_size": 1024,
    "head_dim": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": IDS,
}
"""The largest of each size that is believed; `WIDTH` of the others. Far above any model, and low
enough that a damaged config.json cannot ask for tables without end."""


def _from_known_fields(cls: type, raw: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    given = {k: v for k, v in raw.items() if k in names and v is not None}
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for field in dataclasses.fields(cls):
        if field.name in known:
            _check_number(field.name, str(field.type), known[field.name])
    return cls(**known)


def _check_number(name: str, kind: str, value: Any) -> None:
    """A size is a whole number within `MOST`; token and layer numbers may be 0."""
    if kind == "int":
        _check_whole(name, value, 0 if name.endswith("_id") else 1)
    elif kind == "float":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _require(number and math.isfinite(value), name, value, "give a finite number")
    elif kind == "tuple[int, ...]":
        _require(isinstance(value, tuple) and len(value) <= LAYERS, name, value, "give a list")
        for number in value:
            _check_whole(name, number, 0)


def _check_whole(name: str, value: Any, least: int) -> None:
    most = IDS if name.endswith("_id") else MOST.get(name, WIDTH)
    whole = isinstance(value, int) and not isinstance(value, bool)
    remedy = f"give a whole number from {least} to {most}; is config.json damaged?"
    _require(whole and least <= value <= most, name, value, remedy)


def _single(name: str, values: list | tuple) -> int:
    _require(len(set(values)) == 1, name, list(values), "give one number: patches are square")
    return values[0]


def _require(condition: bool, name: str, value: Any, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value!r}: {remedy}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Defaults are those of transformers' `Qwen3VLVisionConfig`."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    in_channels: int = 3
    patch_size: int = 16
    """Side of a patch in pixels."""
    temporal_patch_size: int = 2
    """Consecutive frames folded into one patch."""
    spatial_merge_size: int = 2
    """Side, in patches, of the block that becomes one vision token."""
    out_hidden_size: int = 3584
    """Width of a vision token: the language model's width."""
    num_position_embeddings: int = 2304
    """Entries of the learned position table, a square grid."""
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    """Blocks whose output is merged and added to the first language layers (DeepStack)."""
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % self.num_heads == 0,
            "vision_config.hidden_size",
            self.hidden_size,
            f"choose a multiple of num_heads ({self.num_heads})",
        )
        _require(
            self.head_dim % 4 == 0,
            "vision_config.hidden_size / num_heads",
            self.head_dim,
            "choose a head width divisible by 4 (two axes of rotated pairs)",
        )
        _require(
            self.grid_side**2 == self.num_position_embeddings,
            "vision_config.num_position_embeddings",
            self.num_position_embeddings,
            "choose a square number",
        )
        indexes = self.deepstack_visual_indexes
        _require(
            list(indexes) == sorted(set(indexes)) and all(0 <= i < self.depth for i in indexes),
            "vision_config.deepstack_visual_indexes",
            list(indexes),
            f"give increasing block numbers below depth ({self.depth})",
        )
        _require(
            self.hidden_act in ACTIVATIONS,
            "vision_config.hidden_act",
            self.hidden_act,
            f"choose one of {', '.join(ACTIVATIONS)}",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_side(self) -> int:
        """Side of the learned grid of position embeddings."""
        return int(self.num_position_embeddings**0.5)

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, ordered (channel, time, row, column)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VisionConfig:
        """Read the `vision_config` object of a config.json, any transformers version."""
        rope = raw.get("rope_parameters") or {}
        _require(
            rope.get("rope_type", "axial") in ("axial", "default"),
            "vision_config.rope_parameters.rope_type",
            rope.get("rope_type"),
            "use 'axial'",
        )
        theta = rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta))
        raw = {**raw, "rope_theta": float(theta)}
        for square in ("patch_size", "temporal_patch_size"):
            if isinstance(raw.get(square), list | tuple):
                raw[square] = _single(f"vision_config.{square}", raw[square])
        return _from_known_fields(cls, raw)

    def to_dict(self) -> dict[str, Any]:
        """The `vision_config` object of a config.json."""
        raw = dataclasses.asdict(self)
        theta = raw.pop("rope_theta")
        raw["deepstack_visual_indexes"] = list(self.deepstack_visual_indexes)
        raw["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
        return raw


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """How a `text_config` rotates: `rope_scaling`, which transformers trusts where both are there,
    or `rope_parameters`.

    Raises:
      ValueError: they contradict each other, or ask for scaled rotary embeddings (YaRN and others).
    """
    ropes = {n: dict(raw[n]) for n in ("rope_scaling", "rope_parameters") if raw.get(n)}
    for name, rope in ropes.items():
        kind = rope.get("rope_type", rope.get("type", "default"))
        _require(
            kind in ("default", "mrope"),
            f"text_config.{name}.rope_type",
            kind,
            "use 'default'; scaled rotary embeddings (YaRN and others) are not supported",
        )
    sections = [rope["mrope_section"] for rope in ropes.values() if "mrope_section" in rope]
    _require(
        all(section == sections[0] for section in sections),
        "text_config.rope_scaling.mrope_section",
        sections,
        "rope_parameters says otherwise; keep one of the two",
    )
    thetas = {float(r["rope_theta"]) for r in (raw, *ropes.values()) if r.get("rope_theta")}
    _require(len(thetas) < 2, "text_config.rope_theta", sorted(thetas), "give one value")
    return {**ropes.get("rope_parameters", {}), **ropes.get("rope_scaling", {})}


def _part(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = raw.get(name) or {}
    _require(isinstance(part, Mapping), name, part, "give an object")
    return part


def _check_not_quantised(*parts: Mapping[str, Any]) -> None:
    for part in parts:
        for name in ("quantization_config", "compression_config"):
            _require(
                not part.get(name),
                name,
                part.get(name),
                "quantised weights (AWQ, GPTQ, FP8, ...) are not read; give the folder of the "
                "original weights",
            )


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Mixture of experts in the language model. Defaults are those of transformers'
    `Qwen3VLMoeTextConfig`."""

    num_experts: int = 60
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 1408
    decoder_sparse_step: int = 1
    """Every how many layers an MLP is replaced by experts."""
    mlp_only_layers: tuple[int, ...] = ()
    """Layers that keep their MLP all the same."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.num_experts_per_tok <= self.num_experts,
            "text_config.num_experts_per_tok",
            self.num_experts_per_tok,
            f"choose between 1 and num_experts ({self.num_experts})",
        )
        _require(
            self.decoder_sparse_step >= 1,
            "text_config.decoder_sparse_step",
            self.decoder_sparse_step,
            "choose 1 or more",
        )

    def replaces(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts instead of an MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ExpertsConfig:
        """Read the `text_config` object of a config.json; transformers 5 writes
        `num_local_experts` for `num_experts`."""
        count = raw.get("num_experts", raw.get("num_local_experts", cls.num_experts))
        layers = raw.get("mlp_only_layers") or ()
        return _from_known_fields(cls, {**raw, "num_experts": count, "mlp_only_layers": layers})


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The language model. Defaults are those of transformers' `Qwen3VLTextConfig`."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    mrope_section: tuple[int, ...] = (24, 20, 20)
    """Rotated pairs that follow the temporal, height and width position."""
    attention_bias: bool = False
    max_position_embeddings: int = 128000
    initializer_range: float = 0.02
    experts: ExpertsConfig | None = None
    """None for a dense model."""

    def __post_init__(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "text_config.num_key_value_heads",
            self.num_key_value_heads,
            f"choose a divisor of num_attention_heads ({self.num_attention_heads})",
        )
        _require(self.head_dim % 2 == 0, "text_config.head_dim", self.head_dim, "make it even")
        _require(
            len(self.mrope_section) == 3,
            "text_config.rope_parameters.mrope_section",
            list(self.mrope_section),
            "give three sections: time, height, width",
        )
        _require(
            self.hidden_act in ACTIVATIONS,
            "text_config.hidden_act",
            self.hidden_act,
            f"choose one of {', '.join(ACTIVATIONS)}",
        )

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts instead of an MLP."""
        return self.experts is not None and self.experts.replaces(layer)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], experts: bool = False) -> TextConfig:
        """Read the `text_config` object of a config.json, of a model with experts or without.

        Transformers 5 keeps `rope_parameters`; 4.57 keeps `rope_scaling` beside `rope_theta`.
        """
        rope = _rope(raw)
        dropout = raw.get("attention_dropout", 0.0)
        _require(not dropout, "text_config.attention_dropout", dropout, "set it to 0")
        if experts and not raw.get("head_dim"):
            heads = raw.get("num_attention_heads", cls.num_attention_heads)
            raw = {**raw, "head_dim": raw.get("hidden_size", cls.hidden_size) // heads}
        return _from_known_fields(
            cls,
            {
                **raw,
                "rope_theta": float(rope.get("rope_theta", raw.get("rope_theta", cls.rope_theta))),
                "mrope_section": rope.get("mrope_section", cls.mrope_section),
                "num_key_value_heads": raw.get("num_key_value_heads")
                or raw.get("num_attention_heads", cls.num_attention_heads),
                "experts": ExpertsConfig.from_dict(raw) if experts else None,
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """The `text_config` object of a config.json, readable by transformers 4.57 and 5: both
        read `rope_scaling` beside `rope_theta`, and one place cannot contradict another."""
        raw = dataclasses.asdict(self)
        section = list(raw.pop("mrope_section"))
        raw["rope_scaling"] = {
            "rope_type": "default",
            "mrope_section": section,
            "mrope_interleaved": True,
        }
        experts = raw.pop("experts")
        if experts is None:
            return {"model_type": "qwen3_vl_text", **raw}
        experts["mlp_only_layers"] = list(experts["mlp_only_layers"])
        return {"model_type": "qwen3_vl_moe_text", **raw, **experts}


@dataclasses.dataclass(frozen=True)
class Qwen3VLConfig:
    """A whole model: towers, special tokens, and whether embedding and head share weights."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _require(
            self.vision.out_hidden_size == self.text.hidden_size,
            "vision_config.out_hidden_size",
            self.vision.out_hidden_size,
            f"set it to text_config.hidden_size ({self.text.hidden_size})",
        )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Qwen3VLConfig:
        """Read a whole config.json.

        Raises:
          ValueError: not a Qwen3-VL, or a field that this implementation cannot honour.
        """
        kind = raw.get("model_type")
        _require(kind in ARCHITECTURES, "model_type", kind, "give a Qwen3-VL model")
        text, vision = (_part(raw, name) for name in ("text_config", "vision_config"))
        _check_not_quantised(raw, text)
        # transformers 5 goes by this value alone, whatever the one in text_config says.
        tie = raw.get("tie_word_embeddings", False)
        shared = {k: v for k, v in raw.items() if k not in ("text_config", "vision_config")}
        return _from_known_fields(
            cls,
            {
                **shared,
                "text": TextConfig.from_dict(text, experts=kind == "qwen3_vl_moe"),
                "vision": VisionConfig.from_dict(vision),
                "tie_word_embeddings": bool(tie),
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """A config.json that transformers loads."""
        kind = "qwen3_vl" if self.text.experts is None else "qwen3_vl_moe"
        raw = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del raw["text"], raw["vision"]
        return {
            "architectures": [ARCHITECTURES[kind]],
            "model_type": kind,
            **raw,
            "text_config": self.text.to_dict(),
            # The type that 4.57 writes; 5.x reads it as its own `{kind}_vision`.
            "vision_config": {"model_type": kind, **self.vision.to_dict()},
        }
