"""What the server gives many clients, and what is left of those that go away.

    python benchmarks/serve.py [--clients 32] [--kills 100] [--model DIR | --size 40M]

Starts `evaluate/serve.py` with a row for each client. The same requests, greedy and seeded ones,
text and image, are sent one at a time and all at once: tokens per second of both, and whether the
answers are equal. Then clients begin streams and hang up in the middle: rows and memory of the
server before and after. `--size` takes random weights, whose answers seldom end before their
bound; most of the needle model's have eleven tokens.
"""

import os
import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import asyncio
import base64
import io
import json
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from PIL import Image

from benchmarks.evaluation import SIZES, random_folder

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 96
NAME = "served"
ADDRESS = re.compile(r"at http://([\d.]+):(\d+)/v1")


class Served:
    """A server in a process of its own."""

    def __init__(self, rows: int, *model: str) -> None:
        command = [sys.executable, "evaluate/serve.py", "--port", "0", "--rows", str(rows)]
        command += ["--max-tokens", "128", "--max-prompt-tokens", "512", "--name", NAME, *model]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := ADDRESS.search(line):
                self.host, self.port = found[1], int(found[2])
                break
        else:
            raise RuntimeError("the server has not started")

    def client(self) -> AsyncOpenAI:
        """A client, for one event loop."""
        address = f"http://{self.host}:{self.port}/v1"
        return AsyncOpenAI(base_url=address, api_key="none", max_retries=0)

    def memory(self) -> float:
        """Resident MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def health(self) -> dict:
        with socket.create_connection((self.host, self.port)) as connection:
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        return json.loads(answer.partition(b"\r\n\r\n")[2])

    def idle(self, seconds: float = 20.0) -> bool:
        """Whether every row is free within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            told = self.health()
            if not told["rows_busy"] and not told["requests"]:
                return True
            time.sleep(0.05)
        return False


def requests(count: int) -> list[dict]:
    """Half of them greedy, half seeded; every fourth has an image."""
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), (200, 30, 30), np.uint8)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    made = []
    for number in range(count):
        content: list[dict] = [{"type": "text", "text": f"What shape is number {number}?"}]
        if number % 4 == 3:
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        drawn = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0.0}
        made.append({"messages": [{"role": "user", "content": content}], **drawn})
    return made


Answers = list[tuple[str, int]]
"""Texts, and the tokens that they took."""


async def ask(client: AsyncOpenAI, request: dict) -> tuple[str, int]:
    answer = await client.chat.completions.create(model=NAME, max_tokens=TOKENS, **request)
    return answer.choices[0].message.content or "", answer.usage.completion_tokens


async def alone(served: Served, asked: list[dict]) -> Answers:
    async with served.client() as client:
        return [await ask(client, request) for request in asked]


async def together(served: Served, asked: list[dict]) -> Answers:
    async with served.client() as client:
        return list(await asyncio.gather(*[ask(client, request) for request in asked]))


def timed(run: Coroutine[Any, Any, Answers]) -> tuple[Answers, float]:
    """Answers, and tokens per second."""
    began = time.perf_counter()
    answers = asyncio.run(run)
    return answers, sum(tokens for _, tokens in answers) / (time.perf_counter() - began)


def kill(served: Served, seconds: float) -> None:
    """Begin a stream and hang up after so long."""
    message = [{"role": "user", "content": "What is it?"}]
    body = json.dumps({"messages": message, "max_tokens": 128, "n": 4, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((served.host, served.port)) as connection:
        connection.sendall(head.encode() + body)
        time.sleep(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--model", help="as of evaluate/serve.py")
    parser.add_argument("--size", choices=SIZES, help="random weights in place of --model")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as below:
        model = ["--model", flags.model] if flags.model else []
        if flags.size:
            folder = random_folder(flags.size, Path(below) / "model")
            model = ["--model", folder, "--recipe", "needle_rl"]
        measure(Served(flags.clients, *model), flags)


def measure(served: Served, flags: argparse.Namespace) -> None:
    """Print tokens per second, whether answers are equal, and what hanging up leaves."""
    asked = requests(flags.clients)
    try:
        for run in (alone, together):  # compiles
            timed(run(served, asked[:8] if run is alone else asked))
        single, slow = timed(alone(served, asked))
        many, fast = timed(together(served, asked))
        equal = sum(one == other for one, other in zip(single, many, strict=True))
        print(f"one at a time     {slow:8.1f} tokens/s")
        print(f"{flags.clients} at once        {fast:8.1f} tokens/s, {fast / slow:.1f} times")
        print(f"equal answers     {equal} of {len(asked)}")
        kills(served, flags.kills)
    finally:
        began = time.perf_counter()
        served.process.send_signal(signal.SIGTERM)
        code = served.process.wait(60)
        print(f"SIGTERM           exit code {code} after {time.perf_counter() - began:.1f} s")


def kills(served: Served, count: int) -> None:
    """Clients that go away, in two halves: what the second half adds is a leak."""
    dice, memory = random.Random(0), [served.memory()]
    for _ in range(2):
        for _ in range(count // 2):
            kill(served, dice.uniform(0.0, 0.15))
        idle = served.idle()
        memory.append(served.memory())
    told = " -> ".join(f"{own:.0f}" for own in memory)
    print(f"{count} clients killed, all rows free: {idle}; resident {told} MiB")


if __name__ == "__main__":
    main()
