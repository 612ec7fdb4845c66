"""The `sft` stage: supervised steps on a schedule of task mixes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh

from paravt_jax.interfaces import TrainablePolicy
from paravt_jax.records import Example, LearnerBatch
from train.batch import learner_batch, streams_of_examples
from train.checkpoint import Checkpoints
from train.config import Config, SftPhase
from train.layout import to_mesh
from train.learner import figures
from train.loop import Clock, stop_if_not_finite
from train.masking import TaskMasking
from train.output import RunLog
from train.state import TrainState
from train.step import SftStep


@runtime_checkable
class Examples(Protocol):
    """Endless supervised examples of one task; element i is always the same."""

    def __getitem__(self, index: int, /) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Lessons:
    """What the stage works with; `train.run` puts it together."""

    config: Config
    sources: Mapping[str, Examples]
    """Examples by task."""
    policy: TrainablePolicy
    optimizer: optax.GradientTransformation
    mesh: Mesh
    pad_id: int
    checkpoints: Checkpoints
    log: RunLog
    masking: TaskMasking | None = None
    """Hides from some rows what their task does not need."""

    def batches(self, step: int) -> dict[str, LearnerBatch]:
        """The examples of a step, by task. They depend on the step alone, so a run resumes."""
        phases = self.config.sft.phases
        return {
            task: self._batch(task, examples_before(phases, step, task), rows)
            for task, rows in phase_at(phases, step).rows.items()
        }

    def _batch(self, task: str, start: int, rows: int) -> LearnerBatch:
        shape = self.config.sft.tasks[task]
        examples = [self.sources[task][index] for index in range(start, start + rows)]
        learned = max(int((example.weights > 0).sum()) for example in examples)
        if learned > shape.learned:
            raise ValueError(
                f"an example of task {task} has {learned} learned tokens, above the "
                f"{shape.learned} of sft.tasks; raise it"
            )
        streams = streams_of_examples(examples)
        batch = learner_batch(streams, length=shape.length, pad_id=self.pad_id, frames=shape.frames)
        if self.masking is None:
            return batch
        return self.masking(batch, streams, (sorted(self.sources).index(task), start))


def phase_at(phases: Sequence[SftPhase], step: int) -> SftPhase:
    """The phase that a step belongs to: the last one that has begun."""
    return [phase for phase in phases if phase.start <= step][-1]


def examples_before(phases: Sequence[SftPhase], step: int, task: str) -> int:
    """How many examples of a task the steps before this one took."""
    return sum(phase_at(phases, earlier).rows.get(task, 0) for earlier in range(step))


def cold_start(lessons: Lessons, state: TrainState, first_step: int) -> TrainState:
    """Run the supervised steps from `first_step` on; each step's examples are made during the
    one before it."""
    config = lessons.config
    update = SftStep(
        policy=lessons.policy,
        optimizer=lessons.optimizer,
        micro_rows=config.sft.micro_rows,
        budgets={task: shape.learned for task, shape in config.sft.tasks.items()},
        router_balance=config.model.router_balance,
    )
    compiled = jax.jit(update, donate_argnums=0)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lessons.batches, first_step)
        for step in range(first_step, config.steps):
            clock = Clock()
            batches = to_mesh(following.result(), lessons.mesh)
            clock.lap("time/data")
            following = pool.submit(lessons.batches, step + 1)
            state, learned = compiled(state, batches)
            metrics = figures([learned])
            clock.lap("time/learn")
            record = metrics | clock.figures()
            lessons.log.step(step, record)
            stop_if_not_finite(record, step)
            lessons.checkpoints.maybe_save(step + 1, state, None)
    return state
