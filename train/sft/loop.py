"""The `sft` stage: supervised steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh

from train.batch import to_mesh
from train.report.steps import StepReport
from train.sft.batches import SftData
from train.state import FlatParams, TrainState
from train.step import SftStep, mean_metrics
from train.workdir.saving import Saver


@dataclasses.dataclass(frozen=True)
class SftRun:
    """What the stage works with; `train.run` puts it together."""

    data: SftData
    update: SftStep
    mesh: Mesh
    steps: int
    saver: Saver
    report: StepReport
    evaluate: Callable[[int, FlatParams], Mapping[str, float]] | None = None
    """Evaluates in the midst of the run, if it is to be: metrics of the weights after so many
    steps."""


def supervise(
    run: SftRun, state: TrainState, first_step: int, position: Any = None
) -> tuple[TrainState, Any]:
    """Run the supervised steps from `first_step` on; data of each is made during the one before.

    Returns:
      the trained state, and the position of the data after the last step.
    """
    data, clock = run.data, run.report.clock
    compiled = jax.jit(run.update, donate_argnums=0)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(data.take, first_step)
        for step in range(first_step, run.steps):
            run.saver.between_steps(step, state, position)
            clock.start()
            with clock.time("time/data"):
                read = following.result()
                batches, position = to_mesh(read.batches, run.mesh), read.position
            with clock.time("time/learn"):
                if step + 1 < run.steps:
                    following = pool.submit(data.take, step + 1)
                run.saver.begin_update()
                state, learned = compiled(state, batches)
                metrics = mean_metrics([learned])
            if run.evaluate is not None:
                with clock.time("time/evaluate"):
                    metrics |= run.evaluate(step + 1, state.params)
            run.report(step, metrics | read.metrics | run.saver.metrics())
    return state, position
