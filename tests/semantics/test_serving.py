"""The OpenAI-compatible server, asked by the official client: what it answers is what the model
says alone.

`tests/e2e/test_serve.py` starts the real one.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluate.serving.schemas import parse
from evaluate.serving.writing import Wanted, Writing
from paravt_jax.blocks import whole_stream
from paravt_jax.patches import normalised
from paravt_jax.records import StopReason
from rollout.engine.slots import Generated, Written
from tests.support.chat_server import PLAIN, RED, asking, seeing

pytestmark = pytest.mark.slow


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
