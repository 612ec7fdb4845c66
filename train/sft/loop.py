"""The `sft` stage: supervised steps on lessons."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from paravt_jax.interfaces import TrainablePolicy
from train.batch import to_mesh
from train.report.steps import StepReport
from train.sft.batches import Lessons
from train.sft.settings import SftSettings
from train.state import TrainState
from train.step import SftStep, mean_metrics
from train.workdir.saving import Saver


@dataclasses.dataclass(frozen=True)
class School:
    """What the stage works with; `train.run` puts it together."""

    settings: SftSettings
    lessons: Lessons
    policy: TrainablePolicy
    optimizer: optax.GradientTransformation
    router_balance: float
    mesh: Mesh
    steps: int
    saver: Saver
    report: StepReport


def cold_start(
    school: School, state: TrainState, first_step: int, position: Any = None
) -> tuple[TrainState, Any]:
    """Run the supervised steps from `first_step` on; each lesson is made during the one before it.

    Returns:
      the trained state, and the position of the data after the last step.
    """
    lessons, clock = school.lessons, school.report.clock
    update = SftStep(
        policy=school.policy,
        optimizer=school.optimizer,
        micro_rows=school.settings.micro_rows,
        budgets=lessons.budgets,
        router_balance=school.router_balance,
    )
    compiled = jax.jit(update, donate_argnums=0)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lessons.take, first_step)
        for step in range(first_step, school.steps):
            school.saver.between_steps(step, state, position)
            clock.start()
            with clock.time("time/data"):
                lesson = following.result()
                batches, position = to_mesh(lesson.batches, school.mesh), lesson.position
            with clock.time("time/learn"):
                if step + 1 < school.steps:
                    following = pool.submit(lessons.take, step + 1)
                school.saver.begin_update()
                state, learned = compiled(state, batches)
                metrics = mean_metrics([learned])
            school.report(step, metrics | lesson.figures)
    return state, position
