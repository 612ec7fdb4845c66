"""The engine's thread: it owns the device, takes requests as they come into free rows, and gives
rows back at once when a request ends or its client goes away.

A request is a few programs (`rollout.tasks`): they open streams and yield what they wait for.
Unlike `rollout.tasks.Scheduler`, which runs a batch in an order that no thread can change, this
one takes and drops programs at any time, a failure ends one request alone, and nobody waits for the
host work of another. What is drawn is the same: it depends on a stream's seed and position only.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from evaluate.serving.errors import ApiError, broken, no_room, unavailable
from paravt_jax.records import Prompt, StopReason
from rollout.engine.automaton import NoRoom, TokenGrammar
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.engine.slots import Generated, StreamId, Written
from rollout.tasks import Generate, Given, Need, Parallel, Program, Shared, gather
from rollout.workers import Job

LOG = logging.getLogger(__name__)
POLL = 0.005
"""Seconds between looks at host work, while no row generates."""


@runtime_checkable
class Request(Protocol):
    """What the engine's thread asks of a request. All of it is called there."""

    def programs(self, lease: RowLease) -> Sequence[Program]:
        """The programs of this request, on rows of its own."""
        ...

    def grew(self, stream: StreamId, tokens: np.ndarray, lease: RowLease) -> bool:
        """A stream of the request has grown by these tokens; whether its turn is to end here."""
        ...

    def done(self, results: list[Any]) -> None:
        """All programs have ended."""
        ...

    def failed(self, error: ApiError) -> None:
        """The request has failed."""
        ...


class RowLease:
    """The session as one request sees it: what it opens is closed when the request goes."""

    def __init__(
        self, session: Session, request: Request, listed: bool, grammar: TokenGrammar | None
    ) -> None:
        self._session, self.request = session, request
        self._listed, self._grammar = listed, grammar
        self.streams: set[StreamId] = set()

    @property
    def generating(self) -> int:
        """Streams that generate, of any request."""
        return self._session.generating

    def open(self, pool: str, prompt: Prompt, seeds: Sequence[int]) -> list[StreamId]:
        """See `Session.open`."""
        streams = self._session.open(pool, prompt, seeds)
        self.streams.update(streams)
        return streams

    def generate(
        self, stream: StreamId, given: Given, sampling: SamplingConfig, max_tokens: int
    ) -> None:
        """See `Session.generate`.

        Raises:
          ApiError: grammars of other requests take all room for them.
        """
        own = self._listed, self._grammar
        try:
            self._session.generate(stream, given, sampling, max_tokens, *own)
        except NoRoom:
            raise no_room() from None

    def written(self, stream: StreamId) -> Written:
        """What a stream has generated of a turn that goes on."""
        return self._session.written(stream)

    def close(self, stream: StreamId) -> None:
        """See `Session.close`."""
        self.streams.discard(stream)
        self._session.close(stream)

    def step(self) -> Sequence[tuple[StreamId, Generated]]:
        """Requests do not step the engine: its thread does."""
        raise RuntimeError("the engine's thread steps the session")

    def release(self) -> None:
        """Give back all that is still open."""
        for stream in list(self.streams):
            self.close(stream)


@dataclasses.dataclass(eq=False)
class _LeasedProgram:
    """A program of a request, and who wants its result."""

    lease: RowLease
    program: Program
    deliver: Callable[[Any], None]


class Worker:
    """Runs requests on one session, in a thread of its own."""

    def __init__(self, open_session: Callable[[Callable[..., object]], Session]) -> None:
        """`open_session` takes what hears of the tokens of each step, see `Session`."""
        self._open = open_session
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._leases: dict[Request, RowLease] = {}
        self._generating: dict[StreamId, _LeasedProgram] = {}
        self._jobs: list[tuple[_LeasedProgram, Job]] = []
        self._grown: list[tuple[StreamId, np.ndarray]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._session: Session | None = None
        self.error: str | None = None
        """Why the engine does not work any more."""
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        """Steps of the engine so far, tokens that they drew, seconds that they took."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def submit(
        self, request: Request, listed: bool = False, grammar: TokenGrammar | None = None
    ) -> None:
        """Have a request run, from any thread. `listed`: its draws list their likeliest tokens.
        `grammar`: what each of its turns must obey."""
        if self.error is not None:
            raise unavailable(self.error)
        self._inbox.put(lambda: self._begin(request, listed, grammar))

    def cancel(self, request: Request) -> None:
        """Nobody wants the request any more: its rows are free before the next step."""
        self._inbox.put(lambda: self._drop(request))

    def close(self, seconds: float = 10.0) -> None:
        """End; what is under way is dropped."""
        self._inbox.put(None)
        self._thread.join(seconds)

    @property
    def busy(self) -> int:
        """Streams that generate or wait for a row."""
        return len(self._generating)

    @property
    def streams(self) -> int:
        """Streams that hold a row or wait for one."""
        return 0 if self._session is None else self._session.open_streams

    @property
    def requests(self) -> int:
        """Requests under way."""
        return len(self._leases)

    def _run(self) -> None:
        try:
            self._session = self._open(lambda stream, tokens: self._grown.append((stream, tokens)))
            while self._take():
                self._advance()
            error = "the server is going down"
        except Exception as failure:  # whatever it is, clients must not wait for ever
            LOG.exception("the engine has failed")
            error = f"the engine has failed ({type(failure).__name__}); the server's log says why"
        self.error = error
        for request in list(self._leases):
            request.failed(unavailable(error))
        self._leases.clear()

    def _take(self) -> bool:
        """What has come from other threads; with nothing to do, wait for it."""
        while True:
            idle = not self._generating
            try:
                if idle and self._jobs:
                    came = self._inbox.get(timeout=POLL)
                else:
                    came = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if came is None:
                return False
            came()

    def _advance(self) -> None:
        """Host work that is done, then a step of the engine."""
        ready = [pair for pair in self._jobs if pair[1].done()]
        self._jobs = [pair for pair in self._jobs if not pair[1].done()]
        for task, job in ready:
            error = job.exception()
            self._resume(task, None if error else job.result(), error)
        if self._generating:
            self._step()

    def _step(self) -> None:
        assert self._session is not None
        began = time.perf_counter()
        ended = self._session.step()
        self.seconds += time.perf_counter() - began
        self.steps += 1
        grown, self._grown = self._grown, []
        over = {stream for stream, _ in ended}
        for stream, tokens in grown:
            self.tokens += len(tokens)
            if (task := self._generating.get(stream)) is not None:
                self._tell(task, stream, tokens, stream in over)
        for stream, generated in ended:
            if (task := self._generating.pop(stream, None)) is not None:
                self._resume(task, generated)

    def _tell(self, task: _LeasedProgram, stream: StreamId, tokens: np.ndarray, over: bool) -> None:
        """Tell a request of its tokens; its turn ends where it says so."""
        lease = task.lease
        try:
            enough = lease.request.grew(stream, tokens, lease)
        except Exception as error:
            self._fail(lease, error)
            return
        if enough and not over:
            del self._generating[stream]
            written = lease.written(stream)
            reason = StopReason.STOP
            generated = Generated(
                written.tokens, written.log_probs, reason, alternatives=written.alternatives
            )
            self._resume(task, generated)

    def _begin(self, request: Request, listed: bool, grammar: TokenGrammar | None) -> None:
        assert self._session is not None
        lease = self._leases[request] = RowLease(self._session, request, listed, grammar)
        try:
            programs = request.programs(lease)
        except Exception as error:
            self._fail(lease, error)
            return
        self._side_by_side(lease, programs, lambda results: self._end(lease, results))

    def _end(self, lease: RowLease, results: list[Any]) -> None:
        if self._leases.pop(lease.request, None) is not None:
            lease.release()
            lease.request.done(results)

    def _drop(self, request: Request) -> None:
        """Forget a request and free its rows. One that has ended is forgotten already."""
        lease = self._leases.pop(request, None)
        if lease is None:
            return
        for stream in lease.streams:
            self._generating.pop(stream, None)
        self._jobs = [pair for pair in self._jobs if pair[0].lease is not lease]
        lease.release()

    def _fail(self, lease: RowLease, error: BaseException) -> None:
        if lease.request not in self._leases:
            return
        self._drop(lease.request)
        shown = error if isinstance(error, ApiError) else broken()
        if shown is not error:
            LOG.error("a request has failed", exc_info=error)
        lease.request.failed(shown)

    def _resume(
        self, task: _LeasedProgram, value: Any = None, error: BaseException | None = None
    ) -> None:
        """Give a program what it waited for, and see what it needs next."""
        try:
            need = task.program.send(value) if error is None else task.program.throw(error)
        except StopIteration as end:
            task.deliver(end.value)
            return
        except Exception as failure:
            self._fail(task.lease, failure)
            return
        try:
            self._await(task, need)
        except Exception as failure:
            self._fail(task.lease, failure)

    def _await(self, task: _LeasedProgram, need: Need) -> None:
        if isinstance(need, Generate):
            request = need.stream, need.given, need.sampling, need.max_tokens
            task.lease.generate(*request)
            self._generating[need.stream] = task
        elif isinstance(need, Parallel):
            self._side_by_side(
                task.lease, need.programs, lambda results: self._resume(task, results)
            )
        elif isinstance(need, Shared):
            # Within one request, which goes as a whole.
            if (program := need.ask(lambda result: self._resume(task, result))) is not None:
                self._resume(_LeasedProgram(task.lease, program, need.end))
        else:
            self._jobs.append((task, need))

    def _side_by_side(
        self, lease: RowLease, programs: Sequence[Program], deliver: Callable[[list[Any]], None]
    ) -> None:
        """Start all programs; deliver when the last has ended."""
        ended = gather(len(programs), deliver)
        for place, program in enumerate(programs):
            # One that fails takes its request along, and what is left of it must not begin.
            if lease.request in self._leases:
                self._resume(
                    _LeasedProgram(lease, program, lambda value, at=place: ended(at, value))
                )
