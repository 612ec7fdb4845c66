"""Hugging Face model folders, all but the weights: config.json, the files beside it, and folders
that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from models.common.safetensors_io import PICKLED

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
OTHER_WEIGHTS = (*PICKLED, ".safetensors", ".msgpack", ".h5", ".gguf", ".onnx")
TEMPLATES = "additional_chat_templates"
"""Folder with chat templates beside the default one, as transformers saves them."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors about what a file says name the file.

    Raises:
      ValueError: instead of any of them.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:  # a list for a number, and the like
        raise ValueError(f"{path} is damaged ({error!r}): fetch it again") from error


def existing_folder(folder: str | os.PathLike) -> Path:
    """The path of a model folder.

    Raises:
      ValueError: there is none.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"model folder {path} does not exist: give a Hugging Face folder with "
            "config.json and *.safetensors"
        )
    return path


def carry_files(base: Path | None, folder: Path) -> None:
    """Copy what belongs to no weights: tokenizer, processor, chat templates, generation files.

    The description of an adapter stays behind too: transformers would look for its weights.
    """
    for path in [] if base is None else sorted(base.iterdir()):
        if path.is_file() and not _is_weights(path) and path.name not in (CONFIG, ADAPTER_CONFIG):
            shutil.copy2(path, folder / path.name)
        elif path.is_dir() and path.name == TEMPLATES:
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)


def copy_model_files(base: Path, folder: Path) -> None:
    """Make a folder with all of a model folder but its weights, or bring it up to date."""
    folder.mkdir(exist_ok=True)
    carry_files(base, folder)
    shutil.copy2(base / CONFIG, folder / CONFIG)


def _is_weights(path: Path) -> bool:
    return path.suffix in OTHER_WEIGHTS or path.name.endswith(".index.json")


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which then takes the place of `target`, or vanishes if the block
    fails.

    Raises:
      OSError: it could not be written; `target` is as it was.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _replace(temporary, target)
    except OSError as error:
        raise OSError(
            f"could not write {target}: {error}; free some space or choose another folder "
            "(nothing was left there)"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(temporary: Path, target: Path) -> None:
    old = target.with_name(temporary.name + ".old")
    # Out of the way first: a folder cannot take the name of one that is not empty.
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Refuse to replace what cannot be an earlier export.

    Raises:
      ValueError: `target` holds something that is no model.
    """
    if not target.exists():
        return
    entries = list(target.iterdir()) if target.is_dir() else [target]
    names = {entry.name for entry in entries if entry.is_file()}
    model = CONFIG in names and any(name.endswith(".safetensors") for name in names)
    if entries and not (model and {entry.name for entry in entries} <= names | {TEMPLATES}):
        raise ValueError(
            f"{target} exists and is no plain model folder: give a new folder, or empty this one"
        )
