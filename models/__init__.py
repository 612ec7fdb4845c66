"""Networks and their weights: what all share in `common`, and a package for each model family.

A family is named in `FAMILIES` by the `model_type` of its config.json files, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from typing import Any

from models.common.folder import CONFIG, existing_folder, naming
from models.common.policy import ModelPolicy
from models.common.safetensors_io import read_json

__all__ = ["FAMILIES", "Family", "ModelPolicy", "find_family", "open_policy"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models: the package that computes it, and the class that makes its prompts."""

    package: str
    """Offers `open_policy`, which takes the content of config.json and the settings of the one
    below. The policy's table says of each parameter to which part of the model it belongs, and what
    Hugging Face calls it; from that follow what trains, what rollouts cast, how adapters and tied
    heads lie on disk, and what programs cost."""
    renderer: str
    """The class that makes its prompts, `pipelines.render.ChatRenderer` or one derived from it, as
    `module:name`: models know nothing of text."""


QWEN3_VL = Family("models.qwen3_vl", "pipelines.render:ChatRenderer")
FAMILIES = {"qwen3_vl": QWEN3_VL, "qwen3_vl_moe": QWEN3_VL}
"""`model_type` -> its family."""


def find_family(source: str | os.PathLike | Mapping[str, Any]) -> Family:
    """The family of a Hugging Face folder, or of the content of its config.json.

    Raises:
      ValueError: no such folder, or a model of a type that is not in `FAMILIES`.
    """
    if not isinstance(source, Mapping):
        path = existing_folder(source) / CONFIG
        with naming(path):
            return find_family(read_json(path))
    kind = source.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type={kind!r} in config.json is no model that can be computed here; give one "
            f"of {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def open_policy(source: str | os.PathLike | Mapping[str, Any], **settings: Any) -> ModelPolicy:
    """The policy of a Hugging Face folder, without its weights (`models.common.weights`).

    Args:
      source: the folder, or the content of its config.json.
      settings: `compute_dtype` of matrix products, "float32" or "bfloat16"; `remat`, whether the
        backward pass computes each layer's activations again, to save memory; `lora`, adapters
        beside the language model's matrices; `cache_dtype` of the KV cache, "compute" (the type of
        products) or "int8"; `gradient_dtype` of gradients of weights, "compute" or "float32";
        `remat_keeps`, what is not computed again: "nothing", "projections" or "products";
        `remat_block`, layers that keep one input together; `attention`, what computes it, one of
        `models.common.kernels.Kernels`.

    Raises:
      ValueError: no such folder, a model of another type, or one that its family refuses.
    """
    if not isinstance(source, Mapping):
        path = existing_folder(source) / CONFIG
        config = read_json(path)
        with naming(path):
            return open_policy(config, **settings)
    package = importlib.import_module(find_family(source).package)
    return package.open_policy(source, **settings)
