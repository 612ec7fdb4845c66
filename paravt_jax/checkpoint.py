"""Weights on disk as Orbax keeps them: the flat dict of parameters, one item of a checkpoint.

A checkpoint folder (`WORKDIR/checkpoints/<step>`, or what `models/convert.py from-hf` writes)
holds the item `params`. `model/`, beside it or in the run's folder, holds config.json and the
tokenizer and processor files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Array

from paravt_jax.params import Params, Table, abstract_params

ITEM = "params"
"""Name of the item that holds the weights."""
MODEL_FILES = "model"
"""Folder with config.json, tokenizer and processor files."""


def save_params(path: str | os.PathLike, params: Mapping[str, Array]) -> None:
    """Write weights as the item `params` of the checkpoint folder `path`.

    Raises:
      ValueError: the folder already holds weights.
    """
    item = Path(path).absolute() / ITEM
    if item.exists():
        raise ValueError(f"{item} already exists: choose another folder")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(item, dict(params))


def restore_params(
    path: str | os.PathLike, table: Table, mesh: Mesh | None = None, dtype: Any = "float32"
) -> Params:
    """Read the weights of a checkpoint folder straight to where they will live.

    Raises:
      ValueError: no weights there, or other parameters than `table` lists.
    """
    item = Path(path).absolute() / ITEM
    if not item.is_dir():
        raise ValueError(
            f"{path} holds no {ITEM!r}: give a checkpoint folder, WORKDIR/checkpoints/<step>"
        )
    target = abstract_params(table, mesh, dtype)
    with ocp.StandardCheckpointer() as checkpointer:
        _check_same(item, dict(checkpointer.metadata(item).item_metadata.items()), target)
        return checkpointer.restore(item, target)


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


def _check_same(item: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    shapes = [
        f"{name} is {tuple(stored[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in stored and tuple(stored[name].shape) != tuple(wanted[name].shape)
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{item} belongs to another model: missing {missing}, unexpected "
            f"{unexpected}, shapes {shapes}; use the config.json of its own model"
        )
