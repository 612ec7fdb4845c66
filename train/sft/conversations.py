"""The conversations of a run: read, checked, rendered and packed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paravt_jax.records import Conversation
from pipelines.conversation import ConversationRenderer, FrameRate, TextCheck
from pipelines.datasets import Found, sft_rows
from pipelines.packing import PackShape, UnusableCount, pack_stream
from pipelines.render import ChatRenderer
from pipelines.row_share import ONE_HOST, RowShare
from pipelines.tfds_builder import row_source
from pipelines.video import VideoReader
from train.data.questions import check_rejected, check_subtitles
from train.data.settings import DataSettings
from train.sft.batches import PackedData
from train.sft.settings import PackSettings


def open_conversations(
    data: DataSettings, renderer: ChatRenderer | None = None
) -> Found[Conversation]:
    """The conversations of `--data`, as far as the renderer's tokenizer can write them.

    Raises:
      ValueError: a file that cannot be read, more unusable rows than `data.max_rejected`, or
        subtitles are asked for and no video has any.
    """
    assert data.path is not None
    check = TextCheck(renderer.tokenizer) if renderer else lambda row: None
    data_set = sft_rows(data.path, data.video_root, check)
    check_rejected(data_set, data.path, data.max_rejected)
    check_subtitles(data, (video for row in data_set.rows for video in row.videos))
    return data_set


def pack_conversations(
    conversations: Sequence[Conversation],
    packing: PackSettings,
    data: DataSettings,
    seed: int,
    renderer: ChatRenderer,
    reader: VideoReader,
    *,
    tools: bool,
    most_tokens: tuple[int, int],
    share: RowShare = ONE_HOST,
) -> PackedData:
    """The stream of packed conversations, which are written to the data cache first.

    Args:
      tools: whether prompts offer the agent's tools.
      most_tokens: conversations with longer prompts are skipped, and those that are longer
        altogether.
      share: see `pack_stream`.
    """
    skips, frames = (
        UnusableCount(data.max_rejected),
        FrameRate(packing.fps, most=packing.max_frames),
    )
    render = ConversationRenderer(
        renderer, reader, frames, packing.learn, packing.system, tools, most_tokens
    )
    stream = pack_stream(
        row_source(conversations, str(Path(data.cache_dir).absolute() / "rows")),
        render,
        PackShape(packing.tokens, packing.frames),
        packing.rows,
        seed,
        skips,
        fit=packing.fit,
        bins=packing.bins,
        share=share,
    )
    patches = max(renderer.spec.max_patches, render.image_spec.max_patches)
    return PackedData(packing, stream, skips, renderer.pad_id, patches, len(conversations))
