"""The needle world of a run: where its videos are, and the questions about them."""

from __future__ import annotations

from pathlib import Path

from pipelines.datasets import needle_questions
from pipelines.needle.questions import NeedleQuestion
from pipelines.needle.world import NeedleWorld
from train.data.settings import DataSettings


def needle_world(data: DataSettings) -> NeedleWorld:
    """The needle world of a run. Its seed is its own: every run sees the same videos."""
    return NeedleWorld(train_videos=data.train_videos, held_out_videos=data.held_out_videos)


def world_folder(data: DataSettings) -> str:
    """Where its videos are kept."""
    return str(Path(data.cache_dir).absolute() / "needle_world")


def questions_of_world(data: DataSettings, split: str) -> list[NeedleQuestion]:
    """Questions about the videos of a split, which are written if need be."""
    return needle_questions(needle_world(data), world_folder(data), split, data.question_types)
