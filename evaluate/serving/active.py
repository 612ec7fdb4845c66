"""One request on its way through the server: admitted, prepared, run, heard, and out again."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request

from evaluate.serving.completions import Done, Event
from evaluate.serving.errors import ApiError, out_of_time
from evaluate.serving.metrics import Metrics
from evaluate.serving.schemas import ChatRequest
from evaluate.serving.service import Prepared, Service

GONE = 499
"""Status of a request whose client went away, as nginx logs it. Nobody reads it."""


class ActiveRequest:
    """A request from when it is admitted until its rows are free. All but `emit` is called in the
    event loop."""

    def __init__(self, service: Service, threads: ThreadPoolExecutor, metrics: Metrics) -> None:
        self._service, self._threads, self._metrics = service, threads, metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._prepared: Prepared | None = None
        self._listening: asyncio.Task[None] | None = None
        self.closed = False
        self._began = time.perf_counter()
        seconds = service.limits.seconds
        self._timer = self._loop.call_later(seconds, self._fail, out_of_time(seconds))
        metrics.open.inc()

    def emit(self, event: Event) -> None:
        """Tell an event, from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def prepare(self, http: Request, request: ChatRequest) -> Prepared:
        """Open media and write the prompt, while the client is listened to.

        Raises:
          ApiError: the request cannot be run, takes too long, or its client has gone.
        """
        self._listening = asyncio.create_task(self._until_gone(http))
        work = self._loop.run_in_executor(self._threads, self._service.prepare, request, self.emit)
        ended = asyncio.ensure_future(self._events.get())
        await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            # The thread goes on; what it opens is closed when it is done.
            work.add_done_callback(_closed_when_done)
            error = ended.result()
            assert isinstance(error, ApiError)
            raise error
        ended.cancel()
        self._prepared = work.result()
        return self._prepared

    def start(self) -> None:
        """Hand it to the engine."""
        assert self._prepared is not None
        own = self._prepared
        self._service.worker.submit(own.request, own.listed, own.grammar)

    async def events(self) -> AsyncIterator[Event]:
        """What happens, up to the end.

        Raises:
          ApiError: it has failed, takes too long, or its client has gone.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Done):
                return
            yield event

    @property
    def seconds(self) -> float:
        """Since it was admitted."""
        return time.perf_counter() - self._began

    def close(self, status: int) -> None:
        """It is over: its rows are free before the engine's next step."""
        self.closed = True
        self._timer.cancel()
        if self._listening is not None:
            self._listening.cancel()
        if self._prepared is not None:
            self._service.worker.cancel(self._prepared.request)
            self._prepared.close()
        self._metrics.open.dec()
        self._metrics.requests.labels(status).inc()
        self._metrics.gone.inc(status == GONE)
        if status == 200:
            self._metrics.seconds.observe(self.seconds)

    def _fail(self, error: ApiError) -> None:
        self._events.put_nowait(error)

    async def _until_gone(self, http: Request) -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        self._fail(ApiError("the client has gone", status=GONE))


def _closed_when_done(work: asyncio.Future[Prepared]) -> None:
    if not work.cancelled() and work.exception() is None:
        work.result().close()
