"""Recipes: functions that return a complete configuration. `RECIPES` lists ours; yours may lie
anywhere (`--recipe path/to/file.py:name`).

Names and summaries are known without importing the recipes, which takes seconds.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
from collections.abc import Callable
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
    """Refuse a recipe that does not exist.

    Raises:
      ValueError: naming those that do.
    """
    if name not in RECIPES and not is_reference(name):
        raise ValueError(
            f"--recipe {name} is unknown; give a function of yours as path/to/file.py:name, or "
            f"choose one of {', '.join(RECIPES)}"
        )


def recipe_function(name: str) -> Callable[[], Config]:
    """The function of a recipe; its docstring says what to expect of it.

    Raises:
      ValueError: no recipe has this name.
    """
    check_name(name)
    if is_reference(name):
        return _own(name)
    return getattr(importlib.import_module(f"{__name__}.{RECIPES[name]}"), name)


def _own(name: str) -> Callable[[], Config]:
    """A user's recipe, whose configuration bears the name under which it is found again."""
    from train.config import Config

    function = load(name)

    def recipe() -> Config:
        config = function()
        if not isinstance(config, Config):
            raise ValueError(f"--recipe {name} returned {type(config).__name__}, not a Config")
        return dataclasses.replace(config, recipe=reference(function))

    return recipe


def get_recipe(name: str) -> Config:
    """The configuration of a recipe.

    Raises:
      ValueError: no recipe has this name.
    """
    return recipe_function(name)()


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
