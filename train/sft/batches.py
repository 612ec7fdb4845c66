"""What the `sft` stage learns in each step: tasks by a schedule, or packed conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from paravt_jax.records import Example, LearnerBatch, Pack
from pipelines.loader import StepStream
from pipelines.packing import UnusableCount, conversations_in, fill
from train.batch import learner_batch, packed_batch, streams_of_examples
from train.sft.masking import TaskMasking
from train.sft.settings import PackSettings, SftPhase, SftSettings

PACKS = "packs"
"""Name of the only task of a run on conversations."""


class StepData(NamedTuple):
    """One step's worth of examples."""

    batches: dict[str, LearnerBatch]
    """By task."""
    metrics: dict[str, float]
    """For `metrics.jsonl`."""
    position: Any
    """Where the data stands after this step, as JSON; None if the step's number says it."""


@runtime_checkable
class SftData(Protocol):
    """Where the data of each step comes from."""

    @property
    def budgets(self) -> Mapping[str, int]:
        """Most learned tokens of a row, by task."""
        ...

    def take(self, step: int) -> StepData:
        """The data of a step; called once for each, in order."""
        ...


@runtime_checkable
class Examples(Protocol):
    """Endless supervised examples of one task; element i is always the same."""

    def __getitem__(self, index: int, /) -> Example: ...


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A schedule of task mixes. What a step takes depends on the step alone, so a run resumes."""

    settings: SftSettings
    sources: Mapping[str, Examples]
    """Examples by task."""
    pad_id: int
    masking: TaskMasking | None = None
    """Hides from some rows what their task does not need."""

    @property
    def budgets(self) -> dict[str, int]:
        """See `SftData`."""
        return {task: shape.learned for task, shape in self.settings.tasks.items()}

    def take(self, step: int) -> StepData:
        """See `SftData`."""
        phases = self.settings.phases
        batches = {
            task: self._batch(task, examples_before(phases, step, task), rows)
            for task, rows in phase_at(phases, step).rows.items()
        }
        return StepData(batches, {}, None)

    def _batch(self, task: str, start: int, rows: int) -> LearnerBatch:
        shape = self.settings.tasks[task]
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


@dataclasses.dataclass(frozen=True)
class PackedData:
    """Packed conversations, in the order of their stream."""

    settings: PackSettings
    stream: StepStream[Pack]
    skips: UnusableCount
    pad_id: int
    frame_patches: int
    """Patches of the largest frame."""
    total: int
    """Conversations of the data set."""
    work: Callable[[], Mapping[str, float]] = dict
    """What hosts read and made since this was last asked."""

    @property
    def budgets(self) -> dict[str, int]:
        """See `SftData`. All tokens of a row might be learned."""
        return {PACKS: self.settings.tokens}

    def take(self, step: int) -> StepData:
        """See `SftData`."""
        packs = next(self.stream)
        batch = packed_batch(
            packs,
            length=self.settings.tokens,
            pad_id=self.pad_id,
            frames=self.settings.frames,
            frame_patches=self.frame_patches,
        )
        metrics = {
            "data/epoch": max(item.drawn for item in packs) / self.total,
            "data/fill": fill(packs, self.settings.tokens),
            "data/conversations": float(conversations_in(packs)),
            "data/skipped": float(self.skips.skipped),
            **self.work(),
        }
        return StepData({PACKS: batch}, metrics, self.stream.get_state())


def phase_at(phases: Sequence[SftPhase], step: int) -> SftPhase:
    """The phase that a step belongs to: the last one that has begun."""
    return [phase for phase in phases if phase.start <= step][-1]


def examples_before(phases: Sequence[SftPhase], step: int, task: str) -> int:
    """How many examples of a task the steps before this one took."""
    return sum(phase_at(phases, earlier).rows.get(task, 0) for earlier in range(step))
