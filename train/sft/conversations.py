"""The conversations of a run: read, checked, rendered and packed."""

from __future__ import annotations

import dataclasses
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
    found = sft_rows(data.path, data.video_root, check)
    check_rejected(found, data.path, data.max_rejected)
    check_subtitles(data, (video for row in found.rows for video in row.videos))
    return found


def system_note(
    packing: PackSettings, agents: str, conversations: Sequence[Conversation]
) -> list[str]:
    """Says, if so, that the agent's system text takes the place of other ones."""
    others = sum(
        any(is_system(m) and m.content != (agents,) for m in own.messages) for own in conversations
    )
    if packing.system != "agent" or not others:
        return []
    return [
        f"{others} of {len(conversations)} conversations have a system message of their own: the "
        "text and the tools of rollouts take its place (sft.packing.system=own keeps it)"
    ]


@dataclasses.dataclass(frozen=True)
class ConversationPacker:
    """Shows conversations and puts them into rows."""

    packing: PackSettings
    data: DataSettings
    seed: int
    renderer: ChatRenderer
    reader: VideoReader
    tools: bool
    """Whether prompts offer the agent's tools."""
    prompt_tokens: int
    """Those with longer prompts are skipped, ..."""
    positions: int
    """... and those that are longer than a stream of the model may be."""

    def packed(self, conversations: Sequence[Conversation]) -> PackedData:
        """The stream of packed conversations, which are written to the data cache first."""
        own, skips = self.packing, UnusableCount(self.data.max_rejected)
        render = ConversationRenderer(
            self.renderer,
            self.reader,
            FrameRate(own.fps, most=own.max_frames),
            own.learn,
            own.system,
            self.tools,
            (self.prompt_tokens, self.positions),
        )
        stream = pack_stream(
            row_source(conversations, str(Path(self.data.cache_dir).absolute() / "rows")),
            render,
            PackShape(own.tokens, own.frames),
            own.rows,
            self.seed,
            skips,
            fit=own.fit,
            bins=own.bins,
        )
        pad_id, patches = self.renderer.pad_id, self.renderer.spec.max_patches
        patches = max(patches, render.image_spec.max_patches)
        return PackedData(own, stream, skips, pad_id, patches, len(conversations))
