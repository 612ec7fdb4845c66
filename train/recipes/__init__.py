"""Recipes: functions that return a complete configuration. `RECIPES` lists ours; yours may lie
anywhere (`--recipe path/to/file.py:name`).

Names and summaries are known without importing the recipes, which takes seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from paravt_jax.plugins import is_reference, load, reference

if TYPE_CHECKING:
    from train.config import Config

RECIPES: dict[str, str] = {
    "needle_rl": "needle",
    "needle_grpo": "needle",
    "needle_sft": "needle",
    "paravt_rl": "paravt",
    "paravt_grpo": "paravt",
    "paravt_sft": "paravt",
    "longvt_rl": "longvt",
    "needle_longvt": "longvt",
    "vital_rl": "vital",
    "needle_vital": "vital",
    "video_o3_rl": "video_o3",
    "needle_video_o3": "video_o3",
    "needle_video_o3_sft": "video_o3",
    "visd_rl": "visd",
    "needle_visd": "visd",
    "deepvideo_r1_rl": "deepvideo_r1",
    "needle_deepvideo_r1": "deepvideo_r1",
}
"""The name of each recipe, which is that of its function, and its module of this package."""


def check_name(name: str) -> None:
    """Refuse a recipe that does not exist."""
    if name not in RECIPES and not is_reference(name):
        raise ValueError(
            f"--recipe {name} is unknown; give a function of yours as path/to/file.py:name, or "
            f"choose one of {', '.join(RECIPES)}"
        )


def get_recipe(name: str) -> Config:
    """The configuration of a recipe, which bears the name under which it is found again.

    Raises:
      ValueError: no recipe has this name, or it is no recipe.
    """
    check_name(name)
    if not is_reference(name):
        function = getattr(importlib.import_module(f"{__name__}.{RECIPES[name]}"), name)
        return dataclasses.replace(function(), recipe=name)
    from train.config import Config

    function = load(name)
    config = function()
    if not isinstance(config, Config):
        raise ValueError(f"--recipe {name} returned {type(config).__name__}, not a Config")
    return dataclasses.replace(config, recipe=reference(function))


def summaries() -> dict[str, str]:
    """The first line of each recipe's docstring, read from the source."""
    lines: dict[str, str] = {}
    for module in dict.fromkeys(RECIPES.values()):
        source = (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and RECIPES.get(node.name) == module:
                text = (ast.get_docstring(node) or "").partition("\n\n")[0]
                lines[node.name] = " ".join(text.split()).partition(": `python")[0].rstrip(".")
    return {name: lines[name] for name in RECIPES}
