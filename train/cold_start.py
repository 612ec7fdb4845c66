"""The `sft` stage: supervised steps on a schedule of task mixes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from paravt_jax.interfaces import Policy
from paravt_jax.records import Example, LearnerBatch
from train.batch import learner_batch, streams_of_examples
from train.config import Config, SftPhase, TaskShape
from train.layout import to_mesh
from train.output import RunLog
from train.state import TrainState
from train.step import SftStep

Sources = Mapping[str, Iterator[Example]]


def phase_at(phases: tuple[SftPhase, ...], step: int) -> SftPhase:
    """The phase that a step belongs to: the last one that has begun."""
    return [phase for phase in phases if phase.start <= step][-1]


def cold_start(
    state: TrainState,
    sources: Sources,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    config: Config,
    mesh: Mesh,
    log: RunLog,
    pad_id: int,
) -> TrainState:
    """Run `config.steps` supervised steps; examples of the next step are made meanwhile."""
    shapes = config.sft.tasks
    update = SftStep(
        policy=policy,
        optimizer=optimizer,
        micro_rows=config.sft.micro_rows,
        budgets={task: shape.learned for task, shape in shapes.items()},
    )
    compiled = jax.jit(update, donate_argnums=0)
    phases = config.sft.phases

    def make(step: int) -> dict[str, LearnerBatch]:
        rows = phase_at(phases, step).rows
        return {task: _batch(sources[task], n, shapes[task], pad_id) for task, n in rows.items()}

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, 0)
        for step in range(config.steps):
            began = time.perf_counter()
            batches = to_mesh(following.result(), mesh)
            waited = time.perf_counter() - began
            following = pool.submit(make, min(step + 1, config.steps - 1))
            state, metrics = compiled(state, batches)
            figures = {name: float(value) for name, value in jax.device_get(metrics).items()}
            figures |= {"time/data": waited, "time/step": time.perf_counter() - began}
            if not np.isfinite(figures["loss"]):
                raise ValueError(
                    f"the loss of step {step} is {figures['loss']}; lower "
                    f"optimizer.learning_rate={config.optimizer.learning_rate}"
                )
            log.step(step, figures)
    return state


def _batch(source: Iterator[Example], rows: int, shape: TaskShape, pad_id: int) -> LearnerBatch:
    examples = [next(source) for _ in range(rows)]
    return learner_batch(
        streams_of_examples(examples), length=shape.length, pad_id=pad_id, frames=shape.frames
    )
