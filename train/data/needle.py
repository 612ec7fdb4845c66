"""The needle world of a run: its videos, the questions and supervised examples about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.datasets import needle_questions
from pipelines.needle.questions import NeedleQuestion
from pipelines.needle.tasks import TaskKit, needle_examples
from pipelines.needle.world import NeedleWorld
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from rollout.limits import AgentConfig
from rollout.tools import agent_tools
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


def needle_sources(
    data: DataSettings,
    agent: AgentConfig,
    tasks: Iterable[str],
    seed: int,
    renderer: ChatRenderer,
    reader: VideoReader,
) -> dict[str, Any]:
    """Endless supervised examples of each of the tasks, as the agent is to do them."""
    kit = TaskKit(
        needle_world(data),
        questions_of_world(data, "train"),
        reader,
        renderer,
        data.frame_budgets,
        tool=next(iter(agent_tools(agent))),
        syntax=agent.call_syntax,
        quota=agent.clip_tokens[1] if agent.clip_tokens else None,
        most_looks=agent.max_tool_rounds,
    )
    return {task: needle_examples(kit, task, seed) for task in tasks}
