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
from jax.experimental import multihost_utils
from jaxtyping import Array
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from paravt_jax.lora import NO_LORA, TARGETS, LoraConfig, adapter_table
from paravt_jax.params import Params, ParamSpec, Table, param_shardings

ADAPTER = "adapter"
"""Name of the folder with an adapter in a run's folder, and of the one in a checkpoint's `model/`
that says which adapters the checkpoint holds."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYERS = r"model\.language_model\.layers\.\d+\."
PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
}
VARIANTS = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
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

    Each of the two files appears whole or not at all, the configuration last. On several hosts
    all must call this; the first writes.

    Args:
      base: the model that the adapters belong to, for peft to name.
    """
    tensors = {
        name: np.ascontiguousarray(tensor)
        for key, spec in adapter_table(table).items()
        for name, tensor in zip(spec.hf_names, _to_hf(spec, params[key]), strict=True)
    }
    if jax.process_index() > 0:
        return
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    temporary = target / f".{WEIGHTS}.{os.getpid()}.tmp"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        temporary.replace(target / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    write_adapter_config(lora, target, base)


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
    check_adapter_config(folder, lora)
    tensors = _read_tensors(Path(folder) / WEIGHTS)
    specs = adapter_table(table)
    _check_tensors(tensors, specs, Path(folder))
    homes = param_shardings(specs, mesh)
    return {name: _place(spec, tensors, homes[name]) for name, spec in specs.items()}


def write_adapter_config(
    lora: LoraConfig, folder: str | os.PathLike, base: str | os.PathLike | None = None
) -> None:
    """Write `adapter_config.json`, made so that modules of the vision tower are no targets."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    fields = {
        **PLAIN,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": LAYERS + rf"(self_attn|mlp)\.({'|'.join(lora.targets)})",
        "base_model_name_or_path": None if base is None else str(base),
    }
    temporary = target / f".{CONFIG}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(target / CONFIG)


def read_adapter_config(folder: str | os.PathLike) -> LoraConfig:
    """The adapter that a peft folder describes.

    Raises:
      ValueError: no such file, or a kind of adapter that is not ours.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a folder that peft wrote")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the folder again") from error
    _check_plain(raw, path)
    targets = tuple(name for name in TARGETS if _is_target(raw.get("target_modules"), name))
    return LoraConfig(rank=raw["r"], alpha=raw["lora_alpha"], targets=targets)


def check_adapter_config(folder: str | os.PathLike, lora: LoraConfig) -> None:
    """Refuse a peft folder whose adapter is not the one that `lora` describes.

    Raises:
      ValueError: naming a setting that differs, or as `read_adapter_config`.
    """
    found = read_adapter_config(folder)
    for name in ("rank", "alpha", "targets"):
        theirs, ours = getattr(found, name), getattr(lora, name)
        # The order of targets means nothing.
        if (sorted(theirs) != sorted(ours)) if name == "targets" else (theirs != ours):
            raise ValueError(f"model.lora.{name}={ours}, but {folder} has {theirs}: set that")


def checkpoint_lora(model_files: str | os.PathLike | None) -> LoraConfig:
    """Which adapters the checkpoints hold that belong to a `model/` folder; see
    `paravt_jax.checkpoint.find_model_files`.

    Raises:
      ValueError: the folder's adapter configuration is none of ours.
    """
    if model_files is None or not (Path(model_files) / ADAPTER).is_dir():
        return NO_LORA
    return read_adapter_config(Path(model_files) / ADAPTER)


def _check_plain(raw: Mapping[str, Any], path: Path) -> None:
    foreign = [name for name in VARIANTS if raw.get(name)]
    foreign += [name for name in ("peft_type", "bias") if raw.get(name, PLAIN[name]) != PLAIN[name]]
    missing = [name for name in ("r", "lora_alpha") if not isinstance(raw.get(name), int)]
    if foreign or missing:
        values = ", ".join(f"{name}={raw.get(name)!r}" for name in foreign + missing)
        raise ValueError(f"{path} has {values}: give a plain LoRA adapter, or merge it with peft")


def _is_target(modules: str | list[str] | None, name: str) -> bool:
    """Whether peft would adapt this projection of a decoder layer: a text is a pattern for the
    whole module name, a list holds ends of names."""
    block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    module = f"model.language_model.layers.0.{block}.{name}"
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == end or module.endswith(f".{end}") for end in modules or ())


def _to_hf(spec: ParamSpec, value: Array) -> list[np.ndarray]:
    if not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return [spec.to_hf(layer) for layer in np.asarray(value)]


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: pickled adapters are not read; save as safetensors"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch the folder again") from error


def _check_tensors(tensors: Mapping[str, np.ndarray], specs: Table, folder: Path) -> None:
    shapes = {name: spec.hf_shapes[0] for spec in specs.values() for name in spec.hf_names}
    missing, unexpected = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    wrong = [n for n in shapes if n in tensors and tensors[n].shape != shapes[n]]
    if missing or unexpected or wrong:
        raise ValueError(
            f"{folder} belongs to another model: missing {missing}, unexpected {unexpected}, of "
            f"another shape {wrong}; give an adapter of this model's language layers"
        )


def _place(
    spec: ParamSpec, tensors: Mapping[str, np.ndarray], home: jax.sharding.Sharding
) -> jax.Array:
    value = np.stack([spec.from_hf(tensors[name]) for name in spec.hf_names]).astype(np.float32)
    return jax.make_array_from_callback(value.shape, home, lambda index: value[index])
