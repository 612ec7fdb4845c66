"""LoRA adapters on disk as peft keeps them: adapter_config.json, adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save_file

from models.common.folder import ADAPTER_CONFIG as CONFIG
from models.common.folder import whole_folder
from models.common.safetensors_io import read_json
from models.common.weights import load_params, to_host
from paravt_jax.lora import NO_LORA, TARGETS, LoraConfig, Target, adapter_table
from paravt_jax.params import Params, Table

ADAPTER = "adapter"
"""Name of the folder with an adapter in a run's folder, and of the one in a checkpoint's `model/`
that says which adapters the checkpoint holds."""
WEIGHTS = "adapter_model.safetensors"
PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "inference_mode": True,
}
"""What peft calls adapters such as ours."""
VARIANTS = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)
"""Settings of peft that change what an adapter computes, in ways that are not ours."""


def save_adapter(
    params: Mapping[str, Array],
    table: Table,
    lora: LoraConfig,
    folder: str | os.PathLike,
    base: str | os.PathLike | None = None,
) -> None:
    """Write the adapters among `params` as a folder that `peft.PeftModel.from_pretrained` loads.

    The folder appears whole or not at all; an earlier adapter there is replaced. On several hosts
    all must call this; the first writes.

    Args:
      base: the model that the adapters belong to, for peft to name.

    Raises:
      ValueError: `folder` holds something that is no adapter.
      OSError: the disk is full.
    """
    target = Path(folder).absolute()
    _check_replaceable(target)
    tensors = {
        hf_name: np.ascontiguousarray(spec.to_hf(layer))
        for name, spec in adapter_table(table).items()
        for hf_name, layer in zip(spec.hf_names, to_host(params[name]), strict=True)
    }
    if jax.process_index() > 0:
        return
    with whole_folder(target) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / WEIGHTS).chmod(0o644)  # safetensors lets only their owner read its files
        write_adapter_config(lora, table, temporary, base)


def load_adapter(
    folder: str | os.PathLike,
    table: Table,
    lora: LoraConfig,
    mesh: jax.sharding.Mesh | None = None,
) -> Params:
    """The adapters of a peft folder as parameters, in float32.

    Raises:
      ValueError: no such folder, a kind of adapter that is not ours, or one with other sizes,
        targets or layers than `lora` and `table` say.
    """
    check_adapter_config(folder, lora, table)
    try:
        return load_params(folder, adapter_table(table), mesh)
    except ValueError as error:
        raise ValueError(f"{folder} holds no adapter of this language model: {error}") from error


def write_adapter_config(
    lora: LoraConfig,
    table: Table,
    folder: str | os.PathLike,
    base: str | os.PathLike | None = None,
) -> None:
    """Write `adapter_config.json`. Its pattern of targets is for whole names, because modules of
    the vision tower may end in the same words."""
    layers = sorted({re.escape(name.partition("{}")[0]) for name in _projections(table)})
    modules = rf"({'|'.join(layers)})\d+\.\w+\.({'|'.join(lora.targets)})"
    fields = {
        **PLAIN,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": modules,
        "base_model_name_or_path": None if base is None else str(base),
    }
    Path(folder).mkdir(exist_ok=True)
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    (Path(folder) / CONFIG).write_text(text, encoding="utf-8")


def read_adapter_config(folder: str | os.PathLike, table: Table) -> LoraConfig:
    """The adapter that a peft folder describes, of the model whose parameter table this is.

    Raises:
      ValueError: no such file, or a kind of adapter that is not ours.
    """
    path = Path(folder) / CONFIG
    raw = read_json(path)
    foreign = [name for name in VARIANTS if raw.get(name)]
    foreign += [name for name in ("peft_type", "bias") if raw.get(name, PLAIN[name]) != PLAIN[name]]
    foreign += [name for name in ("r", "lora_alpha") if not isinstance(raw.get(name), int)]
    if foreign:
        values = ", ".join(f"{name}={raw.get(name)!r}" for name in foreign)
        raise ValueError(f"{path} has {values}: give a plain LoRA adapter, or merge it with peft")
    modules = raw.get("target_modules")
    adapted = {_last(module) for module in _projections(table) if _is_target(modules, module)}
    targets: tuple[Target, ...] = tuple(name for name in TARGETS if name in adapted)
    return LoraConfig(rank=raw["r"], alpha=raw["lora_alpha"], targets=targets)


def check_adapter_config(folder: str | os.PathLike, lora: LoraConfig, table: Table) -> None:
    """Refuse a peft folder whose adapter is not the one that `lora` describes.

    Raises:
      ValueError: naming a setting that differs, or as `read_adapter_config`.
    """
    stored = read_adapter_config(folder, table)
    for name in ("rank", "alpha", "targets"):
        theirs, ours = getattr(stored, name), getattr(lora, name)
        # The order of targets means nothing.
        if (sorted(theirs) != sorted(ours)) if name == "targets" else (theirs != ours):
            raise ValueError(f"model.lora.{name}={ours}, but {folder} has {theirs}: set that")


def checkpoint_lora(model_files: str | os.PathLike | None, table: Table) -> LoraConfig:
    """Which adapters the checkpoints hold that belong to a `model/` folder
    (`paravt_jax.checkpoint.find_model_files`) of the model whose parameter table this is.

    Raises:
      ValueError: the folder's adapter configuration is none of ours.
    """
    if model_files is None or not (Path(model_files) / ADAPTER).is_dir():
        return NO_LORA
    return read_adapter_config(Path(model_files) / ADAPTER, table)


def _projections(table: Table) -> list[str]:
    """Modules of decoder layers that an adapter may stand beside, `{}` for the layer's number."""
    layered = [spec.hf_name.removesuffix(".weight") for spec in table.values() if spec.is_stacked]
    # Experts are no modules of their own to peft, and have other names.
    return [module for module in layered if _last(module) in TARGETS]


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _is_target(modules: Any, module: str) -> bool:
    """Whether peft would adapt this projection in the first layer: a text is a pattern for the
    whole module name, a list holds ends of names."""
    module = module.format(0)
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in modules or ())


def _check_replaceable(target: Path) -> None:
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if names - {CONFIG, WEIGHTS, "README.md"} or target.is_file():
        raise ValueError(f"{target} holds more than an adapter: give a new folder")
