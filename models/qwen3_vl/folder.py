"""The config.json of a Hugging Face folder of Qwen3-VL, read and written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from models.common.folder import CONFIG, existing_folder, naming
from models.common.safetensors_io import read_json
from models.qwen3_vl.config import Qwen3VLConfig


def read_config(folder: str | os.PathLike) -> Qwen3VLConfig:
    """The config.json of a Hugging Face folder.

    Raises:
      ValueError: no such folder or file, or a model that is no Qwen3-VL.
    """
    path = existing_folder(folder) / CONFIG
    raw = read_json(path)
    with naming(path):
        return Qwen3VLConfig.from_dict(raw)


def write_config(config: Qwen3VLConfig, dtype: str, base: Path | None, folder: Path) -> None:
    """Write our fields over those of the base's config.json, whose other fields are kept."""
    raw: dict[str, Any] = config.to_dict()
    # transformers 5 goes by the value of the whole model, 4.57 by that of the language model.
    raw["text_config"]["tie_word_embeddings"] = config.tie_word_embeddings
    if base is not None and (base / CONFIG).is_file():
        old = read_json(base / CONFIG)
        towers = {
            tower: {**(old.get(tower) or {}), **raw[tower]}
            for tower in ("text_config", "vision_config")
        }
        towers["text_config"].pop("rope_parameters", None)  # ours is rope_scaling
        raw = {**old, **raw, **towers}
    for part in (raw["text_config"], raw["vision_config"]):
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
    raw.pop("torch_dtype", None)
    raw["dtype"] = dtype
    text = json.dumps(raw, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
