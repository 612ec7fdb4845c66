"""`--compile-only`: compile the train step for a TPU topology, with no TPU at hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from models.qwen3_vl import Qwen3VLConfig
from paravt_jax.mesh import make_mesh, parse_mesh, partition
from paravt_jax.params import abstract_params
from paravt_jax.records import LearnerBatch, VisionFeatures
from train import setup
from train.config import Config, Stage
from train.learner import generated_budget, rl_step
from train.state import abstract_state, make_optimizer


def compile_only(config: Config, topology: str) -> str:
    """Compile the RL step for `topology` (such as `v5p:2x2x2`); returns memory and cost per device.

    Raises:
      ValueError: libtpu is missing, the topology is unknown, or the mesh does not fit it.
    """
    if config.stage is not Stage.RL:
        raise ValueError(f"--compile-only compiles the rl step; {config.recipe} is an sft recipe")
    devices = _devices(topology)
    mesh = make_mesh(parse_mesh(config.mesh, len(devices)), devices)
    with jax.set_mesh(mesh):
        policy = setup.abstract_policy(config)
        optimizer = make_optimizer(config.optimizer, config.steps, policy.table)
        state = abstract_state(abstract_params(policy.table, mesh), config, mesh, optimizer)
        batch = abstract_batch(config, policy.config, mesh)
        step = jax.jit(rl_step(policy, optimizer, config), donate_argnums=0)
        compiled = step.lower(state, batch).compile()
    return _report(topology, mesh, compiled)


def _devices(topology: str):
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise ValueError(
            f"--compile-only {topology}: {str(error).splitlines()[0]}; install libtpu "
            "(`pip install libtpu`) and name a topology such as v5p:2x2x2"
        ) from error


def abstract_batch(config: Config, model: Qwen3VLConfig, mesh: Mesh) -> LearnerBatch:
    """Shapes of the largest learner batch of a configuration, laid out on the mesh."""
    width, taps = model.text.hidden_size, len(model.vision.deepstack_visual_indexes)
    rows = config.rl.prompts_per_step * config.rl.group_size
    merged = (model.vision.patch_size * model.vision.spatial_merge_size) ** 2
    frames = max(config.data.frame_budgets) * (config.data.max_pixels // merged)
    agent = config.agent
    responses = agent.rounds * agent.max_calls_per_turn * agent.response_tokens
    length = -(-(frames * 5 // 4 + 256 + generated_budget(config) + responses) // 128) * 128

    def spec(shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        axes = ("batch", *(None,) * (len(shape) - 1))
        home = NamedSharding(mesh, partition(dict(mesh.shape), axes, shape))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=home)

    groups = config.rl.prompts_per_step
    dtype = jnp.dtype(config.model.compute_dtype)
    values = {
        name: spec((rows, length))
        for name in ("loss_weights", "behaviour_log_probs", "reference_log_probs", "advantages")
    }
    return LearnerBatch(
        tokens=spec((rows, length), np.int32),
        positions=spec((rows, length, 3), np.int32),
        vision_index=spec((rows, length), np.int32),
        lengths=spec((rows,), np.int32),
        structural=spec((rows, length), bool),
        patches=None,
        grids=None,
        features=VisionFeatures(
            tokens=spec((groups, frames, width), dtype),
            deepstack=spec((groups, taps, frames, width), dtype),
        ),
        **values,
    )


def _report(topology: str, mesh: Mesh, compiled) -> str:
    memory = compiled.memory_analysis()
    flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
    sizes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    gib = 2**30
    return (
        f"{topology} as {sizes}: arguments {memory.argument_size_in_bytes / gib:.2f} GiB, "
        f"temporaries {memory.temp_size_in_bytes / gib:.2f} GiB, "
        f"code {memory.generated_code_size_in_bytes / gib:.3f} GiB per device; "
        f"{flops:.3e} floating-point operations per device and step"
    )
