"""Folders of Qwen3-VL with the released tokenizer, chat template and processor settings.

`QWEN3_VL_FOLDER=PATH` names your download of an Instruct model, and
`QWEN3_VL_THINKING_FOLDER=PATH` that of a Thinking one; their weights need not be there. What is not
named comes from `shared/qwen3_vl_folder/make.py` beside this checkout, where it is at hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

GIVEN = {"instruct": "QWEN3_VL_FOLDER", "thinking": "QWEN3_VL_THINKING_FOLDER"}
"""Variants, and the variables that name a user's own."""
MAKE = Path(__file__).resolve().parents[3] / "shared" / "qwen3_vl_folder" / "make.py"
TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 128}
TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1}
VISION = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4}
VISION |= {"out_hidden_size": 64, "deepstack_visual_indexes": [1, 2, 3]}


def whole_folder(variant: str, cache: Path) -> Path:
    """The user's own folder of a variant, whatever its size; without one as `small_folder`."""
    return _given(variant) or small_folder(variant, cache)


def small_folder(variant: str, cache: Path) -> Path:
    """A folder of a variant around tiny random weights, made once for all workers of a session;
    skips the test where there is nothing to make it of."""
    given = _given(variant)
    if given is None and not MAKE.is_file():
        pytest.skip(
            f"the released tokenizer is not in this repository: set {GIVEN[variant]} to a folder "
            "of Qwen3-VL (CONTRIBUTING.md)"
        )
    if given is None:
        return _once(variant, variant, cache, _run)
    return _once(variant, f"{variant}_{zlib.crc32(str(given).encode()):08x}", cache, _shrink)


def _given(variant: str) -> Path | None:
    named = os.environ.get(GIVEN[variant])
    if named and not (Path(named) / "config.json").is_file():
        pytest.fail(f"{GIVEN[variant]}={named} holds no config.json: name a Qwen3-VL folder")
    return Path(named) if named else None


def _once(variant: str, name: str, cache: Path, make: Callable[[str, Path], str]) -> Path:
    """What `make` makes in a folder that it is given, which says why it failed if it did."""
    cache.mkdir(exist_ok=True)
    folder, failed = cache / name, cache / f"{name}.failed"
    with FileLock(cache / f"{name}.lock"):
        if not folder.exists() and not failed.exists():
            making = folder.with_name(f"{name}.part")
            why = make(variant, making)
            failed.write_text(why) if why else making.rename(folder)
    if failed.exists():
        pytest.skip(f"make.py --variant {variant}: {failed.read_text()}")
    return folder


def _run(variant: str, folder: Path) -> str:
    """By make.py, which fetches the vocabulary."""
    command = [sys.executable, str(MAKE), str(folder), "--variant", variant]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["failed"])[-1] if done.returncode else ""


def _shrink(variant: str, folder: Path) -> str:
    """The user's own, with few and random weights."""
    import jax  # not before the shape checks are installed

    from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
    from paravt_jax.params import initialise

    given = _given(variant)
    assert given is not None
    raw = json.loads((given / "config.json").read_text())
    sizes = {
        "text_config": raw["text_config"] | TEXT,
        "vision_config": raw["vision_config"] | VISION,
    }
    config = Qwen3VLConfig.from_dict(
        raw | sizes | {"model_type": "qwen3_vl", "tie_word_embeddings": True}
    )
    policy = Qwen3VLPolicy(config)
    policy.save_folder(initialise(policy.table, jax.random.key(0)), folder, base=given)
    return ""
