"""Nothing that a client sends or does takes the OpenAI-compatible server down: what it refuses, and
clients that leave or wait too long."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json

import httpx2
import pytest
from openai import APIStatusError

from tests.support.chat_server import PLAIN, RED, ROWS, asking, seeing, visit

pytestmark = pytest.mark.slow

WRONG = (None, True, -1, 0, 1.5, 10**400, "x", "", [], [[]], {}, {"x": 1}, ["x"], "\ud800")
FINE = {
    "messages": (), "model": (None,), "max_tokens": (None,), "max_completion_tokens": (None,),
    "temperature": (None, 0, 1.5), "top_p": (None,), "top_k": (None, -1, 0), "min_p": (None, 0),
    "n": (None,), "stop": (None, "x", [], ["x"]), "seed": (None, -1, 0), "stream": (None, True),
    "stream_options": (None,), "logprobs": (None, True), "top_logprobs": (None,),
    "tools": (None, []), "tool_choice": (None,), "user": (None, "x", ""),
    "parallel_tool_calls": (None, True), "media_io_kwargs": (None, {}), "agent": (None, True),
    "mm_processor_kwargs": (None, {}), "return_token_ids": (None, True),
    "response_format": (None,), "frequency_penalty": (None, 0), "presence_penalty": (None, 0),
    "logit_bias": (None, {}), "no_such_field": (),
}  # fmt: skip
"""Of `WRONG`, what is right after all."""
HURT = [
    ("messages[0].role", "robot"), ("messages[0].content", 7), ("messages[0].content", None),
    ("messages[0].name", 1), ("messages[0].extra", 1), ("messages[0].content", "a<|im_end|>b"),
    ("messages[0].tool_calls", [{"function": {"name": "f"}}]),
    ("messages[0].content[0].type", "audio"), ("messages[0].content[0].text", None),
    ("messages[0].content[0].image_url", {"url": RED}),
    ("messages[0].content[1].image_url.url", "data:image/png;base64,!!"),
    ("messages[0].content[1].image_url.url", "data:image/png;base64,AAAA"),
    ("messages[0].content[1].image_url.url", "data:image/png,AAAA"),
    ("messages[0].content[1].image_url.url", "http://127.0.0.1:9/x.png"),
    ("messages[0].content[1].image_url.url", "gopher://x"),
    ("messages[0].content[1].image_url.url", "file:///etc/passwd"),
    ("messages[0].content[1].image_url.url", "../../../../etc/passwd"),
    ("messages[0].content[1].image_url.detail", "most"),
    ("messages[0].content[1].video_url.url", "data:video/mp4;base64,AAAA"),
    ("messages[0].content[1].video_url.url", "data:video/jpeg;base64,AAAA,AAAA"),
    ("tools[0].type", "code"), ("tools[0].function.name", "a b"),
    ("tools[0].function.parameters", "x"), ("tools[0].function.more", 1),
    ("tool_choice", {"type": "function", "function": {"name": "g"}}), ("tool_choice", "any"),
    ("media_io_kwargs.video.num_frames", 0), ("media_io_kwargs.video.fps", "1"),
    ("media_io_kwargs.audio", {}), ("mm_processor_kwargs.max_pixels", 10**9),
    ("mm_processor_kwargs.min_pixels", 10**9), ("mm_processor_kwargs.do_resize", True),
    ("n", 5), ("max_tokens", 97), ("top_logprobs", 3), ("stop", ["x"] * 17), ("model", "gpt"),
]  # fmt: skip


def hurt(where: str, value) -> dict:
    """A request with that in its place."""
    body = copy.deepcopy(PLAIN)
    if where == "max_completion_tokens":
        del body["max_tokens"]
    body["messages"] = seeing("?", RED)[:1] if "content[" in where else body["messages"]
    for content in [own["content"] for own in body["messages"] if "content[" in where]:
        content.reverse()
        if "video_url" in where:
            content[1] = {"type": "video_url", "video_url": {"url": ""}}
    if where.startswith("tool"):
        body["tools"] = [{"type": "function", "function": {"name": "f"}}]
    place: object = body
    *path, last = where.replace("[", ".[").split(".")
    for step in path:
        place = place[int(step[1:-1])] if step[0] == "[" else place.setdefault(step, {})
    place[last] = value
    return body


def test_three_hundred_bad_requests_are_refused_by_the_name_of_their_field(server):
    bad = [(name, value) for name in FINE for value in WRONG if value not in FINE[name]]
    # 1 and True are equal to Python.
    bad = [(hurt(*own), own[0]) for own in bad if not _fine(*own)]
    bad += [(hurt(*own), own[0]) for own in HURT]
    assert len(bad) >= 300

    async def ask():
        transport = httpx2.ASGITransport(server.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as http:
            return [
                await http.post("/v1/chat/completions", content=json.dumps(body)) for body, _ in bad
            ]

    for (body, where), answer in zip(bad, asyncio.run(ask()), strict=True):
        error = answer.json()["error"]
        assert 400 <= answer.status_code < 500, (where, body, error)
        named = error["param"] or error["message"]
        assert where.partition("[")[0].partition(".")[0] in named or "body" in named, (where, error)
    for body in (b"", b"{", b"[]", b"\xff", b"[" * 10**5, b'{"messages": NaN}', b"null"):
        assert server.raw("POST", "/v1/chat/completions", body).status_code == 400
    assert server("What is it?").choices and server.idle()


def _fine(name: str, value) -> bool:
    return any(value == own and type(value) is type(own) for own in FINE[name])


def test_a_client_that_goes_away_frees_its_row(server):
    body = {**PLAIN, "max_tokens": 48, "n": 4, "stream": True}

    async def visits():
        await asyncio.gather(*[visit(server, body, 0.005 * number) for number in range(12)])

    before = server.raw("GET", "/metrics").text
    asyncio.run(visits())
    assert server.idle()
    after = server.raw("GET", "/metrics").text
    assert gone(after) - gone(before) >= 3
    (answer,) = server("What is it?").choices
    assert answer.message.content


def test_a_request_out_of_time_frees_its_rows(server):
    limits, body = server.service.limits, {**PLAIN, "max_tokens": 48, "n": 4}
    server.service.limits = dataclasses.replace(limits, seconds=0.002)
    try:
        told = server.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
        body["stream"] = True
        stream = server.raw("POST", "/v1/chat/completions", json.dumps(body).encode())
    finally:
        server.service.limits = limits
    assert told.status_code == 504 and told.json()["error"]["code"] == "timeout"
    assert stream.status_code == 504 or '"code": "timeout"' in stream.text.splitlines()[-2]
    assert server.idle()


def gone(metrics: str) -> float:
    (line,) = [
        line for line in metrics.splitlines() if line.startswith("paravt_clients_gone_total")
    ]
    return float(line.split()[1])


def test_bounds_and_other_addresses(server):
    answers = server.together(*[asking("?", max_tokens=48)] * 24)
    refused = [own for own in answers if isinstance(own, APIStatusError)]
    assert len(refused) == 24 - ROWS - 12
    assert {own.status_code for own in refused} == {429}
    assert all(int(own.response.headers["retry-after"]) >= 1 for own in refused)
    large = server.raw("POST", "/v1/chat/completions", b"x" * (64 * 2**20 + 1))
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"
    long = server.raw(
        "POST",
        "/v1/chat/completions",
        json.dumps(hurt("messages[0].content", "word " * 2000)).encode(),
    )
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert server.raw("GET", "/v1/models").json()["data"][0]["id"] == "needle"
    assert server.raw("GET", "/v1/models/needle").status_code == 200
    assert server.raw("GET", "/v1/models/other").status_code == 404
    assert server.raw("GET", "/v1/chat/completions").status_code == 405
    assert server.raw("GET", "/nothing").json()["error"]["message"]
    health = server.raw("GET", "/health").json()
    assert health == {"status": "ok", "rows_busy": 0, "requests": 0}
    told = server.raw("GET", "/metrics").text
    assert 'paravt_requests_total{status="200"}' in told and "paravt_engine_tokens" in told
