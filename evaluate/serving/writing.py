"""Completions as text while they grow: bytes, stop strings, tool calls, log-probabilities."""

from __future__ import annotations

import bisect
import codecs
import dataclasses
import json
import math
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from paravt_jax.protocol import CALL_OPEN, THINK_CLOSE, after_thinking, parse_tool_calls
from paravt_jax.records import StopReason
from rollout.engine.slots import Generated, Written


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What tokens stand for."""

    contents: Sequence[bytes]
    """Bytes of each token id."""
    hidden: frozenset[int]
    """Special tokens, which are no text for clients."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a client wants to see of a completion."""

    stops: tuple[str, ...] = ()
    """Texts that end it; they are not told."""
    tools: bool = False
    """Whether calls are told apart from text."""
    said: str = ""
    """What it begins with: a call that was asked for."""
    log_probs: bool = False
    alternatives: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of a completion."""

    text: str
    log_probs: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A completion that has ended."""

    text: str
    calls: list[dict[str, Any]]
    reason: str
    tokens: list[int]
    log_probs: list[dict[str, Any]]
    rest: Piece
    """What `Writing.take` has not given yet."""


class Writing:
    """One completion while it grows."""

    def __init__(self, vocabulary: Vocabulary, wanted: Wanted) -> None:
        self._vocabulary, self._wanted = vocabulary, wanted
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = wanted.said
        self._tokens: list[int] = []
        self._ends: list[int] = []
        """Characters that there are after each token."""
        self._log_probs: list[float] = []
        self._likeliest: list[list[tuple[int, float]]] = []
        self._stopped: int | None = None
        """Where the first stop string begins."""
        self._shown, self._entries_sent = 0, 0
        self._marks = (*wanted.stops, *([CALL_OPEN] if wanted.tools else []))

    def add(self, written: Written | Generated) -> bool:
        """Take what is new; whether a stop string has been met."""
        first = len(self._tokens)
        self._log_probs += written.log_probs[first:].tolist()
        if self._wanted.alternatives and written.alternatives is not None:
            top = written.alternatives
            rows = zip(
                np.asarray(top.tokens)[first:], np.asarray(top.log_probs)[first:], strict=True
            )
            self._likeliest += [list(zip(t.tolist(), p.tolist(), strict=True)) for t, p in rows]
        before = len(self._text)
        for token in written.tokens[first:].tolist():
            shown = b"" if token in self._vocabulary.hidden else self._vocabulary.contents[token]
            self._text += self._decoder.decode(shown)
            self._tokens.append(token)
            self._ends.append(len(self._text))
        self._search(before)
        return self._stopped is not None

    def take(self) -> Piece:
        """What is new and there for good: nothing that may become a stop string or a call."""
        return self._upto(self._safe())

    def finish(self, generated: Generated) -> Finished:
        """The whole of it."""
        stopped = self.add(generated)
        if not stopped:
            self._text += self._decoder.decode(b"", final=True)
        text = self._text if self._stopped is None else self._text[: self._stopped]
        count = self._kept()
        calls = self._calls(text)
        # A thought may hold what looks like a call: calls follow it.
        first = text.find(CALL_OPEN, max(text.rfind(THINK_CLOSE), 0))
        words = text[:first].rstrip() if calls else text
        reason = "stop" if stopped or generated.stop_reason is not StopReason.LENGTH else "length"
        reason = "tool_calls" if calls else reason
        rest = self._upto(max(len(words), self._shown), count)
        every = self._entries(0, count)
        return Finished(words, calls, reason, self._tokens[:count], every, rest)

    def _search(self, start: int) -> None:
        longest = max(map(len, self._wanted.stops), default=0)
        begin = max(start - longest + 1, len(self._wanted.said), 0)
        starts = [self._text.find(stop, begin) for stop in self._wanted.stops]
        self._stopped = min((at for at in starts if at >= 0), default=None)

    def _kept(self) -> int:
        """Tokens up to the stop string."""
        if self._stopped is None:
            return len(self._tokens)
        return min(bisect.bisect_left(self._ends, self._stopped) + 1, len(self._tokens))

    def _safe(self) -> int:
        """Characters that no later token can change."""
        text = self._text
        if self._wanted.tools and (at := text.find(CALL_OPEN)) >= 0:
            return len(text[:at].rstrip())
        for size in range(min(max(map(len, self._marks), default=1), len(text)), 0, -1):
            if any(len(mark) > size and mark.startswith(text[-size:]) for mark in self._marks):
                return len(text) - size
        # White space before a call is no text of the answer.
        return len(text.rstrip()) if self._wanted.tools else len(text)

    def _upto(self, end: int, tokens: int | None = None) -> Piece:
        """What is new up to a character, or up to a token and a character."""
        if self._stopped is not None:
            end = min(end, self._stopped)
        text = self._text[self._shown : max(end, self._shown)]
        self._shown = max(end, self._shown)
        last = bisect.bisect_right(self._ends, self._shown) if tokens is None else tokens
        entries = self._entries(self._entries_sent, last)
        self._entries_sent = max(last, self._entries_sent)
        return Piece(text, entries)

    def _entries(self, first: int, last: int) -> list[dict[str, Any]]:
        if not self._wanted.log_probs:
            return []
        return [self._entry(at) for at in range(first, last)]

    def _entry(self, at: int) -> dict[str, Any]:
        """A token and its log-probability, as OpenAI tells them."""
        likeliest = self._likeliest[at] if self._likeliest else []
        # What could not be drawn has no log-probability, and JSON no infinity.
        listed = [pair for pair in likeliest[: self._wanted.alternatives] if math.isfinite(pair[1])]
        entry = self._named(self._tokens[at], self._log_probs[at])
        return {**entry, "top_logprobs": [self._named(*pair) for pair in listed]}

    def _named(self, token: int, log_prob: float) -> dict[str, Any]:
        content = self._vocabulary.contents[token]
        text = content.decode("utf-8", "replace")
        return {"token": text, "logprob": log_prob, "bytes": list(content)}

    def _calls(self, text: str) -> list[dict[str, Any]]:
        """The calls that are made, if all of them can be read; otherwise they are text."""
        if not self._wanted.tools or CALL_OPEN not in after_thinking(text):
            return []
        calls = parse_tool_calls(text)
        if any(call.error is not None for call in calls):
            return []
        return [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments)},
            }
            for call in calls
        ]
