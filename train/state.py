"""What training changes: weights, optimiser state, step. And how it is laid out on a mesh."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from paravt_jax.lora import is_adapter
from paravt_jax.mesh import AnyMesh
from paravt_jax.moments import weight_of
from paravt_jax.params import Table
from paravt_jax.parts import SEEN
from paravt_jax.pytrees import pytree
from train.model import ModelSettings

FlatParams = dict[str, Array]


@pytree
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Weights in two parts (only one has gradients and moments), optimiser state and step."""

    trainable: FlatParams
    frozen: FlatParams
    optimizer: optax.OptState
    step: Int[Array, ""]
    """Optimiser steps so far."""
    teacher: FlatParams = dataclasses.field(default_factory=dict)
    """A moving average of `trainable`, see `train.methods.teacher`; empty without a teacher."""
    older: dict[str, FlatParams] = dataclasses.field(default_factory=dict)
    """What trains as it was 1, 2, ... steps ago, by that number: only in checkpoints of runs whose
    rollouts are drawn ahead, see `train.rl.staleness`."""

    @property
    def params(self) -> FlatParams:
        """All weights by name."""
        return {**self.trainable, **self.frozen}


def trainable_names(table: Table, model: ModelSettings) -> set[str]:
    """The parameters that train: with LoRA the adapters alone, otherwise everything but frozen
    parts, the vision tower only where the settings say so."""
    if model.lora.rank:
        return {name for name in table if is_adapter(name)}
    fixed = {*model.frozen, *(() if model.train_vision else SEEN)}
    return {name for name, spec in table.items() if spec.part not in fixed}


def make_state(
    params: FlatParams,
    trained: Collection[str],
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    teacher: bool = False,
) -> TrainState:
    """Split off the weights that are trained, and set up the optimiser and, if there is to be one,
    the teacher; moments and teacher are sharded like their weights."""
    trainable, frozen = split(params, trained)
    init = jax.jit(optimizer.init, out_shardings=moment_shardings(optimizer, trainable, mesh))
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    # A copy each: a step donates its state, and no buffer can be donated twice.
    taught = {name: x.copy() for name, x in trainable.items() if teacher}
    return TrainState(trainable, frozen, init(trainable), step, taught)


def abstract_state(
    params: dict[str, jax.ShapeDtypeStruct],
    trained: Collection[str],
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    teacher: bool = False,
) -> TrainState:
    """Shapes and shardings of `make_state`, with no memory behind them."""
    trainable, frozen = split(params, trained)
    moments = abstract_moments(optimizer, trainable, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    parts = trainable, frozen, moments, step, dict(trainable) if teacher else {}
    # The shardings are lost in a trace, and fields hold arrays: its structure takes the shapes.
    traced = jax.eval_shape(lambda fields: TrainState(*fields), parts)
    return jax.tree.unflatten(jax.tree.structure(traced), jax.tree.leaves(parts))


def split(params: dict, trained: Collection[str]) -> tuple[dict, dict]:
    """Weights that train, which are those of these names, and those that do not."""
    trainable = {name: value for name, value in params.items() if name in trained}
    return trainable, {name: value for name, value in params.items() if name not in trained}


def abstract_moments(
    optimizer: optax.GradientTransformation, trainable: dict[str, Any], mesh: AnyMesh
) -> optax.OptState:
    """Shapes and shardings of the optimiser's state, with no memory behind them."""
    return jax.tree.map(
        lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
        jax.eval_shape(optimizer.init, trainable),
        moment_shardings(optimizer, trainable, mesh),
    )


def moment_shardings(
    optimizer: optax.GradientTransformation, trainable: dict[str, Any], mesh: AnyMesh
) -> optax.OptState:
    """The sharding of each optimiser leaf: its weight's where it has one, replicated otherwise.
    Scales of blocks are split as their weight is, but for the last axis where they do not divide.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def home(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        name = weight_of(path, trainable)
        weight = None if name is None else trainable[name]
        if weight is None or weight.shape[:-1] != leaf.shape[:-1]:
            return replicated
        placement = weight.sharding
        if weight.shape == leaf.shape or leaf.shape[-1] % _last_splits(placement, leaf.ndim) == 0:
            return placement
        return NamedSharding(mesh, PartitionSpec(*placement.spec[: leaf.ndim - 1]))

    return jax.tree_util.tree_map_with_path(home, jax.eval_shape(optimizer.init, trainable))


def _last_splits(placement: NamedSharding, ndim: int) -> int:
    """Parts that the last of `ndim` axes is split into."""
    last = placement.spec[ndim - 1] if len(placement.spec) == ndim else None
    axes = (last,) if isinstance(last, str) else last or ()
    return math.prod(placement.mesh.shape[axis] for axis in axes)
