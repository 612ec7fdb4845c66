"""The OpenAI-compatible server without sockets, around a tiny model, and clients that ask it."""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import io
import json
import time

import httpx2
import jax
import numpy as np
from openai import AsyncOpenAI
from PIL import Image

from evaluate.model import Opened, settings_of
from evaluate.serving.app import make_app
from evaluate.serving.limits import Limits
from evaluate.serving.service import Service
from models import open_policy
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from tests.support.tiny_models import NEEDLE_MODEL
from train.setup import Parts

ROWS = 4


def picture(colour=(200, 30, 30)) -> str:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


RED = picture()
PLAIN = {"model": "needle", "messages": [{"role": "user", "content": "?"}], "max_tokens": 4}
"""A request, as JSON."""


class Server:
    """A server without sockets, and clients that ask it."""

    def __init__(self, model, root, warm: bool = False, **limits) -> None:
        self.model = model
        own = {"rows": ROWS, "queue": 12, "max_tokens": 96, "prompt_tokens": 768} | limits
        self.service = Service(model, Limits(media_root=root, **own), "needle")
        self.compiled = self.service.warm_up() if warm else 0
        self.app = make_app(self.service)
        self.service.worker.start()

    def together(self, *requests, **more):
        """Answers to requests that are sent at once, errors among them."""

        async def ask():
            transport = httpx2.ASGITransport(self.app)
            async with (
                httpx2.AsyncClient(transport=transport) as http,
                AsyncOpenAI(
                    base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
                ) as client,
            ):
                own = [_own(client, {**request, **more}) for request in requests]
                return await asyncio.gather(*own, return_exceptions=True)

        return asyncio.run(ask())

    def __call__(self, content, **more):
        (answer,) = self.together(asking(content, **more))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def raw(self, method: str, path: str, body: bytes = b"") -> httpx2.Response:
        async def ask():
            transport = httpx2.ASGITransport(self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
                return await http.request(method, path, content=body)

        return asyncio.run(ask())

    def idle(self) -> bool:
        """Whether all rows are free, as soon as the engine has looked."""
        worker = self.service.worker
        for _ in range(400):
            if not worker.requests and not worker.busy and not worker.streams:
                return True
            time.sleep(0.01)
        return False


async def _own(client, request):
    answer = await client.chat.completions.create(model="needle", **request)
    if not request.get("stream"):
        return answer
    return [chunk async for chunk in answer]


def asking(content, **more) -> dict:
    extra = {name: more.pop(name) for name in list(more) if name in EXTRA}
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    more = {"max_tokens": 24, "temperature": 0, **more}
    return {"messages": messages, "extra_body": extra, **more}


EXTRA = ("agent", "top_k", "min_p", "return_token_ids", "media_io_kwargs", "mm_processor_kwargs")


def seeing(text: str, *urls: str) -> list[dict]:
    """A message of the user with images or videos before its text."""
    parts = [
        {"type": kind, kind: {"url": url}}
        for url in urls
        for kind in ["image_url" if url.startswith("data:image") else "video_url"]
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def tiny_model() -> Opened:
    """The needle model's tokenizer and settings, and fresh weights of a smaller one that has
    opinions."""
    config = settings_of(None)
    small = copy.deepcopy(NEEDLE_MODEL)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.3}
    small["text_config"] |= sizes | {"num_hidden_layers": 1}
    small["vision_config"] |= sizes | {"depth": 1, "num_heads": 2, "out_hidden_size": 32}
    policy, mesh = open_policy(small), make_mesh(parse_mesh(None, 1), jax.devices()[:1])
    agents = dataclasses.replace(Parts(config).agents, policy=policy)
    return Opened(config, agents, initialise(policy.table, jax.random.key(0), mesh), mesh)


async def visit(server, body: dict, seconds: float) -> None:
    """Send a request and hang up after so long."""
    told = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

    async def receive():
        if (first := next(told, None)) is not None:
            return first
        await asyncio.sleep(seconds)
        return {"type": "http.disconnect"}

    async def send(_):
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    scope |= {"query_string": b"", "asgi": {"spec_version": "2.3"}, "http_version": "1.1"}
    await server.app(scope, receive, send)
