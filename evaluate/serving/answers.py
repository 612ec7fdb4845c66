"""Answers as OpenAI's API gives them: whole, or in chunks."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from evaluate.asking import Answer
from evaluate.serving.completions import Answered, Ended, Event, Grown, Thought
from evaluate.serving.schemas import ChatRequest
from evaluate.serving.service import Prepared
from evaluate.serving.writing import Finished, Piece
from paravt_jax.records import StopReason

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all parts of one answer have in common."""

    request: ChatRequest
    prepared: Prepared
    model: str
    number: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, events: Sequence[Event]) -> tuple[Json, int]:
        """The answer that these events make, and the tokens that it took to write."""
        ended = sorted((e for e in events if isinstance(e, Ended)), key=lambda e: e.index)
        choices = [self._choice(event) for event in ended]
        tokens = sum(len(event.finished.tokens) for event in ended)
        more: Json = {}
        for event in events:
            if isinstance(event, Answered):
                choices, tokens, more = agent_choices(event.answer)
        if self.request.return_token_ids:
            more["prompt_token_ids"] = self.prepared.prompt_ids
        body = {**self._head("chat.completion"), "choices": choices, "usage": self.usage(tokens)}
        return {**body, **more}, tokens

    def opening(self) -> list[Json]:
        """The first chunk of each choice."""
        return [
            self._chunk(index, {"role": "assistant", "content": ""})
            for index in range(self.request.n or 1)
        ]

    def chunks(self, event: Event) -> list[Json]:
        """What a stream tells of an event."""
        if isinstance(event, Grown):
            return [self._piece(event.index, event.piece)]
        if isinstance(event, Ended):
            return self._end(event.index, event.finished)
        if isinstance(event, Thought):
            return [self._chunk(0, {"reasoning_content": event.text})]
        if isinstance(event, Answered):
            (choice,), _, more = agent_choices(event.answer)
            content = self._chunk(0, {"content": choice["message"]["content"]})
            return [content, {**self._chunk(0, {}, choice["finish_reason"]), **more}]
        return []

    def usage(self, tokens: int) -> Json:
        """Tokens that were read and written."""
        read = self.prepared.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}

    def last(self, tokens: int) -> list[Json]:
        """What follows all choices."""
        options = self.request.stream_options
        if options is None or not options.include_usage:
            return []
        head = self._head("chat.completion.chunk")
        return [{**head, "choices": [], "usage": self.usage(tokens)}]

    def _choice(self, event: Ended) -> Json:
        finished = event.finished
        message: Json = {"role": "assistant", "content": finished.text}
        if finished.calls:
            message["tool_calls"] = finished.calls
        choice = {
            "index": event.index,
            "message": message,
            "logprobs": self._log_probs(finished.log_probs),
            "finish_reason": finished.reason,
        }
        return choice | self._ids(finished)

    def _ids(self, finished: Finished) -> Json:
        return {"token_ids": finished.tokens} if self.request.return_token_ids else {}

    def _log_probs(self, entries: list[Json]) -> Json | None:
        return {"content": entries} if self.request.logprobs else None

    def _head(self, kind: str) -> Json:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, index: int, delta: Json, reason: str | None = None, **more: Any) -> Json:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None, **more}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _piece(self, index: int, piece: Piece) -> Json:
        log_probs = self._log_probs(piece.log_probs)
        return self._chunk(index, {"content": piece.text}, logprobs=log_probs)

    def _end(self, index: int, finished: Finished) -> list[Json]:
        chunks = []
        if finished.rest.text or finished.rest.log_probs:
            chunks.append(self._piece(index, finished.rest))
        if finished.calls:
            calls = [{"index": number, **call} for number, call in enumerate(finished.calls)]
            chunks.append(self._chunk(index, {"tool_calls": calls}))
        return [*chunks, self._chunk(index, {}, finished.reason, **self._ids(finished))]


def agent_choices(answer: Answer) -> tuple[list[Json], int, Json]:
    """The agent's answer as the only choice, the tokens that it took, and how it came to it."""
    last = answer.trajectory.turns[-1]
    reason = "length" if last.stop_reason is StopReason.LENGTH else "stop"
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    tokens = answer.tokens["generated"] + answer.tokens["subagents"]
    return [choice], tokens, {"trace": answer.as_dict()}
