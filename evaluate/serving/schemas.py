"""Requests as clients send them: chat completions of OpenAI's API, and vLLM's additions to it.

What is not named here is refused by its name, as is every value out of its range: a setting that
has no effect would be one that a client relies on in vain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic_core import ErrorDetails

from evaluate.serving.errors import ApiError
from paravt_jax.protocol import nests_beyond

Text = Annotated[str, Strict()]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


class Strictly(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class Url(Strictly):
    """Where an image or a video is."""

    url: Annotated[Text, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] | None = None
    """Taken, as clients send it with images; the limits on pixels decide about sizes."""


class Part(Strictly):
    """A piece of a message."""

    type: Literal["text", "image_url", "video_url"]
    text: Text | None = None
    image_url: Url | None = None
    video_url: Url | None = None


class Called(Strictly):
    """The function of a call."""

    name: Annotated[Text, Field(min_length=1)]
    arguments: Text = "{}"
    """A JSON object."""


class Call(Strictly):
    """A tool call of the assistant, as it is sent back in a tool loop."""

    id: Text | None = None
    index: Whole | None = None
    type: Literal["function"] = "function"
    function: Called


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatMessage(Strictly):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[Part] | None, BeforeValidator(_as_parts)] = None
    name: Text | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: Text | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = None


class Function(Strictly):
    """What a tool is."""

    name: Annotated[Text, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class OfferedTool(Strictly):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class Named(Strictly):
    """A function by its name."""

    name: Text


class Choice(Strictly):
    """A tool that must be called."""

    type: Literal["function"]
    function: Named


class StreamOptions(Strictly):
    """What a stream tells besides."""

    include_usage: Flag = False


class VideoIo(Strictly):
    """Which frames of a video are shown."""

    num_frames: Annotated[Whole, Field(ge=1)] | None = None
    """Spread over the whole video."""
    fps: Annotated[Number, Field(gt=0)] | None = None
    """Frames per second of the video instead, as many as may be shown."""


class MediaIo(Strictly):
    """How media are read (vLLM's `media_io_kwargs`)."""

    video: VideoIo | None = None
    image: dict[Text, None] | None = None


class Processor(Strictly):
    """How frames and images are resized (vLLM's `mm_processor_kwargs`)."""

    min_pixels: Annotated[Whole, Field(ge=1)] | None = None
    max_pixels: Annotated[Whole, Field(ge=1)] | None = None
    fps: Annotated[Number, Field(gt=0)] | None = None


class Format(Strictly):
    """Free text is the only format."""

    type: Literal["text"]


class ChatRequest(Strictly):
    """A request for chat completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    model: Text | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[Whole, Field(ge=1)] | None = None
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=256)]] | None,
        BeforeValidator(_as_list),
        Field(max_length=16),
    ] = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[OfferedTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: Literal[True] | None = None
    media_io_kwargs: MediaIo | None = None
    mm_processor_kwargs: Processor | None = None
    return_token_ids: Flag | None = None
    """Also tell the ids of prompt and completion, for those who train on them (vLLM)."""
    agent: Flag | None = None
    """Answer with crops of the video, as the agent was trained to, and tell how."""
    user: Text | None = None
    response_format: Format | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    logit_bias: dict[Text, None] | None = None


DEEPEST = 64
"""Levels of JSON, far more than any request needs."""


def parse(body: bytes) -> ChatRequest:
    """A request from the bytes of its body.

    Raises:
      ApiError: it is no JSON object, or a field is unknown or out of its range; `param` names it.
    """
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is no JSON: {error}"[:300]) from error
    if not isinstance(fields, dict):
        raise ApiError("the body must be a JSON object")
    _check_text(body, fields)
    try:
        request = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _told(error.errors(include_url=False, include_context=False)) from error
    _check_together(request)
    return request


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is not a JSON number")


def _check_text(body: bytes, fields: dict[str, Any]) -> None:
    """Refuse halves of characters, which JSON can spell out and nobody can write down, and what is
    nested so deeply that templates cannot print it."""
    if nests_beyond(fields, DEEPEST):
        raise ApiError("the body is nested too deeply")
    # Seldom there at all, and seldom wrong where they are: emoji are escaped as two of them.
    if b"\\ud" in body.lower():
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ApiError("the body spells out half a character (a lone surrogate)") from None


def _told(errors: Sequence[ErrorDetails]) -> ApiError:
    """The first error that is not about one of several alternatives, by the name of its field."""
    first = errors[0]
    where = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(f"unknown field {where}", where, code="unknown_field")
    missing = first["type"] == "missing"
    what = "is missing" if missing else first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(f"{where}: {what}", where, code="missing_field" if missing else "invalid_value")


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].content[1].image_url`, as clients write it."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("literal['none','auto','required']", "Choice"):
            path += f".{part}" if path else part
    return path[:200]


def _check_together(request: ChatRequest) -> None:
    """Refuse fields that act only beside another one."""
    if request.max_tokens and request.max_completion_tokens:
        raise ApiError("give max_tokens or max_completion_tokens, not both", "max_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs needs logprobs: true", "top_logprobs")
    if request.stream_options and not request.stream:
        raise ApiError("stream_options needs stream: true", "stream_options")
    if request.tool_choice not in (None, "none") and not request.tools:
        raise ApiError("tool_choice needs tools", "tool_choice")
    if isinstance(request.tool_choice, Choice):
        name = request.tool_choice.function.name
        if name not in [tool.function.name for tool in request.tools or ()]:
            raise ApiError(f"tool_choice names {name!r}, which is none of tools", "tool_choice")
    video = request.media_io_kwargs and request.media_io_kwargs.video
    if video and video.num_frames and video.fps:
        where = "media_io_kwargs.video"
        raise ApiError(f"{where}: give num_frames or fps, not both", f"{where}.fps")
    for at, message in enumerate(request.messages):
        _check_message(message, f"messages[{at}]")
    if request.agent:
        _check_agent(request)


def _check_message(message: ChatMessage, where: str) -> None:
    for number, part in enumerate(message.content or ()):
        place = f"{where}.content[{number}]"
        for name in ("text", "image_url", "video_url"):
            if (getattr(part, name) is not None) != (name == part.type):
                verb = "is missing" if name == part.type else f"does not go with type {part.type!r}"
                raise ApiError(f"{place}.{name} {verb}", f"{place}.{name}")
        if part.type != "text" and message.role in ("assistant", "system", "developer"):
            raise ApiError(f"{place}: a message of the {message.role} holds text only", place)
    if message.content is None and not message.tool_calls:
        raise ApiError(f"{where}.content is missing", f"{where}.content")
    if message.tool_calls and message.role != "assistant":
        raise ApiError(f"{where}.tool_calls: only the assistant calls", f"{where}.tool_calls")
    for number, call in enumerate(message.tool_calls or ()):
        _arguments(call, f"{where}.tool_calls[{number}].function.arguments")


def _arguments(call: Call, where: str) -> None:
    try:
        arguments = json.loads(call.function.arguments, parse_constant=_no_number)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(f"{where} must be the text of a JSON object", where)


ALONE = ("tools", "tool_choice", "logprobs", "stop", "return_token_ids")
"""What does not go with the agent, which has tools of its own and speaks in several turns."""


def _check_agent(request: ChatRequest) -> None:
    for name in ALONE:
        if getattr(request, name):
            raise ApiError(f"{name} does not go with agent: true", name)
    if (request.n or 1) > 1:
        raise ApiError("n does not go with agent: true; send several requests", "n")
