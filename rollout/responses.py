"""Tool responses as tokens: free of markup, and never longer than their room."""

from __future__ import annotations

import re
from collections.abc import Sequence

from paravt_jax.interfaces import Renderer
from paravt_jax.markup import without_tags
from paravt_jax.records import Clip, Prompt

Response = str | Clip
"""Words, or frames to be shown."""

_MARKUP = re.compile(
    r"<\|[^<>|]*\|>|</?(?:tool_call|tool_code|tool_response|think|answer|grounding)>"
)
"""Special tokens and structural tags: a tool response must not contain any."""


def strip_markup(text: str) -> str:
    """Text without special tokens and structural tags, which would break out of a response."""
    return without_tags(text, _MARKUP).strip()


def response_turn(
    renderer: Renderer, responses: Sequence[Response], room: int, most: int
) -> list[int] | Prompt:
    """From the end of a turn to the head of the next, in at most `room` tokens.

    First all surplus responses beyond `most` become one, then the longest words are cut. Frames
    are left as they are: they had to fit their share of the room before.
    """
    fitted = [text if isinstance(text, Clip) else strip_markup(text) for text in responses]
    limit = room
    while _length(turn := _render(renderer, fitted)) > room:
        if len(fitted) > most + 1:
            fitted = [*fitted[:most], fitted[-1]]
        else:
            assert limit > 0, "responses of no words always fit"
            limit = limit * 3 // 4
            fitted = [_cut(renderer, response, limit) for response in fitted]
    return turn


def _render(renderer: Renderer, responses: Sequence[Response]) -> list[int] | Prompt:
    words = [response for response in responses if isinstance(response, str)]
    if len(words) == len(responses):
        return renderer.tool_turn(words)
    return renderer.frames_turn(responses)


def _length(turn: list[int] | Prompt) -> int:
    return len(turn.tokens if isinstance(turn, Prompt) else turn)


def _cut(renderer: Renderer, response: Response, limit: int) -> Response:
    if isinstance(response, Clip):
        return response
    tokens = renderer.encode(response)
    if len(tokens) <= limit:
        return response
    # A cut may fall inside a character of several bytes.
    return renderer.decode(tokens[:limit]).rstrip("\ufffd")
