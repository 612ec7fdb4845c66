"""Task-decoupled attention masks for a share of the supervised rows (`paravt_jax.task_masks`)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from paravt_jax.records import LearnerBatch
from paravt_jax.structure import TagTable
from paravt_jax.task_masks import FIRST_VIDEO, LATER_VIDEOS, task_masks
from train.batch import LearnerStream


@dataclasses.dataclass(frozen=True)
class TaskMasking:
    """Draws the rows, and gives their batch what they may not see."""

    share: float
    """Probability that a row is masked."""
    seed: int
    tags: TagTable
    """What finds answers and calls."""
    predictor: bool = True
    """Whether the token that predicts the first word of a span is masked too."""

    def __call__(
        self, batch: LearnerBatch, streams: Sequence[LearnerStream], place: Sequence[int]
    ) -> LearnerBatch:
        """The batch with `hidden_keys`. The draw depends on seed and `place`, numbers that tell
        this batch from all others of the run, and on nothing else."""
        rng = np.random.default_rng([self.seed, *place])
        rows = rng.random(len(streams)) < self.share
        generated = np.arange(batch.tokens.shape[1]) >= prompt_lengths(streams)[:, None]
        videos = np.where(generated, LATER_VIDEOS, FIRST_VIDEO) * (batch.vision_index >= 0)
        hidden = self._masks(batch.tokens, generated, videos, rows, self.tags)
        return dataclasses.replace(batch, hidden_keys=jax.tree.map(np.asarray, hidden))

    @functools.cached_property
    def _masks(self):
        return jax.jit(functools.partial(task_masks, predictor=self.predictor))


def prompt_lengths(streams: Sequence[LearnerStream]) -> np.ndarray:
    """int64 `[b]`: tokens before what the agent says and is told."""
    return np.array([len(stream.prompt.tokens) for stream in streams])
