"""`python evaluate/serve.py` as a user starts it, on the demo's cold start."""

import json
import re
import signal
import subprocess
import sys
import threading

import httpx2
import pytest
from openai import OpenAI

from evaluate.asking import Asker
from evaluate.model import changed_rules, open_model
from tests.support.command import ROOT, environment
from tests.support.needle import questions

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def asked():
    return next(q for q in questions("oe") if q.asked == "colour").row


@pytest.fixture(scope="module")
def served(asked):
    """A server, and a client of it."""
    root, _, name = asked.video.path.rpartition("/")
    command = [sys.executable, str(ROOT / "evaluate" / "serve.py"), "--port", "0", "--rows", "2"]
    flags = ["--max-tokens", "512", "--media-root", root]
    process = subprocess.Popen(
        command + flags, stdout=subprocess.PIPE, text=True, env=environment(1), cwd=root
    )
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    address = next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
    with process:
        yield process, OpenAI(base_url=address, api_key="none", max_retries=0), name
        process.kill()


def test_the_agent_answers_as_ask_does(served, asked):
    _, client, name = served
    content = [
        {"type": "video_url", "video_url": {"url": name}},
        {"type": "text", "text": asked.question},
    ]
    request = {
        "model": client.models.list().data[0].id,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "extra_body": {"agent": True},
    }
    answer = client.chat.completions.create(**request)
    model = open_model(None, None, changed_rules)
    frames = max(model.config.data.frame_budgets)
    alone = Asker(model, asked.video, frames, 0, lambda *_: None)(asked.question).as_dict()
    for told in (alone, answer.trace):
        del told["seconds"]
    assert answer.trace == alone and answer.choices[0].message.content == alone["answer"]
    assert answer.trace["calls"]
    *chunks, last = client.chat.completions.create(stream=True, **request)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == alone["answer"]
    thoughts = [(c.choices[0].delta.model_extra or {}).get("reasoning_content") for c in chunks]
    assert "-> 1  crop_video(" in "".join(filter(None, thoughts))
    assert last.trace["turns"] == alone["turns"]


def test_sigterm_lets_a_stream_end(served):
    process, client, _ = served
    body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 400, "stream": True}
    body |= {"temperature": 1.9, "seed": 1, "n": 2}
    with (
        httpx2.Client(timeout=60) as http,
        http.stream("POST", f"{client.base_url}chat/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        first = next(lines)
        threading.Timer(0.0, process.send_signal, [signal.SIGTERM]).start()
        told = [line for line in [first, *lines] if line]
    assert told[-1] == "data: [DONE]" and json.loads(told[0][6:])["choices"]
    assert process.wait(30) == 0
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(str(client.base_url))
