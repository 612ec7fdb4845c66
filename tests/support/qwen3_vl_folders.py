"""Folders of Qwen3-VL with the released tokenizer, chat template and processor settings.

Two come from `shared/qwen3_vl_folder/make.py` beside this checkout, where it is at hand: an
Instruct and a Thinking one, around tiny random weights. `QWEN3_VL_FOLDER=PATH` names one of yours
instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

GIVEN = "QWEN3_VL_FOLDER"
MAKE = Path(__file__).resolve().parents[3] / "shared" / "qwen3_vl_folder" / "make.py"
VARIANTS = ("instruct", "thinking")


def folder_names() -> list[str]:
    """What tests of any folder run on: the user's own, or both variants."""
    return ["given"] if os.environ.get(GIVEN) else list(VARIANTS)


def named_folder(name: str, cache: Path) -> Path:
    """The folder of a name of `folder_names`; skips the test where it cannot be made."""
    if name != "given":
        return _made(name, cache)
    folder = Path(os.environ[GIVEN])
    if not (folder / "config.json").is_file():
        pytest.fail(f"{GIVEN}={folder} holds no config.json: name a Qwen3-VL folder")
    return folder


def _made(variant: str, cache: Path) -> Path:
    """A variant, made once for all workers of a session."""
    if not MAKE.is_file():
        pytest.skip(f"no {MAKE.parent.name}/make.py beside the checkout; set {GIVEN} to a folder")
    cache.mkdir(exist_ok=True)
    folder, failed = cache / variant, cache / f"{variant}.failed"
    with FileLock(cache / f"{variant}.lock"):
        if not folder.exists() and not failed.exists():
            _run(variant, folder, failed)
    if failed.exists():
        pytest.skip(f"make.py --variant {variant}: {failed.read_text()}")
    return folder


def _run(variant: str, folder: Path, failed: Path) -> None:
    """Make a variant, or note why that failed: make.py fetches the vocabulary."""
    making = folder.with_name(f"{variant}.part")
    command = [sys.executable, str(MAKE), str(making), "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        failed.write_text((done.stderr.strip().splitlines() or ["failed"])[-1])
    else:
        making.rename(folder)
