"""Weights between a Hugging Face folder (safetensors) and the flat dict of parameters."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.qwen3_vl.config import Qwen3VLConfig
from models.qwen3_vl.model import Qwen3VLPolicy
from paravt_jax.params import Params, Table, param_shardings

INDEX = "model.safetensors.index.json"
TIED_HEAD = "lm_head.weight"
MAX_SHARD_BYTES = 5 * 2**30


def read_config(folder: str | os.PathLike) -> Qwen3VLConfig:
    """The config.json of a Hugging Face folder.

    Raises:
      ValueError: no such folder or file, or a model that is no dense Qwen3-VL.
    """
    return Qwen3VLConfig.from_dict(_read_json(_existing(folder) / "config.json"))


def load_params(
    folder: str | os.PathLike,
    table: Table,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = "float32",
) -> Params:
    """Read all parameters of `table` from the safetensors files of a folder.

    Parameters are read one at a time and go straight to their devices, so the host never
    holds the whole model.

    Raises:
      ValueError: no such folder, only pickled weights, or tensors missing, unexpected or of
        another shape (all of them in one message).
    """
    files = _tensor_files(_existing(folder))
    with_tied_head = {TIED_HEAD} if TIED_HEAD not in _hf_names(table) else set()
    _check_names(set(files), set(_hf_names(table)), with_tied_head)
    _check_shapes(files, table)
    homes = param_shardings(table, mesh)
    params = {}
    for name, spec in table.items():
        layers = [spec.from_hf(_read_tensor(files, hf)) for hf in spec.hf_names]
        value = np.stack(layers) if spec.layers else layers[0]
        params[name] = _place(value.astype(jnp.dtype(dtype)), homes[name])
    return params


def save_folder(
    params: Mapping[str, jax.Array],
    config: Qwen3VLConfig,
    folder: str | os.PathLike,
    base: str | os.PathLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that transformers loads: safetensors, config.json, and the tokenizer,
    processor and generation files of `base`.

    The folder appears whole or not at all: it is written beside its place and renamed. An
    earlier model folder there is replaced. On several hosts all must call this; the first
    writes.

    Raises:
      ValueError: `folder` holds something that is no model, or `base` does not exist.
    """
    target = Path(folder).absolute()
    base_folder = None if base is None else _existing(base)
    _check_replaceable(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writes = jax.process_index() == 0
    tensors = _hf_tensors(params, Qwen3VLPolicy(config).table)
    if not writes:
        for _ in tensors:  # every host takes part in gathering the shards
            pass
        return
    temporary.mkdir(parents=True)
    try:
        carry_files(base_folder, temporary)
        _write_config(config, params, base_folder, temporary)
        _write_shards(tensors, temporary, max_shard_bytes)
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def carry_files(base: Path | None, folder: Path) -> None:
    """Copy what is neither weights nor config.json: tokenizer, processor, generation files."""
    for path in [] if base is None else sorted(base.iterdir()):
        if path.is_file() and not _is_weights(path) and path.name != "config.json":
            shutil.copy2(path, folder / path.name)


def _is_weights(path: Path) -> bool:
    kinds = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".gguf")
    return path.suffix in kinds or path.name.endswith(".index.json")


def _existing(folder: str | os.PathLike) -> Path:
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"model folder {path} does not exist: give a Hugging Face folder with "
            "config.json and *.safetensors"
        )
    return path


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a complete Hugging Face model folder")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the folder again") from error


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)["weight_map"]
        absent = sorted({file for file in index.values() if not (folder / file).is_file()})
        if absent:
            raise ValueError(
                f"{folder / INDEX} names files that are not there: {absent}; fetch the folder again"
            )
        return {name: folder / file for name, file in index.items()}
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt"))
        found = f"only pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise ValueError(f"{folder} holds {found}: give a folder with *.safetensors")
    files = {}
    for shard in shards:
        with _open(shard) as opened:
            files.update(dict.fromkeys(opened.keys(), shard))
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch the folder again") from error


def _hf_names(table: Table) -> list[str]:
    return [name for spec in table.values() for name in spec.hf_names]


def _check_names(found: set[str], wanted: set[str], tolerated: set[str]) -> None:
    missing, unexpected = sorted(wanted - found), sorted(found - wanted - tolerated)
    if missing or unexpected:
        raise ValueError(
            f"weights do not match config.json: missing {missing}, unexpected "
            f"{unexpected}; use the config.json that belongs to these weights"
        )


def _check_shapes(files: dict[str, Path], table: Table) -> None:
    wrong = []
    for spec in table.values():
        for name in spec.hf_names:
            with _open(files[name]) as opened:
                shape = tuple(opened.get_slice(name).get_shape())
            if shape not in spec.hf_shapes:
                wrong.append(f"{name} is {shape}, config.json says {spec.hf_shapes[0]}")
    if wrong:
        raise ValueError("; ".join(wrong) + ": use the config.json that belongs to these weights")


def _read_tensor(files: dict[str, Path], name: str) -> np.ndarray:
    with _open(files[name]) as opened:
        return opened.get_tensor(name)


def _place(value: np.ndarray, home: jax.sharding.Sharding) -> jax.Array:
    """Each host puts only the shards of its own devices."""
    return jax.make_array_from_callback(value.shape, home, lambda index: value[index])


def _hf_tensors(params: Mapping[str, jax.Array], table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors under their Hugging Face names, one parameter in memory at a time."""
    for name, spec in table.items():
        value = _to_host(params[name])
        layers = value if spec.layers else [value]
        for hf_name, layer in zip(spec.hf_names, layers, strict=True):
            yield hf_name, np.ascontiguousarray(spec.to_hf(layer))


def _to_host(value: jax.Array) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def _write_shards(tensors: Iterator[tuple[str, np.ndarray]], folder: Path, max_bytes: int) -> None:
    """One file, or numbered files with an index when the weights exceed `max_bytes`."""
    shards: list[list[str]] = []
    batch: dict[str, np.ndarray] = {}
    total = 0
    for name, tensor in tensors:
        if batch and sum(t.nbytes for t in batch.values()) + tensor.nbytes > max_bytes:
            shards.append(_write_shard(batch, folder, len(shards)))
            batch = {}
        batch[name] = tensor
        total += tensor.nbytes
    shards.append(_write_shard(batch, folder, len(shards)))
    if len(shards) == 1:
        (folder / _part(0)).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _part(number)).rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def _part(number: int) -> str:
    return f"part-{number}.safetensors"


def _write_shard(batch: dict[str, np.ndarray], folder: Path, number: int) -> list[str]:
    # transformers refuses a safetensors file whose metadata do not name a format.
    save_file(batch, folder / _part(number), metadata={"format": "pt"})
    # safetensors makes files that only their owner can read.
    (folder / _part(number)).chmod(0o644)
    return list(batch)


def _write_config(
    config: Qwen3VLConfig, params: Mapping[str, jax.Array], base: Path | None, folder: Path
) -> None:
    """Our fields over those of the base's config.json, whose other fields are kept."""
    raw: dict[str, Any] = config.to_dict()
    raw["dtype"] = str(next(iter(params.values())).dtype)
    if base is not None and (base / "config.json").is_file():
        old = _read_json(base / "config.json")
        towers = {
            tower: {**(old.get(tower) or {}), **raw[tower]}
            for tower in ("text_config", "vision_config")
        }
        raw = {**old, **raw, **towers}
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what `save_folder` could not have written."""
    if not target.exists():
        return
    entries = list(target.iterdir()) if target.is_dir() else [target]
    names = {entry.name for entry in entries if entry.is_file()}
    model = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    if entries and not (model and len(names) == len(entries)):
        raise ValueError(
            f"{target} exists and is no plain model folder: give a new folder, or empty this one"
        )


def _replace(temporary: Path, target: Path) -> None:
    old = target.with_name(temporary.name + ".old")
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
