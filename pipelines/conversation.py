"""Conversations to token streams and loss weights, by the tokenizer's own chat template.

What the assistant said is found by rendering: the template writes the conversation up to a turn of
the assistant, and up to its end. Then the learned tokens are exactly those that follow, at
inference, what the template asks the model to continue, a `<think>` that it opens itself included
in what it asks.

The pieces are put one after the other, as rollouts do it, where nothing is rendered twice. Joined,
they must be what the template writes of the whole conversation, but for thoughts of past turns,
which the template of Thinking models drops before a new question and rollouts keep. A template for
which this does not hold is refused: training would show the model another text than it reads later.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from paravt_jax.interfaces import FrameReader
from paravt_jax.lazy_array import LazyArray
from paravt_jax.patches import join_patches
from paravt_jax.protocol import THINK_CLOSE, THINK_OPEN, after_thinking
from paravt_jax.records import (
    Conversation,
    ImageRef,
    Message,
    Pack,
    Patches,
    Prompt,
    VideoRef,
)
from paravt_jax.rope_index import mrope_positions, vision_index
from pipelines.arrays import Counts, Grids, Marks, Pixels, Positions, Seconds, Tokens, Weights
from pipelines.faults import CONTROL, Unusable
from pipelines.images import read_image
from pipelines.preprocess import FrameSpec, ImageSpec, VideoSpec, to_patches
from pipelines.render import ChatRenderer
from pipelines.tokenizer import template_opening, written

ASSISTANT = "assistant"
System = Literal["agent", "own"]
"""What a conversation begins with: the system text and the tools of the main agent's prompts in
place of its own system message, or that alone."""
Learn = Literal["assistant", "special"]
"""What is learned: the assistant's text with its end-of-turn tokens; or, as in ParaVT's release,
also the line break after it and every special token of all turns, vision padding excepted."""
VISION_TEXTS = ("<|image_pad|>", "<|video_pad|>")
"""One of them stands for each vision token."""


@dataclasses.dataclass(frozen=True)
class FrameRate:
    """How many frames of a video a conversation shows, spread from its first to its last."""

    fps: float = 1.0
    """Frames per second of the video."""
    least: int = 1
    most: int = 64

    def count(self, video: VideoRef) -> int:
        """Frames of this video."""
        return int(np.clip(int(video.duration * self.fps), self.least, self.most))


@dataclasses.dataclass(frozen=True)
class VisionInput:
    """Frames shown together, at the size that the model sees.

    Bytes, not patches: conversations that wait for room in a pack take a quarter of the memory.
    """

    pixels: Pixels | LazyArray
    spec: FrameSpec
    times: Seconds | None = None
    """Seconds of the frames of a video; a still image has none."""

    def patches(self) -> Patches:
        """Cut into patches, when they are first looked at if the pixels are elsewhere."""
        if not isinstance(self.pixels, LazyArray):
            return to_patches(self.pixels, self.spec)
        grids, scale = self.grids, (self.spec.mean, self.spec.std)
        shape = len(grids), int(grids[0].prod()), self.spec.patch_values
        cut = functools.partial(_cut, self.pixels, self.spec)
        return Patches(LazyArray(shape, np.dtype(np.uint8), cut), grids, scale)

    @property
    def grids(self) -> Grids:
        """Of what the vision tower sees as frames."""
        sides = np.array(self.pixels.shape[1:3]) // self.spec.patch_size
        return np.tile(sides.astype(np.int32), (self.spec.group_count(len(self.pixels)), 1))


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """A rendered conversation whose frames are not cut into patches yet."""

    tokens: Tokens
    visual: Marks
    """Where a vision token stands."""
    weights: Weights
    """Loss weight of predicting each token."""
    clips: tuple[VisionInput, ...]
    """In the order in which their tokens stand."""

    @property
    def frames(self) -> int:
        """What the vision tower sees as frames: pairs of them as a video."""
        return sum(len(clip.grids) for clip in self.clips)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Texts of a tokenizer's special tokens, by id."""
    return {i: t.content for i, t in tokenizer.added_tokens_decoder.items() if t.special}


class TextCheck:
    """Refuses conversations that spell out special tokens: the text of a data set must not open or
    close turns, or stand for frames."""

    def __init__(self, tokenizer: Any):
        self._special = re.compile("|".join(map(re.escape, special_tokens(tokenizer).values())))

    def __call__(self, conversation: Conversation) -> None:
        """Look through the words and calls of all messages.

        Raises:
            Unusable: one of them spells out a special token.
        """
        for message in conversation.messages:
            calls = json.dumps([dataclasses.asdict(c) for c in message.calls], ensure_ascii=False)
            for text in (*message.content, calls):
                if isinstance(text, str) and (match := self._special.search(text)):
                    raise Unusable(
                        CONTROL,
                        f"a message spells out the special token {match.group()!r}; rephrase it",
                    )


class ConversationRenderer:
    """Renders conversations as `ChatRenderer` renders prompts: frames of a video as timed images or
    as pairs with their mean time, M-RoPE positions, and text encoded between control tokens.

    Args:
        renderer: tokenizer, chat template, and how the frames of videos are shown.
        reader: decodes videos, at the size of the renderer's specification.
        rate: how many frames of a video are shown.
        learn: which tokens are learned, see `Learn`.
        system: what conversations begin with, see `System`.
        tools: whether the agent's prompts offer its tools.
        most: tokens of the longest prompt, and of the longest conversation; None for any.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        reader: FrameReader,
        rate: FrameRate = FrameRate(),
        learn: Learn = "assistant",
        system: System = "own",
        tools: bool = True,
        most: tuple[int, int] | None = None,
    ):
        self._head: tuple[Message, ...] | None = None
        self._tools, self._most = None, most
        if system == "agent":
            text = renderer.system_text(tools)
            self._head = (Message("system", (text,)),) if text else ()
            self._tools = renderer.described(tools)
        self._renderer, self._reader, self._rate, self._learn = renderer, reader, rate, learn
        self.image_spec = still_spec(renderer.spec)
        """How still images are shown."""
        tokenizer = renderer.tokenizer
        special = special_tokens(tokenizer)
        self._check = TextCheck(tokenizer)
        self._vision_ids = [tokenizer.convert_tokens_to_ids(text) for text in VISION_TEXTS]
        self._special_ids = [i for i in special if i not in self._vision_ids]

    def __call__(self, conversation: Conversation) -> EncodedConversation:
        """Read the frames of a conversation and render it.

        Raises:
            ValueError: naming the row: a file cannot be read, a text spells out a special token,
                or the template does not tell what the assistant said.
        """
        try:
            self._check(conversation)
            spoken = self._said(conversation)
            parts = [self._parts(message) for message in spoken]
            messages = [
                {"role": message.role, "content": content} | self._calls(message)
                for message, (content, _) in zip(spoken, parts, strict=True)
            ]
            pieces = list(turns(self._renderer.tokenizer, messages, self._tools))
            example = self._encoded(pieces, tuple(clip for _, clips in parts for clip in clips))
            self._check_length(example)
            return example
        except ValueError as error:
            raise ValueError(f"row {conversation.row_id}: {error}") from error

    def _said(self, conversation: Conversation) -> tuple[Message, ...]:
        """The messages, with what the agent's prompts begin with if so wished."""
        if self._head is None:
            return conversation.messages
        first = sum(1 for _ in itertools.takewhile(is_system, conversation.messages))
        return (*self._head, *conversation.messages[first:])

    def _check_length(self, example: EncodedConversation) -> None:
        """Raises ValueError for prompts and conversations that are too long."""
        if self._most is None:
            return
        lengths = int(np.argmax(example.weights > 0)), len(example.tokens)
        for length, most, name in zip(
            lengths,
            self._most,
            ("a prompt (data.max_prompt_tokens)", "a conversation (max_position_embeddings)"),
            strict=True,
        ):
            if length > most:
                raise ValueError(f"{length} tokens are more than {most}, the most of {name}")

    def _parts(self, message: Message) -> tuple[list[dict[str, str]], list[VisionInput]]:
        """Content of a message as templates take it, and what it shows."""
        content: list[dict[str, str]] = []
        shown: list[VisionInput] = []
        videos = [part for part in message.content if isinstance(part, VideoRef)]
        numbers = iter(range(1, len(videos) + 1) if self._head is not None else ())
        for part in message.content:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            if message.role == ASSISTANT:
                raise ValueError("the assistant shows an image or a video; it can only write")
            number = None if isinstance(part, ImageRef) else next(numbers, None)
            number = number if len(videos) > 1 else None
            more, clip = (
                self._still(part) if isinstance(part, ImageRef) else self._video(part, number)
            )
            content += more
            shown.append(clip)
        return content, shown

    def _calls(self, message: Message) -> dict[str, Any]:
        """Calls of a message as templates take them."""
        if not message.calls:
            return {}
        calls = [{"name": call.name, "arguments": call.arguments} for call in message.calls]
        return {"tool_calls": [{"type": "function", "function": call} for call in calls]}

    def _video(
        self, video: VideoRef, number: int | None
    ) -> tuple[list[dict[str, str]], VisionInput]:
        frames = self._reader.overview(video, self._rate.count(video))
        content = self._renderer.video_parts(frames.times, number)
        if words := self._renderer.subtitles(video):
            content = [*content, {"type": "text", "text": words}]
        return content, VisionInput(frames.pixels, self._renderer.spec, frames.times)

    def _still(self, image: ImageRef) -> tuple[list[dict[str, str]], VisionInput]:
        pixels = self.image_spec.resize(read_image(image)[None])
        return [{"type": "image"}], VisionInput(pixels, self.image_spec)

    def _encoded(
        self, pieces: Sequence[tuple[str, bool]], clips: tuple[VisionInput, ...]
    ) -> EncodedConversation:
        """Tokens of all pieces. Each is encoded by itself: at inference what the assistant says is
        generated after its header, with which no merge can join it."""
        renderer = self._renderer
        times = iter([clip.times for clip in clips if clip.times is not None])
        texts = [renderer.with_times(text, times) for text, _ in pieces]
        encoded = [np.asarray(renderer.encode(text), np.int32) for text in texts]
        learned = np.repeat([is_learned for _, is_learned in pieces], [len(ids) for ids in encoded])
        tokens = np.concatenate(encoded)
        if self._learn == "special":
            learned = self._with_special(tokens, learned)
        repeats = np.ones(len(tokens), np.int64)
        marks = np.isin(tokens, self._vision_ids)
        repeats[marks] = _vision_counts(clips)
        tokens, visual = np.repeat(tokens, repeats), np.repeat(marks, repeats)
        weights = np.repeat(learned.astype(np.float32), repeats)
        return EncodedConversation(tokens, visual, weights, clips)

    def _with_special(self, tokens: Tokens, learned: Marks) -> Marks:
        after = np.zeros_like(learned)
        after[1:] = learned[:-1] & ~learned[1:]
        return learned | after | np.isin(tokens, self._special_ids)


def is_system(message: Message) -> bool:
    """Whether it tells the assistant what to do."""
    return message.role == "system"


Tools = list[dict[str, Any]] | None
"""Schemas that the template describes."""


def turns(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Tools = None
) -> Iterator[tuple[str, bool]]:
    """The rendered conversation in pieces, and whether the assistant said them.

    A piece of the assistant reaches from what the template puts at the head of its turns, a
    `<think>` included, to the end-of-turn token.

    Raises:
        ValueError: the assistant speaks first or twice in a row, or the template writes earlier
            turns otherwise than when they were the last.
    """
    pieces = list(_pieces(tokenizer, messages, tools))
    whole, joined = _render(tokenizer, messages, tools), "".join(text for text, _ in pieces)
    same = _without_thoughts if template_opening(tokenizer) else str
    if same(whole) != same(joined):
        raise ValueError(
            "the chat template writes turns otherwise once more turns follow (a thought that it "
            "drops, for instance), so that training would show what the model never reads; cut "
            "the conversation there or use another template"
        )
    yield from pieces


def _pieces(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Tools
) -> Iterator[tuple[str, bool]]:
    """What is asked and what the assistant said, in turn; nothing is rendered twice."""
    spoken = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    after = 0
    for number in spoken:
        if not number or messages[number - 1]["role"] == ASSISTANT:
            raise ValueError("the assistant speaks first or twice in a row; join its messages")
        head = _render(tokenizer, messages[:number], tools, with_head=True)
        yield (_following(tokenizer, messages[after:number], True) if after else head), False
        turn = _render(tokenizer, messages[: number + 1], tools)
        yield _said(tokenizer, turn, head, messages[number])
        after = number + 1
    yield _following(tokenizer, messages[after:], False), False


def _following(tokenizer: Any, messages: Sequence[dict[str, Any]], with_head: bool) -> str:
    """What the template writes of messages after any turn of the assistant."""
    before = [{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": "!"}]
    text = _render(tokenizer, [*before, *messages], with_head=with_head)
    return text.partition("!" + tokenizer.eos_token)[2]


def _said(tokenizer: Any, turn: str, head: str, message: dict[str, Any]) -> tuple[str, bool]:
    """What the template writes of a message of the assistant after the head of its turn."""
    end = tokenizer.eos_token
    content, closed, _ = turn.removeprefix(head).partition(end)
    words = "".join(part["text"] for part in message["content"])
    full = template_opening(tokenizer) + content
    # A template that opens `<think>` closes it, too, before the words of whoever did not think.
    written = _squeezed(full if THINK_CLOSE in words else after_thinking(full))
    called = all(call["function"]["name"] in content for call in message.get("tool_calls", ()))
    separable = turn.startswith(head) and closed and written.startswith(_squeezed(words)) and called
    if not separable:
        raise ValueError(
            f"the chat template does not write {words[:40]!r} as {head[-24:]!r}, the message, "
            f"{end!r}, so that what the assistant said cannot be told; use another template"
        )
    return content + closed, True


def _without_thoughts(text: str) -> str:
    """Text without what stands between `<think>` and `</think>`, and the white space after it."""
    first, *rest = text.split(THINK_OPEN)
    return _squeezed(first + "".join(map(after_thinking, rest)))


def _squeezed(text: str) -> str:
    """Text without white space, which templates add and drop."""
    return "".join(text.split())


def _render(
    tokenizer: Any, messages: Sequence[dict[str, Any]], tools: Tools = None, with_head: bool = False
) -> str:
    return written(tokenizer, list(messages), tools=tools, add_generation_prompt=with_head)


def still_spec(spec: FrameSpec) -> ImageSpec:
    """How still images are shown beside frames of this specification: within the same limits."""
    if isinstance(spec, ImageSpec):
        return spec
    assert isinstance(spec, VideoSpec)
    shared = {f.name: getattr(spec, f.name) for f in dataclasses.fields(FrameSpec)}
    most = spec.max_frame_pixels or spec.max_pixels
    return ImageSpec(**shared, min_pixels=spec.min_frame_pixels, max_pixels=most)


def pack(examples: Sequence[EncodedConversation]) -> Pack:
    """Conversations one after the other in one stream; positions begin anew with each."""
    clips = [clip for example in examples for clip in example.clips]
    patches = join_patches([clip.patches() for clip in clips])
    tokens = np.concatenate([example.tokens for example in examples])
    index = np.full(len(tokens), -1, np.int32)
    if patches is not None:
        visual = np.concatenate([example.visual for example in examples])
        merge = clips[0].spec.merge_size
        index = vision_index(visual, patches.grids, merge, patches.values.shape[1])
    return Pack(
        stream=Prompt(tokens, np.concatenate([_positions(d) for d in examples]), index, patches),
        weights=np.concatenate([example.weights for example in examples]),
        segments=np.repeat(
            np.arange(1, len(examples) + 1, dtype=np.int32), [len(d.tokens) for d in examples]
        ),
    )


def _cut(pixels: LazyArray, spec: FrameSpec) -> np.ndarray:
    return np.asarray(to_patches(np.asarray(pixels), spec).values)


def _positions(example: EncodedConversation) -> Positions:
    grids = np.concatenate([np.zeros((0, 2), np.int32), *(clip.grids for clip in example.clips)])
    merge = example.clips[0].spec.merge_size if example.clips else 1
    return mrope_positions(example.visual, grids, merge)


def _vision_counts(clips: Sequence[VisionInput]) -> Counts:
    """Vision tokens of each frame, in order."""
    counts = [clip.grids.prod(1) // clip.spec.merge_size**2 for clip in clips]
    return np.concatenate([np.zeros(0, np.int64), *counts])
