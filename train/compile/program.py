"""One program of a run as shapes, and the weights that its positions are multiplied with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from models import ModelPolicy
from paravt_jax.lora import is_adapter
from paravt_jax.params import ParamSpec, head_of
from paravt_jax.parts import SEEN


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a run."""

    name: str
    lower: Callable[[], Any]
    """Traces it for the active mesh: a `jax.stages.Lowered`."""
    mesh: Mesh
    """The one to be active."""
    calls: float
    """In a step, on the limits of the settings."""
    part: str
    """`rollout` or `learner`."""
    tokens: int = 0
    """Positions of all rows of a call, padding included."""
    model_flops: float = 0.0
    """Two for every weight and position that it is multiplied with, six where gradients follow;
    attention's own products and what is computed twice not counted. On all chips together."""
    beside: float = 0.0
    """Bytes on each chip that the run holds and the program does not take."""
    drawn: int = 1
    """Tokens of each row that one call draws, by each of which it is counted."""
    of_engine: bool = False
    """Whether it works on the mesh of rollouts."""
    spoken: bool = False
    """Whether rollouts that say less need fewer calls."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights that a position is multiplied with."""

    vision: float
    """By a patch; of what works on merged patches its share."""
    layers: float
    head: float

    @classmethod
    def of(cls, policy: ModelPolicy) -> Weights:
        """Of experts those that serve a token."""
        table = policy.table
        merged = policy.patch_sizes[1] ** 2
        vision = sum((_seen(spec, merged) for spec in table.values()), 0.0)
        layered = (spec for spec in table.values() if spec.is_stacked)
        layers = sum((_active(spec, policy.experts_per_token) for spec in layered), 0.0)
        return cls(vision, layers, _size(head_of(table)))


def _size(spec: ParamSpec) -> float:
    return float(math.prod(spec.shape))


def _seen(spec: ParamSpec, merged: int) -> float:
    """Weights of the vision tower that a patch is multiplied with: mergers take `merged` of them
    at once."""
    # Positions are added, not multiplied with.
    if spec.part not in SEEN or "positions" in spec.axes:
        return 0.0
    return _size(spec) / (merged if spec.part == "mergers" else 1)


def _active(spec: ParamSpec, experts_per_token: int) -> float:
    """Weights of a parameter that serve one token."""
    if not spec.is_matrix or is_adapter(spec.name):
        return 0.0
    if "expert" not in spec.axes:
        return _size(spec)
    return _size(spec) * experts_per_token / spec.shape[spec.axes.index("expert")]
