"""Settings of the `sft` stage."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from paravt_jax.marks import Mark
from paravt_jax.ranges import above, at_least, within
from paravt_jax.settings import Refused, Settings


@dataclasses.dataclass(frozen=True)
class SftPhase:
    """A stretch of supervised steps with one mix of tasks; the next phase ends it."""

    start: int
    """First step of the phase."""
    rows: dict[str, int]
    """Examples of each task in one step."""


@dataclasses.dataclass(frozen=True)
class TaskShape:
    """The static shape of one task's batches: a longer example is refused."""

    length: int
    """Tokens of a row."""
    learned: int
    """Most learned tokens of a row."""
    frames: int = 0
    """Frames of a row."""


@dataclasses.dataclass(frozen=True)
class PackSettings(Settings):
    """How conversations of `--data` are shown, learned and put into rows."""

    tokens: Annotated[int, at_least(1)] = 8192
    """Tokens of a row; longer conversations are skipped."""
    frames: Annotated[int, at_least(1)] = 160
    """Most frames of a row (pairs of them as a video): what the vision tower has room for."""
    rows: Annotated[int, at_least(1)] = 32
    """Rows of one step."""
    fit: Literal["first", "best"] = "first"
    """Which open row a conversation goes to: the `first` that has room, or the `best` filled."""
    # Of rows of 8,192 tokens 16 open ones use 0.95, 64 0.966, 128 0.97 (docs/log.md).
    bins: Annotated[int, at_least(1)] = 64
    """Rows open at a time: more are filled better, and hold more frames in memory."""
    fps: Annotated[float, above(0)] = 1.0
    """Frames shown per second of a video."""
    max_frames: Annotated[int, at_least(1)] = 64
    """Most frames shown of a video."""
    system: Literal["agent", "own"] = "agent"
    """What conversations begin with. `agent`: the system text and tools of rollouts, whatever
    system message they have. `own`: their system message, and no tools."""
    learn: Literal["assistant", "special"] = "assistant"
    """`assistant`: its text and end-of-turn tokens. `special`: every special token of all turns
    besides, as in ParaVT's release."""


@dataclasses.dataclass(frozen=True)
class SftSettings(Settings):
    """The supervised cold start: tasks of the needle world by a schedule, or packed conversations
    of `--data`."""

    phases: tuple[SftPhase, ...] = ()
    """Which tasks of the needle world are learned from which step on; none learns conversations."""
    tasks: dict[str, TaskShape] = dataclasses.field(default_factory=dict)
    """The static shape of each task's batches."""
    packing: PackSettings = PackSettings()
    micro_rows: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 8
    """Rows per gradient micro-batch."""
    task_masks: Annotated[float, within(0, 1)] = 0.0
    """Share of rows whose last answer does not see the overview and whose later calls do not see
    earlier clips (Video-o3's task-decoupled attention masks; its share is 0.1)."""
    mask_predictor: bool = True
    """Whether `task_masks` also act on the token that predicts the first word of an answer or a
    call. False, as in the source, lets the tag before it see the video: then one-letter answers are
    hardly masked."""

    def check_together(self) -> None:
        """Refuse rows that gradient micro-batches do not divide."""
        tasks = [task for phase in self.phases for task in phase.rows.items()]
        for task, rows in tasks:
            if rows > self.micro_rows and rows % self.micro_rows:
                raise Refused(
                    self,
                    "{micro_rows} does not divide the {rows} rows of task {task}; choose a divisor",
                    task=task,
                    rows=rows,
                )
        if not self.phases and self.packing.rows % self.micro_rows:
            raise Refused(self, "{micro_rows} does not divide {packing.rows}; choose a divisor")
