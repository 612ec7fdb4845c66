"""Frames and words to token streams, by the tokenizer's own chat template."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int

from paravt_jax.markup import without_tags
from paravt_jax.patches import join_patches, split_patches
from paravt_jax.records import Clip, Frames, Patches, Prompt, Row, VideoRef
from paravt_jax.rope_index import mrope_positions, vision_index
from paravt_jax.structure import token_bytes
from pipelines.arrays import Seconds
from pipelines.faults import CONTROL, Unusable
from pipelines.preprocess import EACH, SPECS, FrameSpec, VideoSpec, to_patches
from pipelines.subtitles import subtitle_text
from pipelines.tokenizer import REMEDY, end_tokens, open_tokenizer, template_opening, written

# Encoded pieces of text between control tokens that are remembered.
PIECES_KEPT = 1 << 14

Overview = Frames | Clip | Sequence[Frames | Clip] | None
"""Frames of one video or of several, decoded or already cut into patches."""


CALL_MANY = (
    " If the frames do not show enough, call {tools} before answering, once for each "
    "part that you need to see; you may call it several times in one turn."
)
CALL_ONE = (
    " If the frames do not show enough, call {tools} before answering: one call in a turn, for "
    "the part that you need to see next."
)


SAY_WHEN = (
    " In the reasoning, give the time of everything that you rely on in seconds, written as "
    "<t>12.5</t>s."
)


@dataclasses.dataclass(frozen=True)
class PromptTexts:
    """The words around frames and question. An empty text is left out."""

    system: str = (
        "You answer a question about a video, of which you are shown a few frames with their "
        "times. Reason between <think> and </think>, then give the final answer, and nothing "
        "else, between <answer> and </answer>."
    )
    """System text of the main agent."""
    tools: str = CALL_MANY.format(tools="crop_video")
    """Added to the system text when the main agent may call the tool."""
    subagent: str = (
        "These frames show seconds {start:g} to {end:g} of a longer video. Report what can be "
        "seen, in order and with times: people and things, what they do, what changes. State "
        "only what the frames show."
    )
    """Request to a sub-agent; `{start}` and `{end}` are the window in seconds."""
    video: str = "Video {number}:\n"
    """Stands before the frames of each video where several are shown, `{number}` from 1."""
    clip: str = "{count} frames from {start:g} to {end:g} seconds:\n"
    """Stands before frames in a tool response; `{count}` is their number."""
    clip_end: str = ""
    """Stands after frames in a tool response."""
    describe_tools: bool = False
    """Whether `tools` says all that there is to say; if not, the chat template describes them."""

    def about(self, tools: Sequence[str], parallel: bool) -> PromptTexts:
        """The same texts for an agent with tools of these names; `parallel`: it may call several
        times in one turn."""
        words = CALL_MANY if parallel else CALL_ONE
        return dataclasses.replace(self, tools=words.format(tools=" or ".join(tools)))

    def with_times(self) -> PromptTexts:
        """The same texts for an agent whose reasoning is to say when, as VISD's rewards read it."""
        return dataclasses.replace(self, system=self.system + SAY_WHEN)


VIDEO_O3_TEXTS = PromptTexts(
    tools=(
        " If the frames do not show enough, end your turn, after the reasoning, not with an answer "
        'but with <grounding>{"temporal_segment": [START, END], "sampling_strategy": "medium"}'
        "</grounding>, where START and END are seconds: you are then shown this part again, more "
        'closely with "fine" and less so with "coarse".'
    ),
    clip="Seconds {start:g} to {end:g} once more, in {count} frames:\n",
    clip_end="\nReason on from here: look again, or answer.",
    describe_tools=True,
)
"""For agents that call by `<grounding>`, which chat templates do not know."""


class ChatRenderer:
    """Implements `Renderer` on a Hugging Face tokenizer.

    Each frame is shown as the text `<t seconds>`, then its vision tokens between start and end
    marks: as one image per frame (an `ImageSpec`, as in ParaVT's RL), or as frame pairs of a
    video that carry their mean time (a `VideoSpec`). The tokens are those of transformers'
    `Qwen3VLProcessor`, which from 5.10 on keeps the template's marks around the whole video
    besides; `VideoSpec.marks` says whether we do.

    Args:
        tokenizer: a Hugging Face tokenizer with a Qwen3-VL chat template.
        spec: how frames become patches, as images or as a video.
        texts: the words around frames and question.
        eos_ids: tokens that end a turn; default: the tokenizer's own.
        tools: schemas of the tools that prompts offer, as chat templates take them.
        subtitles: show the subtitles beside a video (`subtitle_text`) before the question.
    """

    def __init__(
        self,
        tokenizer: Any,
        spec: FrameSpec,
        texts: PromptTexts | None = None,
        eos_ids: Sequence[int] = (),
        tools: Sequence[dict[str, Any]] = (),
        subtitles: bool = False,
    ):
        self.tokenizer, self.spec, self.mode = tokenizer, spec, spec.mode
        self.opening = template_opening(tokenizer)
        self._subtitles = subtitles
        self.texts = texts or PromptTexts()
        self.tools = list(tools)
        eos_id = tokenizer.eos_token_id
        self.eos_ids: tuple[int, ...] = (eos_id, *(index for index in eos_ids if index != eos_id))
        pad = tokenizer.pad_token_id
        self.pad_id: int = eos_id if pad is None else pad
        self._pad_text = f"<|{self.mode}_pad|>"
        self._vision_id: int = tokenizer.convert_tokens_to_ids(self._pad_text)
        controls = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self._control = re.compile("|".join(map(re.escape, sorted(controls, reverse=True))))
        self._pieces = re.compile(f"({self._control.pattern})")
        self._piece_ids = self._remembered()

    @classmethod
    def from_folder(
        cls,
        folder: str,
        mode: str = "image",
        texts: PromptTexts | None = None,
        pixels: tuple[int, int] | None = None,
        tools: Sequence[dict[str, Any]] = (),
        subtitles: bool = False,
        marks: str | None = None,
    ) -> ChatRenderer:
        """Load tokenizer, frame specification and end-of-turn tokens from a model folder.

        Args:
            folder: a Hugging Face model folder.
            mode: whether frames are shown as `image` or as `video`.
            texts: the words around frames and question.
            pixels: fewest and most pixels of a frame (see `FrameSpec.limited`), instead of the
                folder's own limits.
            tools: schemas of the tools that prompts offer.
            subtitles: show the subtitles beside a video before the question.
            marks: where vision marks of videos stand (see `VideoSpec`), instead of what the
                folder says.

        Raises:
            ValueError: an unknown mode or marks, or the folder lacks a tokenizer or the mode's
                processor.
        """
        if mode not in SPECS:
            raise ValueError(f"mode={mode!r}: frames are shown as one of {', '.join(SPECS)}")
        tokenizer = open_tokenizer(folder)
        spec = SPECS[mode].from_folder(folder)
        spec = spec.limited(*pixels) if pixels else spec
        if marks and isinstance(spec, VideoSpec):
            spec = dataclasses.replace(spec, marks=marks)
        return cls(tokenizer, spec, texts, end_tokens(folder), tools, subtitles)

    def main_prompt(self, row: Row, frames: Overview, tools: bool, hint: str = "") -> Prompt:
        """System and user turn of the main agent, up to and including the assistant header.

        Args:
            row: the question.
            frames: the overview, decoded or already cut into patches; of each of the row's
                videos, if there are several.
            tools: whether the tools are offered.
            hint: words after the question, the last before the assistant header. Control tokens
                in them are dropped.

        Raises:
            ValueError: the question spells out a control token of the tokenizer, or tools are to
                be offered and the renderer knows none.
        """
        if tools and not self.tools:
            raise ValueError("tools=True, but the renderer has none: give it tools=[schema, ...]")
        request = self.request(row)
        if hint:
            request = f"{request}\n\n{self.without_control(hint)}"
        return self.prompt(frames, request, self.system_text(tools), tools)

    def system_text(self, tools: bool) -> str:
        """What the main agent is told, with tools or without; may be empty."""
        return self.texts.system + (self.texts.tools if tools else "")

    def described(self, tools: bool) -> list[dict[str, Any]] | None:
        """The schemas that the chat template describes to it, if it does."""
        return self.tools if tools and not self.texts.describe_tools else None

    def request(self, row: Row) -> str:
        """What the main agent is asked: the question, after the subtitles of its videos if they
        are shown.

        Raises:
            ValueError: the question spells out a control token, or subtitles cannot be read.
        """
        self.check_question(row)
        return "".join(map(self.subtitles, row.videos)) + row.question

    def check_question(self, row: Row) -> None:
        """Refuse a question that spells out a control token, and subtitles that cannot be read.

        Raises:
            Unusable: it does.
            UnreadableSubtitles: see `subtitle_text`.
        """
        if match := self._control.search(row.question):
            raise Unusable(
                CONTROL,
                f"row {row.row_id}: the question contains the control token "
                f"{match.group()!r}; rephrase it",
            )
        for video in row.videos:
            self.subtitles(video)

    def subtitles(self, video: VideoRef) -> str:
        """The subtitles of a video with their times, as far as they are shown and it has any.

        Raises:
            UnreadableSubtitles: they cannot be read.
        """
        return self.without_control(subtitle_text(video)) if self._subtitles else ""

    def with_hint(self, row: Row, prompt: Prompt, tools: bool, hint: str) -> Prompt:
        """The main prompt of a row once more, of the same frames, with a hint after the question.

        Raises:
            ValueError: see `main_prompt`.
        """
        shown: list[Clip] = []
        if prompt.patches is not None:
            assert prompt.times, "a main prompt with frames knows their times"
            counts = [self.spec.group_count(len(times)) for times in prompt.times]
            parts = zip(prompt.times, split_patches(prompt.patches, counts), strict=True)
            shown = [Clip(times[0], times[-1], times, patches) for times, patches in parts]
        return self.main_prompt(row, shown, tools, hint)

    def subagent_prompt(self, frames: Frames, start: float, end: float) -> Prompt:
        """What a sub-agent reads about one crop, up to and including the assistant header."""
        return self.prompt(frames, self.texts.subagent.format(start=start, end=end))

    def prompt(
        self, frames: Overview, request: str, system: str = "", tools: bool = False
    ) -> Prompt:
        """One user turn of frames and a request, up to and including the assistant header.

        Raises:
            ValueError: the frames do not have the size that the model sees (see `to_patches`).
        """
        shown = _listed(frames)
        numbers = range(1, 1 + len(shown)) if len(shown) > 1 else [None]
        heads = [self._video_head(number) for number in numbers]
        videos = [part for pair in zip(heads, shown, strict=False) for part in pair]
        return self.user_prompt([*videos, request], system, tools)

    def user_prompt(
        self,
        parts: Sequence[str | Frames | Clip],
        system: str = "",
        tools: bool = False,
        stamps: bool = True,
    ) -> Prompt:
        """One user turn of words and frames in their order, up to and including the assistant
        header. Without `stamps`, images have no times.

        Raises:
            ValueError: the frames do not have the size that the model sees (see `to_patches`).
        """
        shown = [part for part in parts if not isinstance(part, str)]
        content = [
            piece
            for part in parts
            for piece in (
                _words(part) if isinstance(part, str) else self.frame_parts(part.times, stamps)
            )
        ]
        messages: list[dict] = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": _words(system)})
        text = self._render(messages, self.described(tools))
        times = tuple(video.times for video in shown)
        tokens = self.encode(self.with_times(text, times))
        patches = join_patches([self._patches(video) for video in shown])
        prompt = _with_vision(tokens, patches, self._vision_id, self.spec.merge_size)
        return dataclasses.replace(prompt, times=times)

    def _patches(self, frames: Frames | Clip) -> Patches:
        return (
            to_patches(frames.pixels, self.spec) if isinstance(frames, Frames) else frames.patches
        )

    def tool_turn(self, responses: Sequence[str], demand: str = "") -> list[int]:
        """Tokens from the end of an assistant turn to the head of the next one; a `demand` is what
        the user says in between, after the responses.

        Control tokens inside responses are dropped: a sub-agent's words must not open or
        close turns of the main agent.
        """
        return self.encode(self._tool_text(responses, demand))

    def resized(self, frames: Frames) -> Frames:
        """Frames of any size at the size that the model sees so many of them in."""
        return dataclasses.replace(frames, pixels=self.spec.resize(frames.pixels))

    def clip(self, frames: Frames, start: float, end: float) -> Clip:
        """Frames of a window, cut into patches.

        Raises:
            ValueError: the frames do not have the size that the model sees (see `to_patches`).
        """
        return Clip(start, end, frames.times, to_patches(frames.pixels, self.spec))

    def frames_turn(self, responses: Sequence[str | Clip], demand: str = "") -> Prompt:
        """As `tool_turn`, for responses that are words or frames; positions count from 0."""
        clips = [response for response in responses if isinstance(response, Clip)]
        text = self.with_times(self._tool_text(responses, demand), [clip.times for clip in clips])
        patches = join_patches([clip.patches for clip in clips])
        return _with_vision(self.encode(text), patches, self._vision_id, self.spec.merge_size)

    def _tool_text(self, responses: Sequence[str | Clip], demand: str = "") -> str:
        tools = [{"role": "tool", "content": self._response(response)} for response in responses]
        if demand:
            tools.append({"role": "user", "content": demand})
        spoken = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        _, _, turn = self._render([*spoken, *tools]).partition("!" + self.tokenizer.eos_token)
        return turn

    def _response(self, response: str | Clip) -> str | list[dict[str, str]]:
        """Content of a tool message."""
        if isinstance(response, str):
            return self.without_control(response)
        count = len(response.times)
        head = self.texts.clip.format(count=count, start=response.start, end=response.end)
        return [*_words(head), *self.frame_parts(response.times), *_words(self.texts.clip_end)]

    def without_control(self, text: str) -> str:
        """Text without control tokens, for words that others wrote."""
        text = without_tags(text, self._control)
        # A tokenizer may have control tokens that are no `<tags>`; Qwen's has none.
        while (plain := self._control.sub("", text)) != text:
            text = plain
        return text

    def encode(self, text: str) -> list[int]:
        """Token ids of text in which special tokens are written out.

        Text is encoded piece by piece between control tokens, which no merge crosses, and
        pieces such as times are remembered: prompts of many frames repeat them.
        """
        pieces = filter(None, self._pieces.split(text))
        return [token for piece in pieces for token in self._piece_ids(piece)]

    def decode(self, tokens: Sequence[int] | Int[np.ndarray, " t"]) -> str:
        """Text of token ids, special tokens kept."""
        return self.tokenizer.decode(
            [int(token) for token in tokens],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )

    def token_contents(self, size: int) -> list[bytes]:
        """Bytes of each token id below `size`, the number of logits."""
        added = {
            index: token.content for index, token in self.tokenizer.added_tokens_decoder.items()
        }
        return token_bytes(self.tokenizer.get_vocab(), added, size)

    def _remembered(self) -> Callable[[str], tuple[int, ...]]:
        """Encoding of one piece, with a memory of its own per renderer."""

        @functools.lru_cache(PIECES_KEPT)
        def piece_ids(piece: str) -> tuple[int, ...]:
            return tuple(self.tokenizer.encode(piece, add_special_tokens=False))

        return piece_ids

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_piece_ids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._piece_ids = self._remembered()

    def _render(self, messages: list[dict], tools: list[dict] | None = None) -> str:
        """Messages up to and including the assistant header, without what the template puts at the
        head of the turn itself."""
        text = written(self.tokenizer, messages, tools=tools, add_generation_prompt=True)
        return text.removesuffix(self.opening)

    def video_parts(self, times: Seconds, number: int | None) -> list[dict[str, str]]:
        """The frames of a video, after its number where several are shown."""
        return [*_words(self._video_head(number)), *self.frame_parts(times)]

    def _video_head(self, number: int | None) -> str:
        return "" if number is None else self.texts.video.format(number=number)

    def frame_parts(self, times: Seconds, stamps: bool = True) -> list[dict[str, str]]:
        """The frames as content of a message: images, timed unless told otherwise, or one video."""
        if self.mode == "video":
            return [{"type": "video"}]
        parts: list[dict[str, str]] = []
        for time in times:
            parts += [*_words(_stamp(time) if stamps else ""), {"type": "image"}]
        return parts

    def with_times(self, text: str, times: Iterable[Seconds]) -> str:
        """The text with each video's one vision token written out, as the processor does it.

        Args:
            times: seconds of the frames of each video; more may follow for texts to come.
        """
        if not isinstance(self.spec, VideoSpec):
            return text
        if self.spec.marks == EACH:
            text = text.replace(_marked(self._pad_text), self._pad_text)
        first, *rest = text.split(self._pad_text)
        following = iter(times)
        return first + "".join(self._video_text(next(following)) + after for after in rest)

    def _video_text(self, times: Seconds) -> str:
        """What the processor puts in the place of a video's one vision token."""
        means = _mean_times(times, self.spec.temporal_patch_size)
        return "".join(f"{_stamp(t)}{_marked(self._pad_text)}" for t in means)


def _listed(frames: Overview) -> list[Frames | Clip]:
    if frames is None:
        return []
    return [frames] if isinstance(frames, Frames | Clip) else list(frames)


def _words(text: str) -> list[dict[str, str]]:
    """A text as content of a message; an empty one is left out."""
    return [{"type": "text", "text": text}] if text else []


def _marked(pad: str) -> str:
    return f"<|vision_start|>{pad}<|vision_end|>"


def _stamp(time: float) -> str:
    return f"<{time:.1f} seconds>"


def _mean_times(times: Seconds, size: int) -> Float64[np.ndarray, " patches"]:
    """Time of each temporal patch: the mean of its first and last frame, as in Qwen3-VL."""
    filled = np.concatenate([times, np.repeat(times[-1:], -len(times) % size)]).reshape(-1, size)
    return (filled[:, 0] + filled[:, -1]) / 2


def _with_vision(
    tokens: Sequence[int], patches: Patches | None, vision_id: int, merge: int
) -> Prompt:
    """Repeat each frame's one vision token to its true number and place everything."""
    ids = np.asarray(tokens, np.int32)
    if patches is None:
        nowhere = np.full(len(ids), -1, np.int32)
        text = np.zeros(len(ids), bool)
        return Prompt(ids, mrope_positions(text, np.zeros((0, 2), int), merge), nowhere)
    shown = int((ids == vision_id).sum())
    if shown != len(patches.grids):
        raise ValueError(
            f"the chat template shows {shown} of {len(patches.grids)} frames: it is none of "
            f"Qwen3-VL; {REMEDY}"
        )
    repeats = np.ones(len(ids), np.int64)
    repeats[ids == vision_id] = patches.grids.prod(1) // merge**2
    ids = np.repeat(ids, repeats)
    visual = ids == vision_id
    return Prompt(
        tokens=ids,
        positions=mrope_positions(visual, patches.grids, merge),
        vision_index=vision_index(visual, patches.grids, merge, patches.values.shape[1]),
        patches=patches,
    )
