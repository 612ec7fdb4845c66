"""What each device of a mesh would hold, known without any of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding

from models import ModelPolicy
from models.common.prepared import is_product
from paravt_jax.kv_cache import SLOT_AXES
from paravt_jax.mesh import AXES, HOST, AnyMesh, parse_mesh, sharding
from paravt_jax.params import Table, abstract_params, head_of
from rollout.engine.engine import SlotPool
from train.model import ModelSettings
from train.state import abstract_moments, split, trainable_names


def planned_mesh(mesh: str | None, apart: int = 0) -> AbstractMesh:
    """The mesh of `--mesh` as it would be where its sizes multiply to the number of devices; with
    a size of -1, or without the flag, that of the devices of this machine but `apart` of them.

    Raises:
      ValueError: naming the axis that is wrong.
    """
    sizes = parse_mesh(mesh, _planned_devices(mesh, apart))
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)


def _planned_devices(mesh: str | None, apart: int) -> int:
    sizes = [part.rpartition(":")[2].strip() for part in (mesh or "").split(",")]
    if mesh is None or not all(size.isdigit() and int(size) for size in sizes):
        return max(jax.device_count() - apart, 1)
    return math.prod(map(int, sizes))


def footprint(
    policy: ModelPolicy,
    optimizer: optax.GradientTransformation,
    model: ModelSettings,
    mesh: AnyMesh,
    teacher: bool = False,
    pools: Mapping[str, SlotPool] | None = None,
    rollouts: AnyMesh | None = None,
    reference: bool = True,
    staleness: int = 0,
) -> dict[str, int]:
    """Bytes on each device of what lives as long as the run. Activations come on top:
    `--compile-only` tells those.

    Args:
      teacher: whether there is a second copy of what trains.
      pools: slots of rollouts, if the run has any.
      rollouts: their mesh; None for the learner's.
      reference: whether that of a run with rollouts stays on the devices.
      staleness: copies of what trains for rollouts that are drawn ahead.
    """
    params = abstract_params(policy.table, mesh)
    trainable, _ = split(params, trainable_names(policy.table, model))
    trained = local_bytes(trainable)
    parts = {
        "parameters": local_bytes(params),
        "moments": local_bytes(abstract_moments(optimizer, trainable, mesh)),
        "gradients": trained,
        "teacher": trained if teacher else 0,
        "weights of earlier steps": staleness * trained,
    }
    if pools is not None:
        parts["reference"] = trained if reference else 0
        copied = _prepared(policy.table, model.compute_dtype, params)
        if rollouts is not None:
            copied = _handed_over(policy, model.compute_dtype, rollouts)
        parts["rollout weights"] = copied * prepared_sets(staleness)
        parts["rollout caches"] = cache_bytes(policy, pools, rollouts or mesh)
    return {name: size for name, size in parts.items() if size}


STORAGE = 2e9
"""Bytes a second that a shared file system, or a bucket, may give to a whole run."""


def checkpoint_bytes(
    policy: ModelPolicy,
    optimizer: optax.GradientTransformation,
    model: ModelSettings,
    teacher: bool = False,
    staleness: int = 0,
) -> int:
    """Bytes of one checkpoint, wherever its arrays are."""
    alone = planned_mesh("data:1")
    parts = footprint(policy, optimizer, model, alone, teacher, staleness=staleness)
    return sum(size for name, size in parts.items() if name != "gradients")


def format_checkpoint(size: int) -> str:
    """What a checkpoint takes, in a line."""
    rate = f"at {STORAGE / 1e9:g} GB/s"
    return f"a checkpoint: {size / 2**20:,.1f} MiB, {size / STORAGE:,.1f} s to write or read {rate}"


def format_footprint(parts: dict[str, int], apart: bool = False) -> str:
    """A line for each part and one for their sum; rollouts by themselves where they have devices
    `apart` from the learner's."""
    if apart:
        rollouts = {name: size for name, size in parts.items() if name.startswith("rollout ")}
        rest = {name: size for name, size in parts.items() if name not in rollouts}
        return f"{format_footprint(rest)}\nof --rollout-devices, {format_footprint(rollouts)}"
    whole = parts | {"together, without activations": sum(parts.values())}
    width = max(map(len, whole))
    lines = [f"  {name:<{width}}  {size / 2**20:>12,.1f} MiB" for name, size in whole.items()]
    return "\n".join(["on each device:", *lines])


def local_bytes(tree: Any) -> int:
    """Bytes of arrays on one device, without those on its host."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _prepared(table: Table, compute_dtype: str, params: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Copies of weights in the compute dtype, and of a tied head; see `models.common.prepared`.
    (On CPU all layers are copied.)"""
    dtype, head = jnp.dtype(compute_dtype), head_of(table)
    cast = [name for name, spec in table.items() if is_product(spec)]
    tied = [head.name] if head.part == "embedding" else []
    copies = [*cast, head.name] if dtype != jnp.float32 else tied
    return sum(local_bytes(params[name]) * dtype.itemsize // 4 for name in copies)


def prepared_sets(staleness: int) -> int:
    """How often rollouts hold the weights: with several hosts all versions at once, see
    `train.rl.versions`."""
    return 1 + staleness if jax.process_count() > 1 else 1


def rollout_bytes(
    policy: ModelPolicy,
    compute_dtype: str,
    mesh: AnyMesh,
    pools: Mapping[str, SlotPool],
    sets: int = 1,
) -> int:
    """Bytes on each device of `sets` of weights that were handed over to a mesh, and of caches
    there."""
    return sets * _handed_over(policy, compute_dtype, mesh) + cache_bytes(policy, pools, mesh)


def _handed_over(policy: ModelPolicy, compute_dtype: str, mesh: AnyMesh) -> int:
    """Every weight, prepared, on a mesh of its own; see `Engine.prepare`."""
    params = abstract_params(policy.table, mesh)
    head, cast = head_of(policy.table), {n for n, spec in policy.table.items() if is_product(spec)}
    narrow = {name: params[name] for name in cast | {head.name}}
    # A tied head is a copy: the embedding itself stays.
    moved = cast | ({head.name} if head.part == "head" else set())
    wide = {name: x for name, x in params.items() if name not in moved}
    return local_bytes(wide) + local_bytes(narrow) * jnp.dtype(compute_dtype).itemsize // 4


def cache_bytes(policy: ModelPolicy, pools: Mapping[str, SlotPool], mesh: AnyMesh) -> int:
    """Keys and values of all pools at their longest, on each device."""
    return sum(_pool_bytes(policy, pool, mesh) for pool in pools.values())


def _pool_bytes(policy: ModelPolicy, pool: SlotPool, mesh: AnyMesh) -> int:
    """Keys and values of the rollouts of a step at their longest, rows and heads split as far as
    they divide (the compiler decides; this is what a mesh is chosen for)."""
    sizes = pool.prompts, pool.copies, pool.prompt_tokens, pool.row_pages * pool.page_slots
    cache = jax.eval_shape(lambda: policy.init_cache(*sizes))
    arrays = jax.tree.leaves((cache.prompt_keys, cache.prompt_values, cache.keys, cache.values))
    return sum(x.dtype.itemsize * math.prod(_home(x, mesh).shard_shape(x.shape)) for x in arrays)


def _home(leaf: jax.ShapeDtypeStruct, mesh: AnyMesh) -> NamedSharding:
    """Where part of a cache lives."""
    return sharding(mesh, SLOT_AXES[: leaf.ndim], leaf.shape)
