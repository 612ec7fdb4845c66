"""Programs that wait for a decode session and for host work, and the scheduler that drives them.

A program is a generator. It yields what it waits for and is resumed with the result:

    generated = yield Generate(stream, given, sampling, max_tokens)    a turn of a stream
    result = yield job                                                 work of a host thread
    results = yield Parallel([program, ...])                           programs side by side
    result = yield shared                                              a program that others share

The order of everything depends on the session alone, never on the speed of threads: a job that
was submitted after a step of the session runs during the next one, and is waited for when that
one is over.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from paravt_jax.records import Prompt
from rollout.engine.sampler import SamplingConfig
from rollout.engine.slots import Generated, StreamId
from rollout.workers import Job

Given = Sequence[int] | Prompt
"""What is appended to a stream that its policy did not generate."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Append `given` to a stream and let it generate one turn; gives `Generated`."""

    stream: StreamId
    given: Given
    sampling: SamplingConfig
    max_tokens: int
    """Most tokens of the turn."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Run programs side by side; gives their results, in their order."""

    programs: Sequence[Program]


class Shared:
    """A program that runs once for all who yield this: the first one starts it, and whoever comes
    later gets the same result, also after it has ended."""

    def __init__(self, program: Program) -> None:
        self._program: Program | None = program
        self._waiting: list[Callable[[Any], None]] = []
        self._results: list[Any] = []

    def ask(self, deliver: Callable[[Any], None]) -> Program | None:
        """Deliver the result as soon as there is one; the program, if it has to be started."""
        if self._results:
            deliver(self._results[0])
        else:
            self._waiting.append(deliver)
        program, self._program = self._program, None
        return program

    def end(self, result: Any) -> None:
        """The program has ended."""
        self._results.append(result)
        waiting, self._waiting = self._waiting, []
        for deliver in waiting:
            deliver(result)


Need = Generate | Job | Parallel | Shared
Program = Generator[Need, Any, Any]
Feed = Callable[[bool], Program | None]
"""The next program. Told to wait, it gives None when there is no more; otherwise also when none is
ready yet."""


@runtime_checkable
class EngineSession(Protocol):
    """What the agent needs of a session of the engine."""

    @property
    def generating(self) -> int:
        """Streams that are to generate and have not ended their turn."""
        ...

    def open(self, pool: str, prompt: Prompt, seeds: Sequence[int]) -> list[StreamId]:
        """Streams that share one prompt, one per seed; they wait while the pool is full."""
        ...

    def generate(
        self, stream: StreamId, given: Given, sampling: SamplingConfig, max_tokens: int
    ) -> None:
        """Append, then generate one turn."""
        ...

    def close(self, stream: StreamId) -> None:
        """Free the stream's slot."""
        ...

    def step(self) -> Sequence[tuple[StreamId, Generated]]:
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
        session: EngineSession,
        before_step: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_step` is called before each step of the session, and may raise to give up all."""
        self._session, self._before_step = session, before_step
        self._generating: dict[StreamId, _Task] = {}
        self._waiting: list[tuple[_Task, Job]] = []
        self.steps = 0
        """Steps of the session so far."""
        self.wait_seconds = 0.0
        """Seconds in which nothing was decoded because host work was not done."""
        self.shared = 0
        """How often somebody got the result of a program that was begun for others."""

    def run(self, programs: Sequence[Program]) -> list[Any]:
        """Results of all programs, in their order."""
        results: list[Any] = []
        self._side_by_side(programs, results.extend)
        while self._generating or self._waiting:
            self._advance()
        return results

    def stream(self, feed: Feed, most: int) -> Iterator[Any]:
        """Results of programs in the order in which they end, at most `most` under way at a time:
        as one ends, the next begins beside the others."""
        ended: collections.deque[Any] = collections.deque()
        under_way = 0
        while True:
            while under_way < most and (program := feed(not under_way)) is not None:
                under_way += 1
                self._resume(_Task(program, ended.append))
            if not under_way:
                return
            if not ended:
                self._advance()
            while ended:
                under_way -= 1
                yield ended.popleft()

    def _advance(self) -> None:
        """One step of the session, and the jobs that were waited for before it."""
        # Jobs get one step of the engine to be done in, and are then waited for. Whether one
        # happens to be done earlier must not decide before which step its program goes on.
        due, self._waiting = self._waiting, []
        if self._session.generating:
            self._step()
        else:
            assert due, "a stream that is to generate has been lost"
        if due:
            self._finish(due)

    def _step(self) -> None:
        self._before_step()
        self.steps += 1
        for stream, generated in self._session.step():
            self._resume(self._generating.pop(stream), generated)

    def _finish(self, due: Sequence[tuple[_Task, Job]]) -> None:
        """Wait for jobs, and give their outcomes to the programs."""
        began = time.perf_counter()
        outcomes = [_outcome(job) for _, job in due]
        self.wait_seconds += time.perf_counter() - began
        # Programs are resumed in the order in which jobs were submitted, whichever was done first:
        # hosts must open streams in the same order, or their slots and caches differ.
        for (task, _), (value, error) in zip(due, outcomes, strict=True):
            self._resume(task, value, error)

    def _resume(self, task: _Task, value: Any = None, error: Exception | None = None) -> None:
        """Give a program what it waited for, and see what it needs next."""
        try:
            need = task.program.send(value) if error is None else task.program.throw(error)
        except StopIteration as end:
            task.deliver(end.value)
            return
        if isinstance(need, Generate):
            self._session.generate(need.stream, need.given, need.sampling, need.max_tokens)
            self._generating[need.stream] = task
        elif isinstance(need, Parallel):
            self._side_by_side(need.programs, lambda results: self._resume(task, results))
        elif isinstance(need, Shared):
            self._share(need, task)
        else:
            self._waiting.append((task, need))

    def _share(self, shared: Shared, task: _Task) -> None:
        program = shared.ask(lambda result: self._resume(task, result))
        if program is None:
            self.shared += 1
        else:
            self._resume(_Task(program, shared.end))

    def _side_by_side(
        self, programs: Sequence[Program], deliver: Callable[[list[Any]], None]
    ) -> None:
        """Start all programs; deliver when the last has ended."""
        ended = gather(len(programs), deliver)
        for place, program in enumerate(programs):
            self._resume(_Task(program, lambda value, at=place: ended(at, value)))


def _outcome(job: Job) -> tuple[Any, Exception | None]:
    """What a job gave, or why it failed."""
    try:
        return job.result(), None
    except Exception as error:
        return None, error


def gather(count: int, deliver: Callable[[list[Any]], None]) -> Callable[[int, Any], None]:
    """What takes the result of each of so many programs, by its place, and delivers all of them
    with the last; at once where there are none."""
    results: list[Any] = [None] * count
    left = count

    def ended(place: int, value: Any) -> None:
        nonlocal left
        results[place] = value
        left -= 1
        if not left:
            deliver(results)

    if not count:
        deliver(results)
    return ended
