"""The needle world of a run: its videos, the questions about them, and a model for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from models.qwen3_vl import Qwen3VLConfig
from pipelines.datasets import needle_questions
from pipelines.needle.questions import NeedleQuestion
from pipelines.needle.tasks import TaskKit, needle_examples
from pipelines.needle.tokenizer import write_processor_folder
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


def needle_folder(data: DataSettings, architecture: Mapping[str, Any]) -> Path:
    """A model folder without weights: config.json, tokenizer, processor settings.

    Args:
      architecture: its `config.json`, less the ids of tokens.
    """
    cache = Path(data.cache_dir).absolute()
    cache.mkdir(parents=True, exist_ok=True)
    # Other runs and hosts may read the folder: it appears whole or not at all.
    made = Path(tempfile.mkdtemp(dir=cache, prefix=".needle_model-"))
    write_processor_folder(str(made), needle_world(data))
    tokenizer = json.loads((made / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    full = Qwen3VLConfig.from_dict({**architecture, **tokens}).to_dict()
    (made / "config.json").write_text(json.dumps(full, indent=2), encoding="utf-8")
    return _publish(made, cache)


def _publish(made: Path, cache: Path) -> Path:
    """Move a finished folder to a name made of its content, unless it is there already."""
    content = "".join(path.read_text(encoding="utf-8") for path in sorted(made.iterdir()))
    target = cache / f"needle_model-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)
    return target
