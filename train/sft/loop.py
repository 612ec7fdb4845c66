"""The `sft` stage: supervised steps on lessons."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from paravt_jax.interfaces import TrainablePolicy
from train.config import Config
from train.layout import to_mesh
from train.report.log import RunLog
from train.report.standing import learning_rates, standing
from train.rl.learner import figures
from train.rl.loop import Clock, stop_if_not_finite
from train.sft.batches import Lessons
from train.state import TrainState
from train.step import SftStep
from train.workdir.saving import Saver


@dataclasses.dataclass(frozen=True)
class School:
    """What the stage works with; `train.run` puts it together."""

    config: Config
    lessons: Lessons
    policy: TrainablePolicy
    optimizer: optax.GradientTransformation
    mesh: Mesh
    saver: Saver
    log: RunLog


def cold_start(
    school: School, state: TrainState, first_step: int, position: Any = None
) -> tuple[TrainState, Any]:
    """Run the supervised steps from `first_step` on; each lesson is made during the one before it.

    Returns:
      the trained state, and the position of the data after the last step.
    """
    config, lessons = school.config, school.lessons
    update = SftStep(
        policy=school.policy,
        optimizer=school.optimizer,
        micro_rows=config.sft.micro_rows,
        budgets=lessons.budgets,
        router_balance=config.model.router_balance,
    )
    compiled, rates = jax.jit(update, donate_argnums=0), learning_rates(config)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lessons.take, first_step)
        for step in range(first_step, config.steps):
            school.saver.between(step, state, position)
            clock = Clock()
            lesson = following.result()
            batches, position = to_mesh(lesson.batches, school.mesh), lesson.position
            clock.lap("time/data")
            if step + 1 < config.steps:
                following = pool.submit(lessons.take, step + 1)
            school.saver.begin_update()
            state, learned = compiled(state, batches)
            metrics = figures([learned])
            clock.lap("time/learn")
            record = metrics | lesson.figures | clock.figures() | standing(rates, step)
            school.log.step(step, record)
            stop_if_not_finite(record, step, config)
    return state, position
