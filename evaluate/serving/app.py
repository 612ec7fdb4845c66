"""The server's addresses: `/v1/chat/completions`, `/v1/models`, `/health`, `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from evaluate.serving.active import GONE, ActiveRequest
from evaluate.serving.answers import Shape
from evaluate.serving.completions import Answered, Ended
from evaluate.serving.errors import ApiError, broken, busy, out_of_time, unknown_client
from evaluate.serving.metrics import Metrics
from evaluate.serving.schemas import parse
from evaluate.serving.service import Service

LOG = logging.getLogger(__name__)
THREADS = 4
"""That open media and write prompts."""
SLACK = 5.0
"""Seconds beyond the time limit after which a client that does not read is left."""


class Api:
    """Answers requests on a service."""

    def __init__(self, service: Service) -> None:
        self._service, self.metrics = service, Metrics(service.worker)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="media")
        self._inside = 0
        self.seconds = service.limits.seconds
        """Longest that a request may take."""

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """From the first request to the last."""
        self._service.worker.start()
        yield
        self._threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._service.close)

    async def chat(self, http: Request) -> Response:
        """`POST /v1/chat/completions`"""
        active = self._admit()
        try:
            request = parse(await self._body(http))
            prepared = await active.prepare(http, request)
            shape = Shape(request, prepared, self._service.name)
            self.metrics.prompt_tokens.inc(prepared.prompt_tokens)
            active.start()
            if request.stream:
                return EventStream(self, active, shape)
            body, tokens = shape.whole([event async for event in active.events()])
            self.metrics.completion_tokens.inc(tokens)
            self.left(active, 200)
            return JSONResponse(body)
        except ApiError as error:
            self.left(active, error.status)
            raise
        except BaseException as error:
            self.left(active, GONE if isinstance(error, ClientDisconnect) else 500)
            raise

    def left(self, active: ActiveRequest, status: int) -> None:
        """A request is over."""
        if not active.closed:
            self._inside -= 1
            active.close(status)

    async def models(self, http: Request) -> Response:
        """`GET /v1/models` and `GET /v1/models/NAME`"""
        own = self._service
        model = {"id": own.name, "object": "model", "created": own.created, "owned_by": "paravt"}
        model["max_model_len"] = own.limits.prompt_tokens + own.limits.max_tokens
        name = http.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != own.name:
            raise ApiError(f"there is no model {name!r} here", "model", status=404)
        return JSONResponse(model)

    async def health(self, _: Request) -> Response:
        """`GET /health`"""
        worker = self._service.worker
        status = {"status": "ok", "rows_busy": worker.busy, "requests": self._inside}
        if worker.error is not None:
            return JSONResponse({"status": "failed", "error": worker.error}, 503)
        return JSONResponse(status)

    async def prometheus(self, _: Request) -> Response:
        """`GET /metrics`"""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _admit(self) -> ActiveRequest:
        """A request, if there is room for one more."""
        limits = self._service.limits
        if self._inside >= limits.requests:
            waits = self.metrics.mean_seconds * self._inside / limits.rows
            self.metrics.requests.labels(429).inc()
            raise busy(self._inside, min(max(math.ceil(waits), 1), 60))
        self._inside += 1
        return ActiveRequest(self._service, self._threads, self.metrics)

    async def _body(self, http: Request) -> bytes:
        most = self._service.limits.body_bytes
        declared = http.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in http.stream():
                    body += chunk
                    if len(body) > most:
                        raise _too_large(most)
        except TimeoutError:
            raise out_of_time(self.seconds) from None
        return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(
        f"the body is larger than {most} bytes (--max-body-mib); send fewer or smaller media, or "
        "files below the media root",
        status=413,
        code="body_too_large",
    )


class EventStream(Response):
    """An answer in pieces, as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, api: Api, active: ActiveRequest, shape: Shape) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._api, self._active, self._shape = api, active, shape
        self._status = GONE
        self._tokens = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it while it comes; the row is free when the client goes."""
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with asyncio.timeout(self._api.seconds + SLACK):
                await send(head)
                async for data in self._told():
                    body = f"data: {data}\n\n".encode()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (TimeoutError, OSError):
            LOG.info("a client of a stream has gone or does not read")
        finally:
            self._api.metrics.completion_tokens.inc(self._tokens)
            self._api.left(self._active, self._status)

    async def _told(self) -> AsyncIterator[str]:
        for chunk in self._shape.opening():
            yield json.dumps(chunk)
        first = True
        try:
            async for event in self._active.events():
                if first:
                    self._api.metrics.first.observe(self._active.seconds)
                    first = False
                if isinstance(event, Ended):
                    self._tokens += len(event.finished.tokens)
                if isinstance(event, Answered):
                    tokens = event.answer.tokens
                    self._tokens += tokens["generated"] + tokens["subagents"]
                for chunk in self._shape.chunks(event):
                    yield json.dumps(chunk)
        except ApiError as error:
            self._status = error.status
            yield json.dumps(error.body)
            return
        for chunk in self._shape.last(self._tokens):
            yield json.dumps(chunk)
        self._status = 200
        yield "[DONE]"


class Key:
    """Lets nobody without the key in below `/v1`, before a body is read. `/health` and `/metrics`
    are for those who watch the server."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            sent = dict(scope["headers"]).get(b"authorization", b"")
            # In constant time: how long a refusal takes must not tell how much was right.
            if not hmac.compare_digest(sent, self._expected):
                error = unknown_client()
                return await JSONResponse(error.body, error.status)(scope, receive, send)
        await self._app(scope, receive, send)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _no_such(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {404: "no such address", 405: "no such method here"}.get(error.status_code)
    return JSONResponse(ApiError(words or error.detail).body, error.status_code, error.headers)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse(broken().body, 500)


def make_app(service: Service, key: str | None = None) -> Starlette:
    """The ASGI application of a service. It starts the engine's thread and ends it.

    Args:
      key: what clients must send; None asks for none.
    """
    api = Api(service)
    handlers: dict[Any, Any] = {
        ApiError: _refused,
        HTTPException: _no_such,
        ClientDisconnect: _gone,
        Exception: _broken,
    }
    routes = [
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.models),
        Route("/health", api.health),
        Route("/metrics", api.prometheus),
    ]
    guards = [] if key is None else [Middleware(Key, key=key)]
    return Starlette(
        routes=routes, exception_handlers=handlers, lifespan=api.lifespan, middleware=guards
    )
