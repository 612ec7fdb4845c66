"""Weights on disk as Orbax keeps them: the flat dict of parameters, one item of a checkpoint.

A checkpoint folder (`WORKDIR/checkpoints/<step>`, or what `models/convert.py from-hf` writes)
holds the item `params`. `model/`, beside it or in the run's folder, holds config.json and the
tokenizer and processor files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array

from paravt_jax.array_store import StoredArray, boxes
from paravt_jax.checksum import is_intact, part_checksum
from paravt_jax.event_loops import close_in_order
from paravt_jax.params import ParamSpec, Table

ITEM = "params"
"""Name of the item that holds the weights."""
META, CHECKSUMS = "meta", "arrays"
"""Name of the item that says what the checkpoint is, and the key of its arrays' checksums."""
META_FILE = "metadata"
"""What Orbax calls the JSON of an item."""
MODEL_FILES = "model"
"""Folder with config.json, tokenizer and processor files."""
CHUNK_BYTES = 32 * 2**20
"""Most that is stored, and so read, as one."""


def save_params(path: str | os.PathLike, params: Mapping[str, Array | np.ndarray]) -> None:
    """Write weights as the item `params` of the checkpoint folder `path`.

    Raises:
      ValueError: the folder already holds weights.
      OSError: the disk is full.
    """
    item = Path(path).absolute() / ITEM
    if item.exists():
        raise ValueError(f"{item} already exists: choose another folder")
    try:
        with _open(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(item, args=ocp.args.StandardSave(dict(params)))
    except ValueError as error:  # what TensorStore makes of a full disk
        raise OSError(f"{item} could not be written: {error}") from error


def save_args(table: Table) -> dict[str, ocp.SaveArgs]:
    """What Orbax needs to know to lay out weights so that they can be read in parts: chunks hold
    one layer, and one expert, at most."""

    def chunked(spec: ParamSpec) -> ocp.SaveArgs:
        cut = tuple(i for i, axis in enumerate(spec.axes) if axis in ("layers", "expert"))
        return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=cut)

    return {name: chunked(spec) for name, spec in table.items()}


def open_params(path: str | os.PathLike, table: Table) -> dict[str, StoredArray]:
    """The weights of a checkpoint folder, to be read box by box.

    Raises:
      ValueError: no weights there, or other parameters than `table` lists.
    """
    item = _existing_item(path)
    with _open(ocp.StandardCheckpointHandler()) as checkpointer:
        stored = _listed(checkpointer, item)
    _check_same(item, stored, table)
    return {name: StoredArray.open(item, name) for name in table}


def verify_params(path: str | os.PathLike, params: Mapping[str, StoredArray]) -> bool:
    """Compare weights with the checksums that were written beside them, box by box.

    Returns:
      Whether there are any: what `models/convert.py` and earlier versions wrote has none.

    Raises:
      ValueError: an array is not what it was, or its checksum.
    """
    expected = _read_checksums(Path(path).absolute())
    if expected is None:
        return False
    damaged = [name for name, stored in params.items() if _checksum(stored) != expected.get(name)]
    if damaged:
        raise ValueError(
            f"{path} is damaged: {len(damaged)} of {len(params)} arrays of weights have changed "
            f"since they were written, the first is {damaged[0]}; give an older checkpoint, or a "
            "copy of this one"
        )
    return True


def _checksum(stored: StoredArray) -> int:
    parts = (
        part_checksum(stored[box], tuple(side.start for side in box), stored.shape)
        for box in boxes(stored.shape, stored.chunk)
    )
    return sum(parts) % 2**32


def read_meta(step: Path | epath.Path) -> dict[str, Any] | None:
    """What the checkpoint in a folder says of itself; None if it says nothing. A host may ask
    alone: Orbax's own reader is for all of them together.

    Raises:
      ValueError: it is not what was written.
    """
    if not (step / META).is_dir():
        return None
    try:
        meta = json.loads((step / META / META_FILE).read_text())
        intact = is_intact(meta)
    except Exception as error:  # whatever a damaged file brings about
        raise ValueError(f"{step / META} is damaged: {error}; give another checkpoint") from error
    if CHECKSUMS in meta and not intact:
        raise ValueError(f"{step / META} has changed since it was written; give another checkpoint")
    return meta


def _read_checksums(step: Path) -> dict[str, int] | None:
    """The checksum of each array of weights, by its name."""
    meta = read_meta(step)
    if meta is None or CHECKSUMS not in meta:
        return None
    prefix = f"[{ITEM!r}]"
    keys = (key for key in meta[CHECKSUMS] if key.startswith(prefix))
    return {key[len(prefix) + 2 : -2]: meta[CHECKSUMS][key] for key in keys}


def create_params(
    path: str | os.PathLike, table: Table, dtypes: Mapping[str, np.dtype]
) -> dict[str, StoredArray]:
    """Lay out the item `params` in the checkpoint folder `path`, to be written box by box.

    Orbax saves whole arrays only. So it saves empty ones, and then each is laid out again at its
    real size in the same database; once all is written, it is a checkpoint like any other.

    Raises:
      ValueError: the folder already holds weights.
      OSError: the disk is full.
    """
    save_params(path, {name: np.zeros(1, dtypes[name]) for name in table})
    item = Path(path).absolute() / ITEM
    return {
        name: StoredArray.open(item, name).resized(spec.shape, _chunk(spec, dtypes[name].itemsize))
        for name, spec in table.items()
    }


def _chunk(spec: ParamSpec, itemsize: int) -> tuple[int, ...]:
    """The largest chunk within `CHUNK_BYTES`: several layers, one, or some rows of one."""
    chunk = list(spec.shape)
    for axis in spec.part_axes:
        one = math.prod(chunk) // chunk[axis] * itemsize
        chunk[axis] = min(chunk[axis], max(1, CHUNK_BYTES // one))
    return tuple(chunk)


def find_step(path: str | os.PathLike) -> Path:
    """The checkpoint folder meant by a run's folder (its latest step), by that run's
    `checkpoints` folder, or by a checkpoint folder itself.

    Raises:
      ValueError: none of these.
    """
    root = Path(path)
    if (root / ITEM).is_dir():
        return root
    for folder in (root / "checkpoints", root):
        numbers = folder.iterdir() if folder.is_dir() else ()
        steps = [step for step in numbers if step.name.isdigit() and (step / ITEM).is_dir()]
        if steps:
            # As numbers: as texts, 9 comes after 10.
            return max(steps, key=lambda step: int(step.name))
    raise ValueError(
        f"{path} holds no checkpoint: give a run's folder (WORKDIR), one of its "
        "checkpoints/<step>, or the output of `models/convert.py from-hf`"
    )


def find_model_files(step: str | os.PathLike) -> Path | None:
    """The folder with config.json that belongs to a checkpoint folder, or None."""
    step = Path(step).absolute()
    candidates = [step / MODEL_FILES, step.parent.parent / MODEL_FILES]
    return next((path for path in candidates if (path / "config.json").is_file()), None)


def _existing_item(path: str | os.PathLike) -> Path:
    item = Path(path).absolute() / ITEM
    if not item.is_dir():
        raise ValueError(
            f"{path} holds no {ITEM!r}: give a checkpoint folder, WORKDIR/checkpoints/<step>"
        )
    return item


def _open(handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
    """What reads and writes items of one kind."""
    # Before Orbax makes its event loop: closed at a first failure, that of a full disk left 447
    # tracebacks of the arrays that failed after it.
    close_in_order()
    return ocp.Checkpointer(handler)


def _listed(checkpointer: ocp.Checkpointer, item: Path) -> dict[str, Any]:
    """Name, shape and type of what an item says it holds."""
    listed = checkpointer.metadata(item).item_metadata
    if not listed:  # Orbax logs what it finds wrong, and goes on
        raise ValueError(
            f"{item} is damaged: it does not say what it holds; give an older checkpoint, or a "
            "copy of this one"
        )
    return dict(listed.items())


def _check_same(item: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    shapes = [
        f"{name} is {tuple(stored[name].shape)}, not {tuple(expected[name].shape)}"
        for name in expected
        if name in stored and tuple(stored[name].shape) != tuple(expected[name].shape)
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{item} belongs to another model: missing {missing}, unexpected "
            f"{unexpected}, shapes {shapes}; use the config.json of its own model"
        )
