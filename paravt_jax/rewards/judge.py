"""A language model as judge, behind any endpoint that speaks OpenAI's chat completions.

    judge = open_judge(JudgeSettings(url="http://localhost:8000/v1", model="qwen3"))
    judge("Question: ... Reply with a single number.")     # "1.0"

A judge is somebody else's service: it may be slow, away or talkative. Each request ends in time
whatever the other side does, failed ones are tried again, and a message that stays without a
verdict raises, upon which `score` falls back to F1. Equal messages are asked once, also when
several threads ask at the same time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import re
import socket
import threading
import time
import urllib.parse
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Annotated

from paravt_jax.marks import Mark
from paravt_jax.protocol import after_thinking
from paravt_jax.ranges import above, at_least
from paravt_jax.settings import Refused, Settings

Judge = Callable[[str], str]
"""Takes a user message, returns the reply of a language model."""

_NUMBER = re.compile(r"-?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})")
_READ = 4000
"""Characters at the end of a reply that are read."""
_LONGEST_REPLY = 1 << 20
"""Bytes of a response that are read; a verdict is a few hundred."""
_MOST_VERDICTS = 1 << 16
"""Verdicts that are kept; beyond, the oldest is forgotten."""
_WORTH_ANOTHER_TRY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Status codes of trouble that passes."""


def judge_message(question: str, prediction: str, answer: str) -> str:
    """The user message with which a language model is asked for a verdict."""
    return (
        f"Question: {question}\n"
        f"Ground truth answer: {answer}\n"
        f"Model prediction: {prediction}\n\n"
        "Is the prediction semantically equivalent to the ground truth? "
        "Reply with a single number: 1.0 if correct, 0.5 if partially correct, 0.0 if wrong."
    )


def verdict(reply: str) -> float | None:
    """The first number of a reply, after its thinking if the judge thinks; None if there is none,
    or if it lies outside [0, 1]."""
    match = _NUMBER.search(after_thinking(reply[-_READ:]))
    value = float(match.group()) if match else -1.0
    return value if 0.0 <= value <= 1.0 else None


class JudgeError(Exception):
    """Why a message has no verdict."""

    def __init__(self, reason: str, passing: bool = False) -> None:
        """`passing`: another try may help."""
        super().__init__(reason)
        self.passing = passing


@dataclasses.dataclass(frozen=True)
class JudgeSettings(Settings):
    """Where a language model is that judges, and how it is asked."""

    url: Annotated[str, Mark.SAME_RESULTS] = ""
    """Base of the API, `https://host/v1`; requests go to `URL/chat/completions`, directly: no
    proxy, no redirect."""
    model: str = ""
    """Name of the model there."""
    key_variable: Annotated[str, Mark.SAME_RESULTS] = ""
    """Environment variable that holds the API key; empty sends none. The key itself is never a
    setting, so that it is in no file."""
    timeout: Annotated[float | int, above(0), Mark.SAME_RESULTS] = 30.0
    """Seconds that connecting may take, and then again everything until the last byte."""
    retries: Annotated[int, at_least(0), Mark.SAME_RESULTS] = 2
    """Further tries after a failure that may pass (no connection, time-out, overload)."""
    backoff: Annotated[float | int, at_least(0), Mark.SAME_RESULTS] = 0.5
    """Seconds before the first further try; each next one waits twice as long."""
    concurrency: Annotated[int, at_least(1), Mark.SAME_RESULTS] = 16
    """Messages of a batch that are asked side by side."""
    temperature: Annotated[float | int, at_least(0)] = 0.0
    """Temperature of the judge: 0 in ParaVT, 0.3 in LongVT."""
    max_tokens: Annotated[int, at_least(1)] = 8
    """Longest reply, as in ParaVT. A judge that thinks aloud needs more."""

    def check(self) -> None:
        """Refuse settings with which no judge can be asked.

        Raises:
            Refused: URL or model are missing or unusable, naming setting and remedy.
        """
        if not self.url or not self.model:
            raise Refused(
                self,
                "{url:name} and {model:name}: a judge needs both, e.g. http://localhost:8000/v1 "
                "and the name of a model that is served there",
            )
        parts = urllib.parse.urlsplit(self.url)
        try:
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # A port that is no number.
            usable = False
        # The URL itself is not told: it may hold a key.
        if not usable:
            raise Refused(self, "{url:name}: write http:// or https://, a host, and a path if any")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise Refused(
                self,
                "{url:name} for {host} holds more than host and path; keys belong into the "
                "environment variable that {key_variable:name} names",
                host=parts.hostname,
            )


def open_judge(settings: JudgeSettings, read: Callable[[str], object | None] = verdict) -> LlmJudge:
    """The judge of these settings, its key read from the environment. Nothing is sent yet.

    `read` finds what is wanted in a reply; a reply in which it finds None has no verdict.

    Raises:
        ValueError: see `JudgeSettings.check`; also if the named environment variable is not set.
    """
    settings.check()
    name = settings.key_variable
    key = os.environ.get(name, "") if name else ""
    if name and not (key and key.isascii() and key.isprintable()):
        raise Refused(
            settings,
            "{key_variable}: this environment variable is not set, or holds characters that no key "
            "has; export the key alone",
        )
    return LlmJudge(settings, key, read)


class LlmJudge:
    """Takes a message, returns the reply. Safe to call from many threads."""

    def __init__(
        self,
        settings: JudgeSettings,
        key: str = "",
        read: Callable[[str], object | None] = verdict,
    ) -> None:
        self.settings, self._read = settings, read
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._lock = threading.Lock()
        self._replies: dict[str, Future[str]] = {}
        self._counts = defaultdict[str, float](float)
        self.last_failure = ""
        """Why the last message without a verdict has none."""

    def __call__(self, message: str) -> str:
        """The judge's reply, which holds a verdict.

        Raises:
            JudgeError: no reply after all tries, or one without a verdict.
        """
        with self._lock:
            pending = self._replies.get(message)
            reply = pending or Future()
            if pending is None:
                self._remember(message, reply)
            self._counts["cached"] += pending is not None
        if pending is None:
            self._fulfil(message, reply)
        return reply.result()

    def metrics(self) -> dict[str, float]:
        """What happened since the last call of this function, under names for `metrics.jsonl`:
        requests sent (tries again included), messages that got no verdict, messages answered from
        memory, and mean seconds until a message that was sent had its verdict or none."""
        with self._lock:
            counts, self._counts = self._counts, defaultdict[str, float](float)
        metrics = {f"judge/{name}": float(counts[name]) for name in ("calls", "failures", "cached")}
        return metrics | {"judge/seconds": counts["seconds"] / max(counts["messages"], 1)}

    def _remember(self, message: str, reply: Future[str]) -> None:
        self._replies[message] = reply
        if len(self._replies) > _MOST_VERDICTS:
            # A dictionary keeps its order: the first one is the oldest.
            del self._replies[next(iter(self._replies))]

    def _fulfil(self, message: str, reply: Future[str]) -> None:
        """Ask, and give everybody who waits the reply or the reason why there is none."""
        began = time.monotonic()
        try:
            reply.set_result(self._ask(message))
        except Exception as error:  # Whatever it is, nobody may wait for ever.
            with self._lock:
                self._counts["failures"] += 1
                self.last_failure = f"{type(error).__name__}: {error}"
                # Not kept: who asks the same next time gets another try.
                self._replies.pop(message, None)
            reply.set_exception(error)
        with self._lock:
            self._counts["messages"] += 1
            self._counts["seconds"] += time.monotonic() - began

    def _ask(self, message: str) -> str:
        """A reply that holds a verdict, after as many tries as it takes and is allowed."""
        for retries_left in range(self.settings.retries, -1, -1):
            try:
                reply = _content(self._post(self._body(message)))
                break
            except JudgeError as error:
                if not (error.passing and retries_left):
                    raise
            time.sleep(self.settings.backoff * 2 ** (self.settings.retries - retries_left))
        if self._read(reply) is None:
            raise JudgeError(f"no verdict in the reply {reply[:80]!a}")
        return reply

    def _body(self, message: str) -> bytes:
        settings = self.settings
        request = {
            "model": settings.model,
            "messages": [{"role": "user", "content": message}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }
        return json.dumps(request).encode()

    def _post(self, body: bytes) -> bytes:
        """One request.

        Raises:
            JudgeError: no connection, out of time, or a status other than 200.
        """
        with self._lock:
            self._counts["calls"] += 1
        parts = urllib.parse.urlsplit(self.settings.url)
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        connection = kind[parts.scheme](
            parts.hostname or "", parts.port, timeout=self.settings.timeout
        )
        path = f"{parts.path.rstrip('/')}/chat/completions"
        try:
            # By itself, so that there is a socket to cut while the request is on its way.
            connection.connect()
            with _deadline(connection.sock, self.settings.timeout):
                connection.request("POST", path, body, self._headers)
                response = connection.getresponse()
                reply = response.read(_LONGEST_REPLY)
        except (OSError, http.client.HTTPException) as error:
            raise JudgeError(f"no answer from the judge: {error!r}", passing=True) from error
        finally:
            connection.close()
        if response.status != http.client.OK:
            passing = response.status in _WORTH_ANOTHER_TRY
            raise JudgeError(f"the judge answers with status {response.status}", passing)
        return reply


@contextlib.contextmanager
def _deadline(connected: socket.socket, seconds: float):
    """End the connection after so many seconds. The time-out of a socket alone starts anew with
    every byte, so that a server which drips could hold a thread for ever."""

    def cut() -> None:
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, cut)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _content(response: bytes) -> str:
    """The text of the first choice."""
    try:
        content = json.loads(response)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise JudgeError("the response is no chat completion", passing=True) from error
    if not isinstance(content, str):
        raise JudgeError("the reply of the judge is no text")
    return content
