"""The model that is asked or evaluated: which weights, and the settings that go with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from models.common.folder import existing_folder
from models.common.weights import load_params
from paravt_jax.interfaces import Params
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.settings import placed
from rollout.limits import AgentConfig
from train.agent import AgentMaker
from train.checks import check_attention
from train.config import Config
from train.evaluation.held_out import greedy
from train.model import ModelSettings
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.setup import Parts
from train.workdir.config_file import FILE, read_settings

OWN, OTHERS = "needle_rl", "paravt_rl"
"""Recipes whose settings go with the committed cold start, and with any other model folder."""
LEARNING = ("rewards", "advantages", "objective")
"""Sections of a run's settings that no evaluation reads: its own functions may be gone."""
EXPORT = "hf"
"""The folder of a run that holds the weights of its end."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with its weights, and how its agent works unless it is told otherwise."""

    config: Config
    """Its `model.folder` is where the weights came from."""
    agents: AgentMaker
    params: Params
    mesh: Mesh

    @property
    def name(self) -> str:
        """Model folder, as seen from here, and recipe."""
        folder = Path(self.config.model.folder or "").absolute()
        inside = folder.is_relative_to(Path.cwd())
        return f"{folder.relative_to(Path.cwd()) if inside else folder} ({self.config.recipe})"


def open_model(
    model: str | None,
    recipe: str | None,
    change: Change,
    mesh: Mesh | None = None,
    attention: str | None = None,
) -> Opened:
    """Load a model, on the first device unless a mesh is given.

    Args:
      model: a Hugging Face folder, or the workdir of a run; None: the committed cold start.
      recipe: whose settings to take instead of the model's own.
      change: makes the rules of the agent from those of the settings.
      attention: what computes it, see `ModelSettings`; None: as in the settings.

    Raises:
      ValueError: there is no such model.
    """
    config = settings_of(model, recipe, attention)
    parts, settings = Parts(config), config.model
    # The renderer is the settings' own: it offers their tools, whatever the rules make of them.
    agents = dataclasses.replace(parts.agents, rules=change(config.agent))
    mesh = mesh or make_mesh(parse_mesh(None, 1), jax.devices()[:1])
    params = load_params(settings.folder or "", parts.policy.table, mesh, settings.compute_dtype)
    return Opened(config, agents, params, mesh)


Change = Callable[[AgentConfig], AgentConfig]
"""Makes the rules of an agent from those of a recipe."""


def changed_rules(
    rules: AgentConfig,
    temperature: float = 0.0,
    rounds: int | None = None,
    tokens: int | None = None,
) -> AgentConfig:
    """The rules of an agent that is asked: at this temperature, and with this many rounds of calls
    and tokens of a turn if not with its own."""
    changed = greedy(rules)
    if temperature:
        hot = dataclasses.replace(changed.sampling, temperature=temperature)
        changed = dataclasses.replace(changed, sampling=hot, subagent_sampling=hot)
    if tokens:
        changed = dataclasses.replace(changed, turn_tokens=tokens, answer_tokens=tokens)
    return changed if rounds is None else dataclasses.replace(changed, max_tool_rounds=rounds)


def settings_of(
    model: str | None, recipe: str | None = None, attention: str | None = None
) -> Config:
    """The settings that go with a model: those of the run that left it, else of a recipe.

    Raises:
      ValueError: no such folder, a run that has exported no weights, or no such `attention` here.
    """
    folder, workdir = _found(model)
    existing_folder(folder)
    if recipe is not None:
        config = get_recipe(recipe)
    elif workdir is not None:
        config = read_settings(workdir, Config, LEARNING)
        assert config is not None, "the workdir holds settings"
    else:
        config = get_recipe(OWN if folder.resolve() == COLD_START else OTHERS)
    defaults = config.model
    # bfloat16 is what accelerators multiply fast; CPUs do not have it.
    dtype = "float32" if jax.default_backend() == "cpu" else defaults.compute_dtype
    # Adapters are merged into what a run exports. A kernel of its that this machine does not have
    # gives way to the reference, and float32 has no other.
    kernels: Any = attention or (defaults.attention if dtype == "bfloat16" else "auto")
    with placed("--"):
        weights = ModelSettings(str(folder), dtype, defaults.cache_dtype, attention=kernels)
    found = dataclasses.replace(config, model=weights)
    if attention:
        check_attention(found, jax.default_backend())
    return found


def _found(model: str | None) -> tuple[Path, Path | None]:
    """The folder with weights, and the workdir of the run that left it."""
    folder = COLD_START if model is None else Path(model)
    for workdir in (folder, folder.absolute().parent):
        if _holds_run(workdir):
            exported = workdir / EXPORT
            if not exported.is_dir():
                raise ValueError(
                    f"--model {model}: this run has no {EXPORT}/ yet, the weights of its end; let "
                    f"it end, or make a folder of a checkpoint: `python models/convert.py to-hf "
                    f"{model}/checkpoints/STEP OUT`"
                )
            return exported, workdir
    return folder, None


def _holds_run(workdir: Path) -> bool:
    """Whether the folder is the workdir of a run: its config.json is not that of a model."""
    try:
        return "recipe" in json.loads((workdir / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
