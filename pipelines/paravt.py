"""Records of ParaVT-Parquet as typed rows.

Two configurations: `rl`, questions with an answer, and `sft`, conversations in the style of
OpenAI's API. Lists and dictionaries may be written as JSON in a string.
"""

from __future__ import annotations

import json
from typing import Any

from paravt_jax.protocol import DEEPEST_CALL, nests_beyond
from paravt_jax.records import (
    Conversation,
    ImageRef,
    Message,
    QuestionType,
    Row,
    ToolCall,
    VideoRef,
)
from pipelines.faults import FIELD, Unusable
from pipelines.media import Media
from pipelines.tables import json_value, plain_text

MARK = "<video>"
"""Stands in a prompt where a video is shown."""
RL_COLUMNS = {"prompt", "videos", "extra_info"}
SFT_COLUMNS = {"messages"}
ROLES = ("system", "user", "assistant", "tool")


def rl_row(fields: dict[str, Any], row_id: str, media: Media) -> Row:
    """A question of the `rl` configuration.

    The prompt's system message is left out: the renderer has its own words. As in the release,
    videos stand before the words, wherever their marks are.

    Raises:
        ValueError: a field is wrong, or any of the videos is missing or cannot be read.
    """
    messages = _messages(fields, "prompt")
    if strange := {message["role"] for message in messages} - {"system", "user"}:
        raise ValueError(f"prompt has turns of {', '.join(sorted(strange))}; only questions serve")
    questions = (message.get("content") for message in messages if message["role"] == "user")
    question = "\n".join(_text(content, "the content of a prompt") for content in questions)
    videos = [media.video(path) for path in rl_videos(fields)]
    if question.count(MARK) != len(videos) or not videos:
        raise ValueError(f"{question.count(MARK)} {MARK} marks for {len(videos)} videos")
    extra = _of_type(fields.get("extra_info"), dict, "extra_info")
    return Row(
        row_id=row_id,
        video=videos[0],
        question=question.replace(MARK, "").strip(),
        answer=_answer(extra),
        question_type=_question_type(extra),
        more_videos=tuple(videos[1:]),
    )


def rl_videos(fields: dict[str, Any]) -> list[str]:
    """Paths of a question's videos, as written."""
    entries = _of_type(fields.get("videos"), list, "videos")
    return [_url(entry.get("video") if isinstance(entry, dict) else entry) for entry in entries]


def sft_row(fields: dict[str, Any], row_id: str, media: Media) -> Conversation:
    """A conversation of the `sft` configuration.

    Raises:
        ValueError: a message is wrong, nobody answers, or any of the videos or images is missing.
    """
    read = tuple(_message(message, media) for message in _messages(fields, "messages"))
    if not any(message.role == "assistant" for message in read):
        raise ValueError("no message of the assistant: there is nothing to learn")
    return Conversation(row_id, read)


def sft_videos(fields: dict[str, Any]) -> list[str]:
    """Paths of a conversation's videos, as written."""
    return [
        _url(part.get("video_url"))
        for message in _messages(fields, "messages")
        for part in _parts(message)
        if part.get("type") == "video_url"
    ]


def _messages(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    messages = _of_type(fields.get(name), list, name)
    if not all(isinstance(m, dict) and m.get("role") in ROLES for m in messages):
        raise ValueError(f"{name}: each message needs a role of {', '.join(ROLES)}")
    return messages


def _message(message: dict[str, Any], media: Media) -> Message:
    calls = tuple(map(_call, _of_type(message.get("tool_calls") or [], list, "tool_calls")))
    if calls and message["role"] != "assistant":
        raise ValueError(
            f"a message of role {message['role']} has tool_calls; only the assistant calls"
        )
    parts = tuple(_part(part, media) for part in _parts(message))
    return Message(message["role"], parts, calls)


def _call(call: Any) -> ToolCall:
    """An entry of `tool_calls`; its arguments may be JSON in a string."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("an entry of tool_calls needs a function with a name")
    arguments = _of_type(function.get("arguments"), dict, "arguments of a call")
    _check_writable(arguments)
    return ToolCall(function["name"], arguments)


def _check_writable(arguments: dict[str, Any]) -> None:
    """Refuse arguments that an agent could not write, or that its calls are not read with."""
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unusable(FIELD, f"arguments of a call are not JSON ({error})") from error
    if nests_beyond({"arguments": arguments}, DEEPEST_CALL):
        raise Unusable(
            FIELD, f"arguments of a call nest too deeply: calls of {DEEPEST_CALL} levels are read"
        )


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError("the content of a message is a text or a list of parts")
    return content


def _part(part: dict[str, Any], media: Media) -> str | ImageRef | VideoRef:
    kind = part.get("type")
    if kind == "text":
        return _text(part.get("text"), "a part of type text")
    if kind == "video_url":
        return media.video(_url(part.get("video_url")))
    if kind == "image_url":
        return media.image(_url(part.get("image_url")))
    raise ValueError(f"a part of type {kind!r}; text, image_url and video_url are known")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a text")
    return value


def _url(value: Any) -> str:
    """A path, which may stand in a dictionary."""
    path = value.get("url") if isinstance(value, dict) else value
    if not isinstance(path, str) or not path:
        raise ValueError(f"{value!r} is no path")
    return path


def _answer(extra: dict[str, Any]) -> str:
    answer = plain_text(extra.get("answer"), "extra_info.answer")
    if not answer:
        raise ValueError("extra_info.answer is missing")
    return answer


def _question_type(extra: dict[str, Any]) -> str:
    kind = extra.get("question_type") or QuestionType.OPEN.value
    if kind not in tuple(QuestionType):
        raise ValueError(f"extra_info.question_type={kind!r}; {', '.join(QuestionType)} are known")
    return kind


def _of_type(value: Any, kind: type, name: str) -> Any:
    """A list or dictionary, from JSON if it is a string."""
    if isinstance(value, str):
        value = json_value(value, name)
    if not isinstance(value, kind):
        raise ValueError(f"{name} is not a {kind.__name__}")
    return value
