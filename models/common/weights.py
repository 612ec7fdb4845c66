"""Weights between a Hugging Face folder (safetensors) and the flat dict of parameters.

Both ways they pass in parts (one layer, or some rows of a large one), cast one by one: memory
does not grow with the model.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from models.common.folder import (
    carry_files,
    check_replaceable,
    existing_folder,
    whole_folder,
)
from models.common.safetensors_io import (
    DTYPES,
    Rows,
    StoredTensor,
    TensorSpec,
    shorten,
    stored_tensors,
    write_tensors,
)
from paravt_jax.array_store import StoredArray, boxes
from paravt_jax.params import Box, Params, ParamSpec, Table, only_of, param_shardings
from paravt_jax.pytrees import ArrayLike

HEAD = "lm_head.weight"
"""What transformers calls the head of every language model. A tied one is no parameter of ours."""
MAX_SHARD_BYTES = 5 * 2**30
QUANTISED = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB")
"""Ends of the names of tensors that AWQ, GPTQ, compressed-tensors, FP8 and bitsandbytes add."""
COMPARED_ROWS = 4096
"""Rows of the vocabulary that are compared at once."""


class FolderWeights:
    """The parameters of a table as a Hugging Face folder holds them, read in parts."""

    def __init__(self, folder: str | os.PathLike, table: Table):
        """Looks at names, shapes and types only.

        Raises:
          ValueError: no such folder, no safetensors, a damaged file, or tensors missing,
            unexpected, of another shape or of a quantised type (all of them in one message).
        """
        path = existing_folder(folder)
        self._table, self._tensors = table, stored_tensors(path)
        _check_head(self._tensors, table, path)
        _check_tensors(self._tensors, table, path)

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The type of each parameter on disk; of types that differ by layer, one that holds all."""
        return {name: _wide_enough(self._types(spec)) for name, spec in self._table.items()}

    def _types(self, spec: ParamSpec) -> set[np.dtype]:
        return {DTYPES[self._tensors[name].dtype] for name in spec.hf_names}

    def read(self, name: str, box: Box, dtype: Any) -> np.ndarray:
        """A part of a parameter, in the given type.

        Raises:
          ValueError: a file is damaged, or holds values that are no finite numbers.
        """
        spec = self._table[name]
        value = np.empty([part.stop - part.start for part in box], dtype)
        layers, names, inner = [value], spec.hf_names, box
        if spec.layers:
            layers, names, inner = list(value), spec.hf_names[box[0]], box[1:]
        for layer, hf_name in zip(layers, names, strict=True):
            tensor = self._tensors[hf_name]
            layer[...] = spec.box_from_hf(tensor, tensor.shape, inner)
            _check_finite(layer, tensor)
        return value


def _check_finite(values: np.ndarray, tensor: StoredTensor) -> None:
    """One such value makes every loss NaN, many steps from its cause."""
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"{tensor.path}: tensor {tensor.name} holds {finite.size - int(finite.sum())} values "
            f"that are NaN or infinite as {values.dtype}: fetch it again, or repair it"
        )


def _wide_enough(types: set[np.dtype]) -> np.dtype:
    """A type that holds all of these."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*types)


def _check_head(tensors: dict[str, StoredTensor], table: Table, folder: Path) -> None:
    """A model with a tied head may have one on disk, if it is the embedding once more.

    transformers trusts such a head over config.json where they differ; we ask which is meant.
    """
    if HEAD not in tensors or any(HEAD in spec.hf_names for spec in table.values()):
        return
    embedded, head = only_of(table, "embedding"), tensors.pop(HEAD)
    embedding = None if embedded is None else tensors.get(embedded.hf_name)
    if embedding is not None and not _equal(head, embedding):
        raise ValueError(
            f"tie_word_embeddings is true in {folder / 'config.json'}, but {HEAD} differs from "
            "the embedding: set it to false to use the head that is there"
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    parts = boxes(one.shape, (COMPARED_ROWS, *one.shape[1:]))
    return all(one[part].tobytes() == other[part].tobytes() for part in parts)


def _check_tensors(tensors: dict[str, StoredTensor], table: Table, folder: Path) -> None:
    quantised = sorted(name for name in tensors if name.endswith(QUANTISED))
    if quantised:
        raise ValueError(
            f"{folder} holds quantised weights [{shorten(quantised)}], which are not read; give "
            "the folder of the original weights"
        )
    specs = {hf_name: spec for spec in table.values() for hf_name in spec.hf_names}
    both = [name for name in specs if name in tensors]
    shapes = [
        f"{name} {tensors[name].shape} instead of {specs[name].hf_shapes[0]}"
        for name in both
        if tensors[name].shape not in specs[name].hf_shapes
    ]
    kinds = [f"{name} {tensors[name].dtype}" for name in both if tensors[name].dtype not in DTYPES]
    faults = {
        "missing": sorted(set(specs) - set(tensors)),
        "unexpected": sorted(set(tensors) - set(specs)),
        "of another shape": shapes,
        f"of a type other than {', '.join(DTYPES)}": kinds,
    }
    found = [f"{fault} [{shorten(names)}]" for fault, names in faults.items() if names]
    if found:
        raise ValueError(
            f"weights in {folder} do not match its config.json: {'; '.join(found)}; use the "
            "config.json that belongs to these weights"
        )


def load_params(
    folder: str | os.PathLike,
    table: Table,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = "float32",
) -> Params:
    """Read all parameters of `table` from the safetensors files of a folder.

    Each shard of each parameter is read, layer by layer, in its final type and put on its
    devices before the next one, so the host holds one shard of one parameter.

    Raises:
      ValueError: as `FolderWeights`.
    """
    weights, homes = FolderWeights(folder, table), param_shardings(table, mesh)
    return {
        name: _place(weights, name, spec.shape, homes[name], jnp.dtype(dtype))
        for name, spec in table.items()
    }


def _place(
    weights: FolderWeights,
    name: str,
    shape: tuple[int, ...],
    home: jax.sharding.Sharding,
    dtype: Any,
) -> jax.Array:
    """One parameter; what several devices hold alike is read once."""
    devices = collections.defaultdict(list)
    for device, index in home.addressable_devices_indices_map(shape).items():
        devices[_bounds(index, shape)].append(device)
    shards = []
    for bounds, holders in devices.items():
        value = weights.read(name, tuple(slice(*bound) for bound in bounds), dtype)
        shards += [jax.device_put(value, device) for device in holders]
    return jax.make_array_from_single_device_arrays(shape, home, shards)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def save_weights(
    params: Mapping[str, jax.Array | StoredArray],
    table: Table,
    folder: str | os.PathLike,
    base: str | os.PathLike | None,
    max_shard_bytes: int,
    describe: Callable[[str, Path | None, Path], None],
) -> None:
    """Write a model folder: safetensors, and the tokenizer, processor and generation files of
    `base`.

    The folder appears whole or not at all: it is written beside its place and renamed. An
    earlier model folder there is replaced. On several hosts all must call this; the first
    writes.

    Args:
      describe: writes config.json, given the usual type of the weights, the base and the folder.

    Raises:
      ValueError: `folder` holds something that is no model, or `base` does not exist.
      OSError: the disk is full.
    """
    target = Path(folder).absolute()
    base_folder = None if base is None else existing_folder(base)
    check_replaceable(target)
    dtypes = {name: np.dtype(params[name].dtype) for name in table}
    rows = _rows(params, table)
    if jax.process_index() > 0:
        collections.deque(rows, maxlen=0)  # every host takes part in gathering the shards
        return
    with whole_folder(target) as temporary:
        carry_files(base_folder, temporary)
        usual = collections.Counter(dtypes.values()).most_common(1)[0][0]
        describe(str(usual), base_folder, temporary)
        write_tensors(temporary, _tensor_specs(table, dtypes), rows, max_shard_bytes)


def _tensor_specs(table: Table, dtypes: Mapping[str, np.dtype]) -> Iterator[TensorSpec]:
    for name, spec in table.items():
        for hf_name in spec.hf_names:
            yield TensorSpec(hf_name, spec.hf_shapes[0], dtypes[name])


def _rows(params: Mapping[str, jax.Array | StoredArray], table: Table) -> Iterator[Rows]:
    """All parameters in the layout of the file, part by part."""
    for name, spec in table.items():
        value = params[name]
        for box in boxes(spec.shape, _part_shape(value, spec)):
            part = _to_host(value, box)
            first = 0 if spec.row_axis is None else box[spec.row_axis].start
            names = spec.hf_names[box[0]] if spec.layers else spec.hf_names
            for hf_name, layer in zip(names, part if spec.layers else [part], strict=True):
                yield hf_name, first, spec.rows_to_hf(layer)


def _part_shape(value: jax.Array | StoredArray, spec: ParamSpec) -> tuple[int, ...]:
    """What is taken at once: one layer from devices, the chunks that make up rows from disk."""
    if not isinstance(value, StoredArray):
        return (1, *spec.layer_shape) if spec.layers else spec.shape
    sizes = zip(spec.shape, value.chunk, strict=True)
    return tuple(c if axis in spec.part_axes else n for axis, (n, c) in enumerate(sizes))


def _to_host(value: jax.Array | StoredArray, box: Box) -> np.ndarray:
    if isinstance(value, StoredArray):
        return value[box]
    if box[0].stop - box[0].start < value.shape[0]:
        # A traced index: all layers of a parameter share one compiled slice.
        value = jax.lax.dynamic_index_in_dim(value, np.int32(box[0].start))
    return to_host(value)


def to_host(value: ArrayLike) -> np.ndarray:
    """A whole array. Of one that is split over several hosts, all of them must ask."""
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)
