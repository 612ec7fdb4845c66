"""DeepVideo-R1's difficulty-aware augmentation (arXiv 2506.07464, section on data augmentation).

    Delta(x) = mean reward of the last W groups - mean reward of the group of x

A group that falls behind is hard: its rollouts are sampled again with a hint, the beginning of a
good solution, the longer the further it falls behind. A group that is ahead is easy: its rollouts
are sampled again from noisy frames, the noisier the further it is ahead. The learner gets the
groups that were sampled last, prompts included; neither hint nor noise is trained.

What the paper leaves open, by our choice: the window counts groups, and only those sampled without
help; hints and noise grow linearly up to `difficulty.scale`; a hint stands after the question; the
solution is the best of `difficulty.traces` that were told the answer, and is used if it beats the
group's mean.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from paravt_jax.interfaces import FrameReader
from paravt_jax.protocol import ANSWER_OPEN
from paravt_jax.records import Frames, Prompt, RolloutGroup, Trajectory
from pipelines.loader import PromptItem, overviews
from pipelines.render import ChatRenderer
from rollout.record import derive_seed
from rollout.responses import strip_markup
from train.hosts.share import by_share
from train.methods.settings import DifficultySettings
from train.rl.loop import RolloutSampler
from train.state import FlatParams

SampleAnew = Callable[[Iterable[PromptItem], int, str], list[RolloutGroup]]
"""Prompts, rollouts of each and the purpose, which decides the seed, to scored groups."""

_ANSWER_HINT = "The answer is {words}. Show how to find it."
_TRACE_HINT = "A good solution begins like this: {words}"
_SLACK = 8
"""Tokens by which a hint may grow where its words meet those around them."""


def hint_room(settings: DifficultySettings, renderer: ChatRenderer) -> int:
    """Most tokens by which a hint makes a prompt longer."""
    if not settings.window:
        return 0
    around = [hint.format(words="") for hint in (_ANSWER_HINT, _TRACE_HINT)]
    longest = max(len(renderer.encode(f"\n\n{text}")) for text in around)
    return longest + settings.hint_tokens + _SLACK


class Difficulty:
    """Samples like another, and samples anew for prompts that proved hard or easy."""

    def __init__(
        self,
        sample: RolloutSampler,
        settings: DifficultySettings,
        renderer: ChatRenderer,
        reader: FrameReader,
        tools: bool,
    ) -> None:
        """With `tools`, prompts offer them."""
        self._sample, self._settings = sample, settings
        self._renderer, self._reader, self._tools = renderer, reader, tools
        self._window = collections.deque[float](maxlen=settings.window)
        self.metrics: dict[str, float] = {}
        """What the last step did, for `metrics.jsonl`."""

    def __call__(
        self, params: FlatParams, prompts: Sequence[PromptItem], copies: int, seed: int, step: int
    ) -> list[RolloutGroup]:
        """See `RolloutSampler`. Groups of hard and of easy prompts are sampled anew."""

        def again(chosen: Iterable[PromptItem], copies: int, purpose: str) -> list[RolloutGroup]:
            items = list(chosen)
            if not items:
                return []
            return self._sample(params, items, copies, derive_seed(seed, purpose), step)

        groups = self._sample(params, prompts, copies, seed, step)
        means = [mean_reward(group) for group in groups]
        deltas = [self.delta(mean) for mean in means]
        self._window.extend(means)
        hinted = self._with_hints(again, prompts, means, deltas)
        noisy = self._with_noises(prompts, deltas, seed)
        self.metrics = {
            "difficulty/delta": float(np.mean(np.abs(deltas))),
            "difficulty/helped": len(hinted) / len(groups),
            "difficulty/disturbed": len(noisy) / len(groups),
            "difficulty/reward_before": float(np.mean(means)),
        }
        changed = hinted | noisy
        anew = again(changed.values(), copies, "again")
        return list((dict(enumerate(groups)) | dict(zip(changed, anew, strict=True))).values())

    def get_state(self) -> list[float]:
        """The mean rewards in the window, oldest first."""
        return list(self._window)

    def set_state(self, state: Sequence[float]) -> None:
        """Go on from a saved window."""
        self._window.extend(state)

    def delta(self, mean: float) -> float:
        """How far a group of this mean reward falls behind the window; 0 while that is empty."""
        return float(np.mean(self._window)) - mean if self._window else 0.0

    def _share(self, delta: float) -> float:
        return min(abs(delta) / self._settings.scale, 1.0)

    def _with_hints(
        self,
        sample: SampleAnew,
        prompts: Sequence[PromptItem],
        means: Sequence[float],
        deltas: Sequence[float],
    ) -> dict[int, PromptItem]:
        """Hard prompts with the beginning of a good solution, where one was found."""
        hard = [at for at, delta in enumerate(deltas) if delta > self._settings.tolerance]
        items = [self._hinted(prompts[at], _ANSWER_HINT, prompts[at].row.answer) for at in hard]
        hinted = {}
        groups = sample(items, self._settings.traces, "traces")
        for at, group in zip(hard, groups, strict=True):
            best = max(group.trajectories, key=lambda t: t.rewards["total"])
            words = self.beginning(best, deltas[at])
            if words and best.rewards["total"] > means[at]:
                hinted[at] = self._hinted(prompts[at], _TRACE_HINT, words)
        return hinted

    def beginning(self, trace: Trajectory, delta: float) -> str:
        """The first words of a solution, the more the harder the question; never its answer."""
        words = strip_markup(trace.scored_text.rpartition(ANSWER_OPEN)[0])
        tokens = self._renderer.encode(words)
        count = round(self._settings.longest_hint * self._share(delta) * len(tokens))
        return self._renderer.decode(tokens[:count]).rstrip("\ufffd")

    def _hinted(self, item: PromptItem, hint: str, words: str) -> PromptItem:
        words = shortened(self._renderer, words, self._settings.hint_tokens)
        text = hint.format(words=words)
        prompt = self._renderer.with_hint(item.row, item.prompt, self._tools, text)
        return item._replace(prompt=prompt)

    def _with_noises(
        self, prompts: Sequence[PromptItem], deltas: Sequence[float], seed: int
    ) -> dict[int, PromptItem]:
        """Easy prompts with noise in their frames."""
        easy = [at for at, delta in enumerate(deltas) if delta < -self._settings.tolerance]
        noisy = by_share(
            easy, lambda places: [self._noisy(prompts[at], deltas[at], seed) for at in places]
        )
        return {at: prompts[at]._replace(prompt=new) for at, new in zip(easy, noisy, strict=True)}

    def _noisy(self, item: PromptItem, delta: float, seed: int) -> Prompt:
        std = self._settings.noise * self._share(delta)
        noisy = [
            with_noise(frames, std, derive_seed(seed, item.row.row_id, "noise", number))
            for number, frames in enumerate(overviews(self._reader, item.row, item.frame_budget))
        ]
        return self._renderer.main_prompt(item.row, noisy, self._tools)


def mean_reward(group: RolloutGroup) -> float:
    """Mean total reward of a scored group."""
    return float(np.mean([t.rewards["total"] for t in group.trajectories]))


def with_noise(frames: Frames, std: float, seed: int) -> Frames:
    """Frames with Gaussian noise on every value; `std` is a share of the range of a value."""
    noise = np.random.default_rng(seed).normal(0.0, 255 * std, frames.pixels.shape)
    pixels = np.clip(np.rint(frames.pixels + noise), 0, 255).astype(np.uint8)
    return dataclasses.replace(frames, pixels=pixels)


def shortened(renderer: ChatRenderer, text: str, most: int) -> str:
    """The beginning of a text that is at most so many tokens long."""
    limit = most
    while len(tokens := renderer.encode(text)) > most:
        # A cut may fall inside a character of several bytes, or make other tokens of what is left.
        text, limit = renderer.decode(tokens[:limit]).rstrip("\ufffd"), limit - 1
    return text
