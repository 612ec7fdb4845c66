"""Programs that wait for a decode session and for host work, and the scheduler that drives them.

A program is a generator. It yields what it waits for and is resumed with the result:

    generated = yield Speak(stream, given, sampling, limit)     a turn of a stream
    result = yield job                                          work of a host thread
    results = yield Together([program, ...])                    programs side by side

The order of everything depends on the session alone, never on the speed of threads: a job that
was asked for after a visit runs during the next one, and is waited for when that one is over.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, runtime_checkable

from paravt_jax.records import Prompt
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Generated, Stream
from rollout.workers import Job

Given = Sequence[int] | Prompt
"""What is appended to a stream that its policy did not generate."""


@dataclasses.dataclass(frozen=True)
class Speak:
    """Append `given` to a stream and let it generate one turn; gives `Generated`."""

    stream: Stream
    given: Given
    sampling: SamplingConfig
    limit: int
    """Most tokens of the turn."""


@dataclasses.dataclass(frozen=True)
class Together:
    """Run programs side by side; gives their results, in their order."""

    programs: Sequence[Program]


Need = Speak | Job | Together
Program = Generator[Need, Any, Any]

Agree = Callable[[list[Exception | None]], list[Exception | None]]
"""Makes of the faults of jobs on this host those that count on every host."""


@runtime_checkable
class DecodeSession(Protocol):
    """What the agent needs of a session of the engine."""

    @property
    def speaking(self) -> int:
        """Streams that were told to speak and have not ended their turn."""
        ...

    def open(self, lane: str, prompt: Prompt, seeds: Sequence[int]) -> list[Stream]:
        """Streams that share one prompt, one per seed; they wait while the lane is full."""
        ...

    def speak(self, stream: Stream, given: Given, sampling: SamplingConfig, limit: int) -> None:
        """Append, then generate one turn."""
        ...

    def close(self, stream: Stream) -> None:
        """Leave the stream's place to others."""
        ...

    def visit(self) -> Sequence[tuple[Stream, Generated]]:
        """Decode a while; the turns that ended."""
        ...


class _Task:
    """A program, and who wants its result."""

    def __init__(self, program: Program, deliver: Callable[[Any], None]) -> None:
        self.program, self.deliver = program, deliver


class Scheduler:
    """Drives programs over one session until all of them have ended."""

    def __init__(
        self,
        session: DecodeSession,
        agree: Agree = list,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """`between` is called before each visit of the device, and may raise to give up all."""
        self._session, self._agree, self._between = session, agree, between
        self._speakers: dict[Stream, _Task] = {}
        self._waiting: list[tuple[_Task, Job]] = []
        self.visits = 0
        """How often the device was visited."""
        self.waited = 0.0
        """Seconds in which nothing was decoded because host work was not done."""

    def run(self, programs: Sequence[Program]) -> list[Any]:
        """Results of all programs, in their order."""
        results: list[Any] = []
        self._side_by_side(programs, results.extend)
        while self._speakers or self._waiting:
            due, self._waiting = self._waiting, []
            if self._session.speaking:
                self._visit()
            else:
                assert due, "a stream that was told to speak has been lost"
            if due:
                self._finish(due)
        return results

    def _visit(self) -> None:
        self._between()
        self.visits += 1
        for stream, generated in self._session.visit():
            self._resume(self._speakers.pop(stream), generated)

    def _finish(self, due: Sequence[tuple[_Task, Job]]) -> None:
        """Wait for jobs, and give their outcomes to the programs."""
        began = time.perf_counter()
        outcomes = [_outcome(job) for _, job in due]
        self.waited += time.perf_counter() - began
        faults = self._agree([fault for _, fault in outcomes])
        for (task, _), (value, _), fault in zip(due, outcomes, faults, strict=True):
            self._resume(task, value, fault)

    def _resume(self, task: _Task, value: Any = None, fault: Exception | None = None) -> None:
        """Give a program what it waited for, and see what it needs next."""
        try:
            need = task.program.send(value) if fault is None else task.program.throw(fault)
        except StopIteration as end:
            task.deliver(end.value)
            return
        if isinstance(need, Speak):
            self._session.speak(need.stream, need.given, need.sampling, need.limit)
            self._speakers[need.stream] = task
        elif isinstance(need, Together):
            self._side_by_side(need.programs, lambda results: self._resume(task, results))
        else:
            self._waiting.append((task, need))

    def _side_by_side(
        self, programs: Sequence[Program], deliver: Callable[[list[Any]], None]
    ) -> None:
        """Start all programs; deliver when the last has ended."""
        results: list[Any] = [None] * len(programs)
        left = len(programs)

        def ended(place: int, value: Any) -> None:
            nonlocal left
            results[place] = value
            left -= 1
            if not left:
                deliver(results)

        if not programs:
            deliver(results)
        for place, program in enumerate(programs):
            self._resume(_Task(program, lambda value, at=place: ended(at, value)))


def _outcome(job: Job) -> tuple[Any, Exception | None]:
    """What a job gave, or why it failed."""
    try:
        return job.result(), None
    except Exception as error:
        return None, error
