"""From the messages of a request to a prompt: the model's own chat template, images and frames in
their places."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluate.serving.errors import ApiError
from evaluate.serving.limits import Limits
from evaluate.serving.media import Fetcher, Video
from evaluate.serving.schemas import ChatMessage, ChatRequest, Choice, OfferedTool, Part
from paravt_jax.protocol import CALL_OPEN, THINK_CLOSE, THINK_OPEN
from paravt_jax.records import Frames, Prompt
from pipelines.conversation import (
    VISION_TEXTS,
    EncodedConversation,
    VisionInput,
    pack,
    special_tokens,
    still_spec,
)
from pipelines.preprocess import FrameSpec
from pipelines.render import ChatRenderer
from pipelines.tokenizer import written
from pipelines.video import VideoReader

CALL_HEAD = f"{CALL_OPEN}\n"
"""How a call begins."""
Content = list[dict[str, str]]
"""Content of a message as chat templates take it."""


@dataclasses.dataclass(frozen=True)
class ServedPrompt:
    """A request as the engine takes it."""

    prompt: Prompt
    head: list[int]
    """What the answer begins with: what the template opens, and the call that is asked for."""
    said: str
    """The part of the head that belongs to the answer: the beginning of that call."""


class RequestPrompts:
    """Puts requests into prompts. Used by several threads."""

    def __init__(
        self, renderer: ChatRenderer, reader: VideoReader, frames: int, limits: Limits
    ) -> None:
        """`frames`: shown of a video unless a request says how many."""
        self._renderer, self._reader, self._frames = renderer, reader, frames
        self._limits = limits
        self.fetcher = Fetcher(limits)
        tokenizer = renderer.tokenizer
        self._special = re.compile("|".join(map(re.escape, special_tokens(tokenizer).values())))
        self._vision_ids = [tokenizer.convert_tokens_to_ids(text) for text in VISION_TEXTS]

    def __call__(self, request: ChatRequest) -> ServedPrompt:
        """Open the media of a request and write its prompt.

        Raises:
          ApiError: a medium cannot be had, or the prompt is too long.
        """
        spec = self.spec(request)
        shown: list[VisionInput] = []
        messages: list[dict[str, Any]] = []
        for at, message in enumerate(request.messages):
            with contextlib.ExitStack() as files:
                contents = _Contents(self, request, spec, files)
                content = contents(message, f"messages[{at}]")
            shown += contents.shown
            self._check_frames(shown)
            _add(messages, message, content)
        prompt = self._prompt(messages, shown, tools_of(request))
        self._check_length(prompt)
        head, said = self._head(request)
        return ServedPrompt(prompt, head, said)

    def spec(self, request: ChatRequest) -> FrameSpec:
        """How large frames are shown: within the server's limits.

        Raises:
          ApiError: more pixels are asked for than the server was made for.
        """
        own, asked, where = self._renderer.spec, request.mm_processor_kwargs, "mm_processor_kwargs"
        if asked is None or (asked.min_pixels is None and asked.max_pixels is None):
            return own
        top = own.max_patches * own.patch_size**2
        most = asked.max_pixels or top
        least = asked.min_pixels or min(most, still_spec(own).min_pixels)
        if most > top:
            raise ApiError(f"{where}.max_pixels: at most {top} here", f"{where}.max_pixels")
        if least > most:
            raise ApiError(f"{where}.min_pixels: more than max_pixels", f"{where}.min_pixels")
        return own.limited(least, most)

    def frames(self, request: ChatRequest, video: Video) -> int:
        """How many frames of a video are shown.

        Raises:
          ApiError: more are asked for than may be.
        """
        most = self._limits.frames
        io = request.media_io_kwargs and request.media_io_kwargs.video
        rate = io and io.fps
        if rate is None and request.mm_processor_kwargs and not (io and io.num_frames):
            rate = request.mm_processor_kwargs.fps
        if rate is not None:
            return max(round(min(video.ref.duration * rate, most)), 1)
        if io and io.num_frames and io.num_frames > most:
            where = "media_io_kwargs.video.num_frames"
            raise ApiError(f"{where}: at most {most} here (--max-frames)", where)
        return (io and io.num_frames) or self._frames

    def overview(self, video: Video, count: int, spec: FrameSpec, where: str) -> Frames:
        """Frames spread over a video, at the size that the model sees."""
        reader = self._reader
        if spec != self._renderer.spec or not video.lasting:
            reader = VideoReader(spec=spec, cache_bytes=0)
        try:
            return reader.overview(video.ref, count)
        except ValueError as error:
            raise ApiError(f"{where}: the video cannot be decoded", where) from error

    def plain(self, text: str, role: str, where: str) -> str:
        """A text that opens and closes no turns: dropped from what tools say, refused otherwise."""
        if role == "tool":
            return self._renderer.without_control(text)
        if match := self._special.search(text):
            raise ApiError(f"{where}: spells out the special token {match.group()}", where)
        return text

    def video_parts(self, times: np.ndarray) -> Content:
        """Frames as content of a message."""
        return self._renderer.frame_parts(times)

    def _check_frames(self, shown: Sequence[VisionInput]) -> None:
        count = sum(len(one.pixels) for one in shown)
        if count > self._limits.frames:
            raise ApiError(
                f"messages: {count} images and frames are more than {self._limits.frames} "
                "(--max-frames)",
                "messages",
            )

    def _check_length(self, prompt: Prompt) -> None:
        most = self._limits.prompt_tokens
        if len(prompt.tokens) > most:
            raise ApiError(
                f"messages: the prompt has {len(prompt.tokens)} tokens and there is room for "
                f"{most} (--max-prompt-tokens); send fewer or smaller frames or less text",
                "messages",
                code="context_length_exceeded",
            )

    def _prompt(
        self, messages: list[dict[str, Any]], shown: list[VisionInput], tools: list[dict] | None
    ) -> Prompt:
        renderer = self._renderer
        try:
            text = written(renderer.tokenizer, messages, tools=tools, add_generation_prompt=True)
        except ValueError as error:
            raise ApiError(f"messages: {error}"[:300], "messages") from error
        text = text.removesuffix(renderer.opening)
        times = [clip.times for clip in shown if clip.times is not None]
        tokens = np.asarray(renderer.encode(renderer.with_times(text, times)), np.int32)
        marks = np.isin(tokens, self._vision_ids)
        counts = [clip.grids.prod(1) // clip.spec.merge_size**2 for clip in shown]
        repeats = np.ones(len(tokens), np.int64)
        repeats[marks] = np.concatenate([np.zeros(0, np.int64), *counts])
        tokens, visual = np.repeat(tokens, repeats), np.repeat(marks, repeats)
        weights = np.zeros(len(tokens), np.float32)
        return pack([EncodedConversation(tokens, visual, weights, tuple(shown))]).stream

    def _head(self, request: ChatRequest) -> tuple[list[int], str]:
        """Tokens before the answer, and which text of them is part of it."""
        said = CALL_HEAD if must_call(request) else ""
        opening = called_head(self._renderer) if said else self._renderer.opening
        return self._renderer.encode(opening), said


def called_head(renderer: ChatRenderer) -> str:
    """What a turn begins with that must be a call: where the model thinks first, an empty thought
    comes before."""
    thinks = renderer.opening.lstrip().startswith(THINK_OPEN)
    opening = f"{THINK_OPEN}\n\n{THINK_CLOSE}\n\n" if thinks else renderer.opening
    return opening + CALL_HEAD


def must_call(request: ChatRequest) -> list[OfferedTool]:
    """The tools of which one must be called; none if the model is free to."""
    if isinstance(request.tool_choice, Choice):
        name = request.tool_choice.function.name
        return [tool for tool in request.tools or () if tool.function.name == name]
    return list(request.tools or ()) if request.tool_choice == "required" else []


def tools_of(request: ChatRequest) -> list[dict] | None:
    """The tools that the template describes."""
    if not request.tools or request.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in request.tools]


class _Contents:
    """The content of one message, and what it shows."""

    def __init__(
        self,
        maker: RequestPrompts,
        request: ChatRequest,
        spec: FrameSpec,
        files: contextlib.ExitStack,
    ) -> None:
        self._maker, self._request, self._spec, self._files = maker, request, spec, files
        self.shown: list[VisionInput] = []

    def __call__(self, message: ChatMessage, where: str) -> Content:
        content: Content = []
        for number, part in enumerate(message.content or ()):
            place = f"{where}.content[{number}]"
            if part.text is not None:
                text = self._maker.plain(part.text, message.role, f"{place}.text")
                content.append({"type": "text", "text": text})
            else:
                content += self._seen(part, place)
        return content

    def _seen(self, part: Part, where: str) -> Content:
        if part.image_url is not None:
            picture = self._maker.fetcher.image(part.image_url.url, f"{where}.image_url.url")
            self._add_picture(picture, f"{where}.image_url.url")
            return [{"type": "image"}]
        assert part.video_url is not None
        return self._video(part.video_url.url, f"{where}.video_url.url")

    def _add_picture(self, picture: np.ndarray, where: str) -> None:
        spec = still_spec(self._spec)
        try:
            self.shown.append(VisionInput(spec.resize(picture[None]), spec))
        except ValueError as error:
            raise ApiError(f"{where}: {error}", where) from error

    def _video(self, url: str, where: str) -> Content:
        """A video as timed frames; one that is sent as frames knows no times: its frames are
        images."""
        pictures = self._maker.fetcher.frames(url, where)
        if pictures is not None:
            for picture in pictures:
                self._add_picture(picture, where)
            return [{"type": "image"}] * len(pictures)
        video = self._files.enter_context(self._maker.fetcher.video(url, where))
        count = self._maker.frames(self._request, video)
        frames = self._maker.overview(video, count, self._spec, where)
        self.shown.append(VisionInput(frames.pixels, self._spec, frames.times))
        return self._maker.video_parts(frames.times)


def _add(messages: list[dict[str, Any]], message: ChatMessage, content: Content) -> None:
    """One more message. Neighbours of the assistant are one turn of it: some clients send what it
    said and what it called apart."""
    role = "system" if message.role == "developer" else message.role
    calls = [
        {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in message.tool_calls or ()
    ]
    called = [{"type": "function", "function": call} for call in calls]
    if role == "assistant":
        words = "".join(part["text"] for part in content)
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += words
            messages[-1]["tool_calls"] += called
            return
        messages.append({"role": role, "content": words, "tool_calls": called})
        return
    messages.append({"role": role, "content": content})
