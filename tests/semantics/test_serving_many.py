"""A server that has compiled everything, thirty-two clients at once, and a hundred that hang up."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.support.chat_server import PLAIN, RED, Server, asking, seeing, tiny_model, visit

pytestmark = pytest.mark.study


def test_after_the_warm_up_no_request_compiles_anything(asked):
    root, name = Path(asked.video.path).parent, Path(asked.video.path).name
    server = Server(tiny_model(), root, True, rows=2, prompt_tokens=256, frames=4)
    engine = server.service.engine
    assert server.compiled == engine.compilations > 10
    frames = {"media_io_kwargs": {"video": {"num_frames": 3}}}
    requests = [asking("?", n=2, logprobs=True), asking(seeing("?", RED), max_tokens=1)]
    requests += [asking(seeing(asked.question, name), **frames), asking("? " * 40)]
    requests += [asking(seeing(asked.question, name), agent=True, max_tokens=None)]
    answers = server.together(*requests)
    assert all(answer.choices for answer in answers)
    assert server.compiled == engine.compilations
    server.service.close()


def test_many_clients_at_once_and_a_hundred_that_hang_up():
    """Of the tiny model without sockets; `benchmarks/serve.py` times a real server."""
    server = Server(tiny_model(), None, rows=32, queue=64, max_tokens=96, prompt_tokens=256)
    words = [f"What is number {number}?" for number in range(32)]
    drawn = [{"temperature": 1.0, "seed": n} if n % 2 else {} for n in range(32)]
    requests = [asking(text, max_tokens=96, **own) for text, own in zip(words, drawn, strict=True)]
    server.together(*requests)  # compiles
    server.together(requests[0])
    alone = [server.together(request)[0] for request in requests]
    many = server.together(*requests)
    assert [one.choices for one in alone] == [other.choices for other in many]
    body, memory, dice = {**PLAIN, "max_tokens": 96, "n": 4, "stream": True}, [], random.Random(0)
    for _ in range(4):
        for _ in range(25):
            asyncio.run(visit(server, body, dice.uniform(0, 0.05)))
        assert server.idle()
        memory.append(resident())
    print(f"resident MiB per 25 killed: {memory}")
    assert memory[-1] - memory[0] < 2


def resident() -> float:
    """MiB of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
