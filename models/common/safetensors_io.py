"""Tensors of a Hugging Face folder: read in parts from its safetensors files, written as a stream.

A safetensors file is eight bytes with the length of the header, the header (JSON with type, shape
and place of each tensor) and the values (https://github.com/huggingface/safetensors, "Format").
The library reads parts of tensors but writes whole files from memory only, hence the writer here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from paravt_jax.params import Box

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Name in a safetensors file -> type. Others (integers, 8-bit floats) are quantised weights, which
need scales to be understood."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; indexing it reads a part."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As the file calls it; see `DTYPES`."""

    def __getitem__(self, box: Box) -> np.ndarray:
        """The values of a box. The file is mapped into memory for this long only, so that the
        pages do not add up to the size of the model.

        Raises:
          ValueError: the file is damaged.
        """
        try:
            with safe_open(self.path, framework="np") as opened:
                return opened.get_slice(self.name)[box]
        except SafetensorError as error:
            raise _damaged(self.path, error) from error


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder: of `model.safetensors`, else of the files of the index, else of all
    `*.safetensors`. Their values are not read.

    Raises:
      ValueError: no safetensors, a file that is damaged or missing, or an index that lies.
    """
    single = folder / WEIGHTS
    promised = {} if single.is_file() else _read_index(folder)
    if single.is_file():
        files = [single]
    elif promised:
        files = sorted({folder / file for file in promised.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds {_other_weights(folder)}: give a folder with safetensors")
    tensors = {tensor.name: tensor for path in files for tensor in _read_header(path)}
    lacking = [f"{name} ({file})" for name, file in promised.items() if name not in tensors]
    if lacking:
        raise ValueError(
            f"{folder / INDEX} names tensors that their files lack: {shorten(lacking)}; fetch "
            "the folder again"
        )
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; empty without an index."""
    path = folder / INDEX
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map: fetch the folder again")
    files = set(weight_map.values())
    foreign = sorted(f for f in files if Path(f).name != f or not f.endswith(".safetensors"))
    if foreign:
        raise ValueError(f"{path} names {shorten(foreign)}: only safetensors beside it are read")
    absent = sorted(file for file in files if not (folder / file).is_file())
    if absent:
        raise ValueError(
            f"{path} names files that are not there: {shorten(absent)}; fetch the folder again"
        )
    return weight_map


def _other_weights(folder: Path) -> str:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    return f"only pickled weights ({shorten(pickled)})" if pickled else "no weights"


def _read_header(path: Path) -> list[StoredTensor]:
    try:
        with safe_open(path, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return [
                StoredTensor(name, path, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            ]
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({error}): fetch it again")


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of a model folder.

    Raises:
      ValueError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a complete Hugging Face model folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch the folder again") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds no JSON object: fetch the folder again")
    return raw


def shorten(names: list[str], most: int = 8) -> str:
    """Names for a message of one line."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


Rows = tuple[str, int, np.ndarray]
"""A part of a tensor: its name, the first row, and rows in the order of the file."""


def write_tensors(
    folder: Path, tensors: Iterable[TensorSpec], rows: Iterable[Rows], max_shard_bytes: int
) -> None:
    """Write `model.safetensors`, or numbered files with an index where the tensors exceed
    `max_shard_bytes`; memory holds one part at a time.

    Args:
      rows: all rows of all tensors, in any order.

    Raises:
      OSError: the disk is full.
    """
    shards = _split(tensors, max_shard_bytes)
    offsets: dict[str, tuple[Path, int]] = {}
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path = folder / (WEIGHTS if len(shards) == 1 else name)
        offsets.update(_write_header(path, shard))
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), path.name))
    for name, first, part in rows:
        path, offset = offsets[name]
        row_bytes = part.nbytes // len(part)
        with path.open("r+b") as file:
            file.seek(offset + first * row_bytes)
            file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(tensors: Iterable[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Runs of tensors within `max_bytes`; a larger tensor stands alone."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_header(path: Path, shard: list[TensorSpec]) -> dict[str, tuple[Path, int]]:
    """Begin a file; where in it each tensor belongs."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    # transformers refuses a file whose metadata do not name a format.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, size = {}, 0
    # Wide types first, so that all are aligned.
    for tensor in sorted(shard, key=lambda tensor: -tensor.dtype.itemsize):
        starts[tensor.name] = size
        span = [size, size + tensor.nbytes]
        kind = names[tensor.dtype]
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": span}
        size += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return {name: (path, 8 + len(text) + start) for name, start in starts.items()}
