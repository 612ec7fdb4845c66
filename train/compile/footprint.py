"""What each device of a mesh would hold, known without any of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from models import ModelPolicy
from models.common.prepared import EMBEDDING, HEAD, LAYERS, is_product
from paravt_jax.mesh import AXES, AnyMesh, parse_mesh, sharding
from paravt_jax.params import abstract_params
from paravt_jax.records import Row, VideoRef
from pipelines.render import ChatRenderer
from pipelines.sizes import prompt_tokens
from rollout.limits import SlotPool, slot_pools
from train import setup
from train.agent import crop_tokens
from train.config import Config, Stage
from train.methods.difficulty import hint_room
from train.optimizer import make_optimizer
from train.state import abstract_moments, split

EXAMPLE = Row("example", VideoRef("", 1.0), "When is the yellow triangle visible?", "")
"""As long as the needle world's questions, which a dry run does not write."""


def planned_mesh(config: Config) -> AbstractMesh:
    """The mesh of `--mesh` as it would be where its sizes multiply to the number of devices; with
    a size of -1, or without the flag, that of the devices of this machine.

    Raises:
      ValueError: naming the axis that is wrong.
    """
    sizes = parse_mesh(config.mesh, _planned_devices(config.mesh))
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)


def _planned_devices(mesh: str | None) -> int:
    sizes = [part.rpartition(":")[2].strip() for part in (mesh or "").split(",")]
    if mesh is None or not all(size.isdigit() and int(size) for size in sizes):
        return jax.device_count()
    return math.prod(map(int, sizes))


def footprint(
    config: Config, mesh: AnyMesh, renderer: ChatRenderer, rows: Sequence[Row] = ()
) -> dict[str, int]:
    """Bytes on each device of what lives as long as the run. Activations come on top:
    `--compile-only` tells those.

    Args:
      rows: the questions; without any, room is reckoned for one of `EXAMPLE`'s length.
    """
    table = setup.abstract_policy(config).table
    params = abstract_params(table, mesh)
    trainable, _ = split(params, config)
    optimizer = make_optimizer(config.optimizer, config.optimizer_steps, table)
    trained = _local(trainable)
    found = {
        "parameters": _local(params),
        "moments": _local(abstract_moments(optimizer, trainable, mesh)),
        "gradients": trained,
        "teacher": trained if config.teacher.strength else 0,
    }
    if config.stage is Stage.RL:
        found["reference"] = trained
        found["rollout weights"] = _prepared(config, params)
        found["rollout caches"] = _caches(config, mesh, renderer, rows or [EXAMPLE])
    return {name: size for name, size in found.items() if size}


def format_footprint(found: dict[str, int]) -> str:
    """A line for each part and one for their sum."""
    whole = found | {"together, without activations": sum(found.values())}
    width = max(map(len, whole))
    lines = [f"  {name:<{width}}  {size / 2**20:>12,.1f} MiB" for name, size in whole.items()]
    return "\n".join(["on each device:", *lines])


def _local(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _prepared(config: Config, params: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Copies of weights in the compute dtype, and of a tied head; see `models.common.prepared`.
    (On CPU all layers are copied.)"""
    dtype = jnp.dtype(config.model.compute_dtype)
    head = HEAD if HEAD in params else EMBEDDING
    cast = [name for name in params if name.startswith(LAYERS) and is_product(name)]
    copies = [*cast, head] if dtype != jnp.float32 else [head] if head == EMBEDDING else []
    return sum(_local(params[name]) * dtype.itemsize // 4 for name in copies)


def _caches(config: Config, mesh: AnyMesh, renderer: ChatRenderer, rows: Iterable[Row]) -> int:
    """Keys and values of the rollouts of a step, rows and heads split as far as they divide (the
    compiler decides; this is what a mesh is chosen for)."""
    data, policy = config.data, setup.abstract_policy(config)
    longest = prompt_tokens(renderer, rows, max(data.frame_budgets), data.overview_tokens)
    shapes = slot_pools(
        config.agent,
        renderer,
        prompts=config.rl.prompts_per_step,
        copies=config.rl.group_size,
        prompt_tokens=longest + hint_room(config.difficulty, renderer),
        crop_tokens=crop_tokens(config, renderer),
    )
    return sum(_cache(policy, pool, mesh) for pool in shapes.values())


def _cache(policy: ModelPolicy, pool: SlotPool, mesh: AnyMesh) -> int:
    sizes = pool.prompts, pool.copies, pool.prompt_tokens, pool.suffix
    leaves = jax.tree.leaves(jax.eval_shape(lambda: policy.init_cache(*sizes)))
    return sum(x.dtype.itemsize * math.prod(_home(x, mesh).shard_shape(x.shape)) for x in leaves)


def _home(leaf: jax.ShapeDtypeStruct, mesh: AnyMesh) -> NamedSharding:
    """Where part of a cache lives: `[layer, row, head, slot, ...]`, or a number per row."""
    split_axes = (None, "batch", "kv") if leaf.ndim > 2 else ()
    axes = (*split_axes, *(None,) * (leaf.ndim - len(split_axes)))
    return sharding(mesh, axes, leaf.shape)
