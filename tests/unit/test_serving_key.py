"""Who may ask a server that wants a key."""

import asyncio
import json

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from evaluate import serve
from evaluate.serving.app import Key


async def _open(_):
    return PlainTextResponse("open")


APP = Starlette(
    routes=[Route("/v1/models", _open), Route("/health", _open)],
    middleware=[Middleware(Key, key="secret")],
)


def get(path: str, *headers: tuple[bytes, bytes]) -> tuple[int, bytes]:
    """Status and body of an answer."""
    sent = []
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    asyncio.run(APP(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize("sent", [None, b"secret", b"Bearer", b"Bearer other", b"Bearer secrets"])
def test_nobody_without_the_key(sent):
    status, body = get("/v1/models", *([(b"authorization", sent)] if sent else []))
    assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"


def test_with_the_key_and_where_none_is_wanted():
    assert get("/v1/models", (b"authorization", b"Bearer secret")) == (200, b"open")
    assert get("/health") == (200, b"open")


def test_a_variable_that_holds_no_key_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("EMPTY_KEY", "")
    for name in ("EMPTY_KEY", "NO_SUCH_KEY"):
        with pytest.raises(SystemExit):
            serve.main(["--key-variable", name])
        assert f"--key-variable {name}" in capsys.readouterr().err
