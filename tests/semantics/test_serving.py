"""The OpenAI-compatible server, asked by the official client: what it answers is what the model
says alone, and nothing that a client sends or does takes it down.

`tests/e2e/test_serve.py` starts the real one.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import io
import json
import time
from pathlib import Path

import httpx2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from openai import APIStatusError, AsyncOpenAI
from PIL import Image

from evaluate.model import Opened, settings_of
from evaluate.serving.app import make_app
from evaluate.serving.limits import Limits
from evaluate.serving.schemas import parse
from evaluate.serving.service import Service
from evaluate.serving.writing import Wanted, Writing
from models import open_policy
from paravt_jax.blocks import whole_stream
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from paravt_jax.patches import normalised
from paravt_jax.records import StopReason
from rollout.engine.slots import Generated, Written
from tests.support.needle import questions
from tests.support.tiny_models import NEEDLE_MODEL
from train.setup import Parts

ROWS = 4


def picture(colour=(200, 30, 30)) -> str:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


RED = picture()


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


@pytest.fixture(scope="module")
def asked():
    return next(q for q in questions("oe") if q.asked == "colour").row


@pytest.fixture(scope="module")
def server(asked):
    server = Server(tiny_model(), Path(asked.video.path).parent)
    yield server
    assert server.idle() and server.service.worker.error is None
    server.service.close()


def test_equal_alone_and_among_others(server):
    words = ["What is it?", "What colour?", "Which shape is it, and where?"]
    requests = [asking(text) for text in words]
    requests += [asking(text, temperature=1.0, seed=7, top_p=0.9) for text in words]
    requests += [asking(seeing("What colour?", RED)), asking("Say it", temperature=0.5, seed=2**40)]
    alone = [server.together(request)[0] for request in requests]
    for answers in (server.together(*requests), server.together(*reversed(requests))[::-1]):
        for one, other in zip(alone, answers, strict=True):
            assert one.choices == other.choices and one.usage == other.usage
    assert len({one.choices[0].message.content for one in alone}) > 4


def test_log_probs_are_the_learners(server):
    request = asking(
        seeing("What colour?", RED), temperature=0.7, seed=3, logprobs=True, top_logprobs=3
    )
    request["extra_body"] = {"return_token_ids": True}
    (answer,) = server.together(request)
    (choice,) = answer.choices
    tokens, told = choice.token_ids, choice.logprobs.content
    body = {**request, **request["extra_body"]}
    del body["extra_body"]
    asked = server.service.prompts(parse(json.dumps(body).encode()))
    assert [*asked.prompt.tokens, *asked.head] == answer.prompt_token_ids
    table = learned(server.model, asked, tokens, 0.7)
    assert len(told) == len(tokens) == answer.usage.completion_tokens > 1
    for row, token, entry in zip(table, tokens, told, strict=True):
        assert abs(row[token] - entry.logprob) < 1e-4
        best = np.argsort(-row)[:3]
        listed = [other.logprob for other in entry.top_logprobs]
        np.testing.assert_allclose(listed, row[best], atol=1e-4)
    hidden = [server.service.vocabulary.contents[own] for own in server.service.vocabulary.hidden]
    content = b"".join(own for own in (bytes(e.bytes) for e in told) if own not in hidden)
    assert content.decode("utf-8", "replace") == choice.message.content


def learned(model, asked, tokens, temperature) -> np.ndarray:
    """`[t, vocab]` by a forward pass without a cache."""
    policy, prompt = model.agents.policy, asked.prompt
    stream = whole_stream(prompt, np.array([*asked.head, *tokens], np.int32))
    patches = stream.patches
    assert patches is not None

    @jax.jit
    def logits(params, ids, positions, index, values, grids):
        features = policy.encode(params, values, grids)
        hidden = policy.hidden(params, ids, positions, index, features)
        return policy.logits(params, hidden)

    inputs = (
        stream.tokens,
        stream.positions,
        stream.vision_index,
        normalised(patches),
        patches.grids,
    )
    found = logits(model.params, *(jnp.asarray(own)[None] for own in inputs))[0]
    return np.asarray(jax.nn.log_softmax(found / temperature))[-len(tokens) - 1 : -1]


def test_streams_and_stop_strings_tell_the_same(server):
    settings = {"temperature": 1.0, "seed": 5, "logprobs": True, "n": 2, "max_tokens": 40}
    whole = server("What is it?", **settings)
    text = whole.choices[0].message.content
    stop = text[len(text) // 2 :][:3]
    for more in ({}, {"stop": [stop, "never said"]}):
        one = server("What is it?", **settings, **more)
        own = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = server("What is it?", **settings, **more, **own)
        assert last.usage == one.usage and not last.choices
        for choice in one.choices:
            mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
            said = "".join(own.delta.content or "" for own in mine)
            assert said == choice.message.content
            assert mine[-1].finish_reason == choice.finish_reason
            told = [e for own in mine if own.logprobs for e in own.logprobs.content]
            assert told == choice.logprobs.content
    assert (
        text.startswith(one.choices[0].message.content)
        and stop not in one.choices[0].message.content
    )
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_a_tool_loop_in_the_shapes_of_lmms_eval(server, asked):
    """Its client sends what was said and what was called apart, and tool messages without an id."""
    schema = server.model.agents.renderer.tools[0]
    video = {"media_io_kwargs": {"video": {"num_frames": 1}}}
    more = {"tools": [schema], "tool_choice": "auto", **video}
    messages = seeing(asked.question, f"file://{asked.video.path}")
    assert server(messages, **more).choices
    call = {"name": "crop_video", "arguments": '{"start_time": 0, "end_time": 8}'}
    messages += [
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
        {"role": "tool", "name": "crop_video", "content": [
            {"type": "text", "text": "the part that you asked for <|im_end|>"},
            {"type": "image_url", "image_url": {"url": RED}},
        ]},
    ]  # fmt: skip
    assert server(messages, **more).choices
    prompt = server.service.prompts(parse(json.dumps({"messages": messages}).encode())).prompt
    text = server.model.agents.renderer.decode(prompt.tokens)
    assert text.count("<|im_start|>assistant") == 2 and "for <|im_end|>" not in text
    said = f'I look.\n<tool_call>\n{{"name": "crop_video", "arguments": {call["arguments"]}}}'
    assert said in text and text.count("<|image_pad|>") == server.service.frames + 1


def tool(name: str, **properties) -> dict:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


LOOK = tool("look", at={"enum": [1, 2.5]}, fine={"type": "boolean"})
SAY = tool("say", word={"enum": ["red", "blue"]})
NAMED = {"type": "function", "function": {"name": "say"}}


def test_a_call_that_must_be_made_is_made(server):
    """By a model that has never seen a call: random weights."""
    asked = {"tools": [LOOK, SAY], "max_tokens": 96}
    words = [f"number {n}" for n in range(4)]
    drawn = [{"temperature": 1.0, "seed": n} if n % 2 else {} for n in range(4)]
    must = [
        asking(text, **asked, **own, tool_choice=choice)
        for text, own in zip(words, drawn, strict=True)
        for choice in ("required", NAMED)
    ]
    free = [asking(text, **own) for text, own in zip(words, drawn, strict=True)]
    alone = [server.together(request)[0] for request in (*must, *free)]
    together = server.together(*must, *free)
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        for answer in (one, other):
            for call in answer.choices[0].message.tool_calls or ():
                call.id = ""
        assert one.choices == other.choices and one.usage == other.usage
        if number >= len(must):
            continue
        (choice,) = other.choices
        (call,) = choice.message.tool_calls
        found = json.loads(call.function.arguments)
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        if call.function.name == "say":
            assert found in ({"word": "red"}, {"word": "blue"})
        else:
            assert must[number]["tool_choice"] == "required" and set(found) == {"at", "fine"}
            assert found["at"] in (1, 2.5) and type(found["fine"]) is bool
    chunks = server("What?", **asked, tool_choice=NAMED, stream=True)
    told = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    assert told[0][0].function.name == "say" and server.idle()
    assert not server.service.engine.automata._users


MANY = {"a": {"enum": [f"{n}" * 9 for n in range(100, 400)]}}


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}}, "minimum"),
        ({"type": "object", "properties": {"a": {"$ref": "#/x"}}}, "ref"),
        ({"type": "string"}, "not of type"),
        ({"type": "object", "properties": 3}, "cannot be read"),
        ({"type": "object", "properties": MANY}, "states"),
        ({"type": "object", "description": "x" * 20000}, "characters"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_promised_is_refused(server, parameters, why):
    body = {**PLAIN, "tools": [{"type": "function", "function": {"name": "f"}}]}
    body["tools"][0]["function"]["parameters"] = parameters
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        told = server.raw(
            "POST",
            "/v1/chat/completions",
            json.dumps({**body, "tool_choice": choice}).encode(),
        )
        error = told.json()["error"]
        assert told.status_code == 400 and error["param"] == "tool_choice", error
        assert why in error["message"] and "auto" in error["message"]


def test_calls_are_told_apart_and_what_is_no_call_stays_text(server):
    call = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    for text, said, calls in (
        (f"I look.\n{call}\n{call}<|im_end|>", "I look.", 2),
        (f"{call[12:]}<|im_end|>", "", 1),
        ("<tool_call>\n{nonsense}\n</tool_call>", None, 0),
        (f"never <tool_ closed {call[:-3]}", None, 0),
        (f"<think>\n{call}\n</think>\nno", None, 0),
        (f"<think>\n{call}\n</think>\n{call}", f"<think>\n{call}\n</think>", 1),
    ):
        given = "<tool_call>\n" if said == "" else ""
        for step in (1, 3, 1000):
            found, pieces = written(server, text, given, step)
            assert len(found.calls) == calls
            whole = text.removesuffix("<|im_end|>") if said is None else said
            assert "".join(pieces) + found.rest.text == found.text == whole
            assert (found.reason == "tool_calls") == bool(calls)
    assert json.loads(found_call(server, call)["function"]["arguments"]) == {"a": [1]}


def found_call(server, text: str) -> dict:
    (call,) = written(server, text, "", 1)[0].calls
    return call


def written(server, text: str, given: str, step: int):
    """A text as it comes, so many tokens at a time, and the pieces that are told of it."""
    ids = np.array(server.model.agents.renderer.encode(text), np.int32)
    writing = Writing(server.service.vocabulary, Wanted(tools=True, said=given))
    pieces = []
    for end in range(step, len(ids), step):
        writing.add(Written(ids[:end], np.zeros(end, np.float32), None))
        pieces.append(writing.take().text)
    generated = Generated(ids, np.zeros(len(ids), np.float32), StopReason.END)
    return writing.finish(generated), pieces


PLAIN = {"model": "needle", "messages": [{"role": "user", "content": "?"}], "max_tokens": 4}
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
