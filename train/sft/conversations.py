"""The conversations of a run: read, checked, rendered and packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paravt_jax.records import Conversation
from pipelines.conversation import (
    ConversationRenderer,
    FrameRate,
    TextCheck,
    is_system,
)
from pipelines.datasets import Found, sft_rows
from pipelines.packing import PackShape, UnusableCount, pack_stream
from pipelines.render import ChatRenderer
from pipelines.tfds_builder import row_source
from pipelines.video import VideoReader
from train.config import Config
from train.data.questions import check_rejected, check_subtitles
from train.setup import prompt_room, prompt_texts
from train.sft.batches import PackedLessons


def open_conversations(config: Config, renderer: ChatRenderer | None = None) -> Found[Conversation]:
    """The conversations of `--data`, as far as the renderer's tokenizer can write them.

    Raises:
      ValueError: a file that cannot be read, more unusable rows than `data.max_rejected`, or
        subtitles are asked for and no video has any.
    """
    data = config.data
    assert data.path is not None
    check = TextCheck(renderer.tokenizer) if renderer else lambda row: None
    found = sft_rows(data.path, data.video_root, check)
    check_rejected(found, data.path, data.max_rejected)
    check_subtitles(data, (video for row in found.rows for video in row.videos))
    return found


def system_note(config: Config, conversations: Sequence[Conversation]) -> list[str]:
    """Says, if so, that the agent's system text takes the place of other ones."""
    texts = prompt_texts(config)
    agents = texts.system + (texts.tools if config.agent.offers_tools else "")
    others = sum(
        any(is_system(m) and m.content != (agents,) for m in own.messages) for own in conversations
    )
    if config.sft.packing.system != "agent" or not others:
        return []
    return [
        f"{others} of {len(conversations)} conversations have a system message of their own: the "
        "text and the tools of rollouts take its place (sft.packing.system=own keeps it)"
    ]


def packed_lessons(
    config: Config,
    conversations: Sequence[Conversation],
    renderer: ChatRenderer,
    reader: VideoReader,
    positions: int,
) -> PackedLessons:
    """The stream of packed conversations, which are written to the data cache first; those with
    longer prompts than `data.max_prompt_tokens`, or more tokens than `positions`, are skipped."""
    own, skips = config.sft.packing, UnusableCount(config.data.max_rejected)
    render = ConversationRenderer(
        renderer,
        reader,
        FrameRate(own.fps, most=own.max_frames),
        own.learn,
        own.system,
        config.agent.offers_tools,
        (prompt_room(config, renderer, positions).tokens, positions),
    )
    stream = pack_stream(
        row_source(conversations, str(Path(config.data.cache_dir).absolute() / "rows")),
        render,
        PackShape(own.tokens, own.frames),
        own.rows,
        config.seed,
        skips,
        fit=own.fit,
        bins=own.bins,
    )
    patches = max(renderer.spec.max_patches, render.image_spec.max_patches)
    return PackedLessons(own, stream, skips, renderer.pad_id, patches, len(conversations))
