"""From samples to prompts: messages and frames as a protocol says, decoded ahead of their use."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from evaluate.benchmarks.captions import Seen
from evaluate.benchmarks.protocol import Messages, Rules, Span
from evaluate.benchmarks.sample import Sample, SampleResult
from paravt_jax.records import Frames, Prompt, Row, VideoRef
from pipelines.preprocess import VideoSpec
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from rollout.agent import Item


@dataclasses.dataclass(frozen=True)
class ReadyPrompt:
    """A sample that can be put to the model."""

    sample: Sample
    item: Item
    words: str
    """Of the user turn."""
    frames: int
    pixels: int
    """Of one frame."""


class Size(NamedTuple):
    """How large a prompt is."""

    tokens: int
    patches: int
    """Of one frame; 0 without frames."""


@dataclasses.dataclass(frozen=True)
class SamplePrompts:
    """Puts samples into prompts as the rules of one kind of question say."""

    rules: Rules
    renderer: ChatRenderer
    """In the frame sizes of the rules."""
    reader: VideoReader
    """In the same."""
    own_words: str
    """System text with which the agent was trained."""

    def size(self, sample: Sample) -> Size:
        """How large the sample's prompt is. Nothing is decoded: the file says how large frames are.

        Raises:
          ValueError: there is no prompt, as the video or the subtitles cannot be read.
        """
        messages, video, seen = self._messages(sample)
        info, spec = self.reader.info(video), self.renderer.spec
        times = info.times[list(seen.indices)]
        blank = np.zeros((len(times), spec.factor, spec.factor, 3), np.uint8)
        prompt = self._prompt(messages, Frames(blank, times))
        shown = int((prompt.vision_index >= 0).sum())
        height, width = self.reader.size_of(info, len(times), self._quota) if len(times) else (0, 0)
        tokens = len(prompt.tokens) + shown * (height * width // spec.factor**2 - 1)
        return Size(tokens, height * width // spec.patch_size**2)

    def __call__(self, sample: Sample) -> ReadyPrompt:
        """Decode the frames of a sample and write its prompt.

        Raises:
          ValueError: there is no prompt, as the video or the subtitles cannot be read.
        """
        messages, video, seen = self._messages(sample)
        frames = Frames(np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0))
        if seen.indices:
            frames = self.reader.at(video, seen.indices, self._quota)
        row = Row(f"{sample.task}/{sample.sample_id}", video, sample.question, answer="")
        count, height, width, _ = frames.pixels.shape
        item = row, max(count, 1), self._prompt(messages, frames)
        return ReadyPrompt(sample, item, messages.text, count, height * width)

    @property
    def _quota(self) -> int | None:
        """Vision tokens of all frames, where the rules limit their pixels together."""
        spec, most = self.renderer.spec, self.rules.video.total_pixels
        pair = spec.temporal_patch_size if isinstance(spec, VideoSpec) else 1
        return most // (spec.factor**2 * pair) if most else None

    def _messages(self, sample: Sample) -> tuple[Messages, VideoRef, Seen]:
        text = "\n".join([sample.question, *sample.options])
        if self.renderer.without_control(text) != text:
            raise ValueError("the question contains a control token of the model's; rephrase it")
        video = VideoRef(sample.video, 1.0)
        info = self.reader.info(video)
        rate = frames_a_second(info.frames, info.duration)
        seen = Seen(self.rules.video.indices(info.frames, rate), info.frames, rate)
        return self.rules.messages(sample, seen), VideoRef(sample.video, info.duration), seen

    def _prompt(self, messages: Messages, frames: Frames) -> Prompt:
        parts = [
            part
            if isinstance(part, str)
            else Frames(frames.pixels[slice(*part)], frames.times[slice(*part)])
            for part in messages.parts
            if not isinstance(part, Span) or part.stop > part.start
        ]
        agent_words = self.own_words if messages.own_words else ""
        system = "\n\n".join(filter(None, [agent_words, messages.system]))
        stamps = self.rules.video.times
        return self.renderer.user_prompt(parts, system, messages.tools, stamps)


def frames_a_second(frames: int, seconds: float) -> float:
    """The rate as containers have it, 6 or 30000/1001: the quotient lies a rounding error beside
    it, and where harnesses cut `frames / rate` to whole seconds that would lose one."""
    rate = frames / seconds
    return float(Fraction(rate).limit_denominator(1001)) or rate


class Prefetch:
    """Prompts of samples in their order, decoded by threads before they are asked for; what cannot
    be put into a prompt is handed to `failed` instead."""

    def __init__(self, make: SamplePrompts, samples: Sequence[Sample], threads: int, ahead: int):
        """`ahead`: most prompts that are ready or in the making."""
        self._make, self._left, self._ahead = make, iter(samples), ahead
        self._pool = ThreadPoolExecutor(threads)
        self._coming: collections.deque[tuple[Sample, Future[ReadyPrompt]]] = collections.deque()
        self.ready: dict[str, ReadyPrompt] = {}
        """Samples under way, by row id."""
        self.failed: list[SampleResult] = []
        """Samples without a prompt, to be taken away by whoever reads this."""

    def __call__(self, wait: bool) -> Item | None:
        """The next prompt: a `Feed` of `Agent.stream`."""
        while True:
            self._begin()
            if not self._coming or not (wait or self._coming[0][1].done()):
                return None
            sample, future = self._coming.popleft()
            try:
                ready = future.result()
            except ValueError as error:
                self.failed.append(SampleResult.failed(sample, " ".join(str(error).split())))
                continue
            self.ready[ready.item[0].row_id] = ready
            return ready.item

    def _begin(self) -> None:
        # Frames are large: those of all samples would not fit into memory.
        while len(self._coming) < self._ahead and (sample := next(self._left, None)) is not None:
            self._coming.append((sample, self._pool.submit(self._make, sample)))

    def close(self) -> None:
        """Decode no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def sizes(
    make: SamplePrompts, samples: Sequence[Sample], threads: int
) -> Iterator[tuple[Sample, Size | str]]:
    """Of each sample the size of its prompt, or why it has none."""

    def measure(sample: Sample) -> Size | str:
        try:
            return make.size(sample)
        except ValueError as error:
            return " ".join(str(error).split())

    with ThreadPoolExecutor(threads) as pool:
        yield from zip(samples, pool.map(measure, samples), strict=True)
