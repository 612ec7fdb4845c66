"""How large prompts get, known before the first one is made."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from paravt_jax.records import Frames, Prompt, Row
from pipelines.budget import shares
from pipelines.faults import LONG_PROMPT, Unusable
from pipelines.preprocess import FrameSpec
from pipelines.render import ChatRenderer

EARLY, LATE = 0.0, 99999.9
"""Seconds: times that take as few and as many characters as the time of any frame."""


def prompt_tokens(
    renderer: ChatRenderer, rows: Iterable[Row], frames: int, quota: int | None = None
) -> int:
    """Tokens of the longest prompt that any of the questions makes with `frames` frames, those of
    each video within `quota` vision tokens if given."""
    longest: dict[int, tuple[int, Row]] = {}
    for row in rows:
        videos, length = len(row.videos), len(renderer.encode(renderer.request(row)))
        if videos not in longest or length > longest[videos][0]:
            longest[videos] = length, row
    return max(_full_prompt(renderer, row, frames, quota) for _, row in longest.values())


class PromptLimit:
    """Refuses questions whose prompts are too long, shown with the most frames of full size.

    Args:
        renderer: makes the prompts.
        frames: the largest frame budget.
        quota: most vision tokens of one video's frames, if that is limited.
        most: tokens of the longest prompt that is accepted.
        why: what `most` comes from, for the message.
    """

    def __init__(
        self, renderer: ChatRenderer, frames: int, quota: int | None, most: int, why: str
    ) -> None:
        self._renderer, self._frames, self._quota = renderer, frames, quota
        self._most, self._why = most, why
        self._around: dict[int, int] = {}

    def __call__(self, row: Row) -> None:
        """Look at one question.

        Raises:
            Unusable: its prompt is too long.
        """
        tokens = self.tokens(row)
        if tokens > self._most:
            raise Unusable(
                LONG_PROMPT,
                f"a prompt of {tokens} tokens with {self._frames} frames is longer than "
                f"{self._most} ({self._why}); shorten the question, or lower data.frame_budgets or "
                "data.max_pixels",
            )

    def tokens(self, row: Row) -> int:
        """Tokens of a question's prompt. All but its words is counted once, for each number of
        videos: no merge crosses the control tokens around the words."""
        videos = len(row.videos)
        if videos not in self._around:
            full = _full_prompt(self._renderer, row, self._frames, self._quota)
            self._around[videos] = full - self._words(row)
        return self._around[videos] + self._words(row)

    def _words(self, row: Row) -> int:
        return len(self._renderer.encode(self._renderer.request(row)))


def _full_prompt(renderer: ChatRenderer, row: Row, frames: int, quota: int | None) -> int:
    """Tokens of a row's prompt with frames of full size."""
    videos, spec = len(row.videos), renderer.spec
    shown = [smallest_frames(spec, share) for share in shares(frames, videos)]
    prompt = renderer.main_prompt(row, shown, tools=True)
    return full_size(prompt, spec, quota and quota * videos)


def smallest_frames(spec: FrameSpec, count: int, time: float = LATE) -> Frames:
    """Frames of one vision token each, all at one time."""
    pixels = np.zeros((count, spec.factor, spec.factor, 3), np.uint8)
    return Frames(pixels, np.full(count, time))


def full_size(prompt: Prompt, spec: FrameSpec, quota: int | None = None) -> int:
    """Tokens that a prompt of smallest frames has with frames of full size, or, if that is less,
    with `quota` vision tokens."""
    vision_tokens = int((prompt.vision_index >= 0).sum())
    full = vision_tokens * (spec.max_patches // spec.merge_size**2)
    return len(prompt.tokens) - vision_tokens + (min(full, quota) if quota else full)
