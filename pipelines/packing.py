"""Conversations packed into rows of one length: an endless stream whose position can be saved.

Grain decides which conversations share a row (first fit or best fit, `num_packing_bins` rows open
at a time); their tokens and frames are put together when a row is complete.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset, FirstFitPackIterDataset

from paravt_jax.records import Conversation, Pack
from pipelines.conversation import EncodedConversation, pack
from pipelines.loader import StepStream

FITS = {"first": FirstFitPackIterDataset, "best": BestFitPackIterDataset}
"""Where a conversation goes: the first open row that has room, or the one it leaves least of."""
SKIPS_SEEN = 20
"""Conversations that are looked at before the share of skipped ones can end a run."""

Conversations = Sequence[Conversation] | grain.sources.RandomAccessDataSource[Conversation]


class PackShape(NamedTuple):
    """Room of a row."""

    tokens: int
    frames: int
    """What the vision tower sees as frames: pairs of them as a video."""


class UnusableCount:
    """Counts conversations that cannot be used, and ends the run when they are too many.

    Args:
        limit: largest share of unusable conversations, once `SKIPS_SEEN` were looked at.
    """

    def __init__(self, limit: float):
        self._limit, self._lock = limit, threading.Lock()
        self.seen = self.skipped = 0

    def __call__(self, reason: str | None) -> None:
        """One more conversation; `reason` says why it cannot be used.

        Raises:
            ValueError: the share of unusable ones is above the limit.
        """
        with self._lock:
            self.seen += 1
            self.skipped += reason is not None
            most = self._limit * max(self.seen, SKIPS_SEEN)
            if reason is not None and self.skipped > most:
                raise ValueError(
                    f"{self.skipped} of {self.seen} conversations cannot be used, above the share "
                    f"of {self._limit:g} that data.max_rejected allows; the last one: {reason}"
                )


class ConversationEncoder:
    """Renders a conversation, or skips it if it cannot be read or does not fit into a row."""

    def __init__(
        self,
        render: Callable[[Conversation], EncodedConversation],
        shape: PackShape,
        skips: UnusableCount,
    ):
        self._render, self._shape, self._skips = render, shape, skips

    def __call__(self, index: int, conversation: Conversation) -> dict[str, Any] | None:
        """What Grain packs by: arrays as long as the room that each thing takes, the example,
        and how many conversations were drawn up to it. None is left out by Grain.

        Raises:
            ValueError: too many conversations cannot be used.
        """
        try:
            example = self._render(conversation)
            self._check_room(conversation, example)
        except ValueError as error:
            self._skips(str(error))
            return None
        self._skips(None)
        room = {"tokens": len(example.tokens), "frames": example.frames}
        # Grain packs by the lengths of arrays and copies them: a byte for each token and frame will
        # do.
        arrays = {name: np.zeros(size, np.uint8) for name, size in room.items()}
        return arrays | {"example": example, "drawn": index + 1}

    def _check_room(self, conversation: Conversation, example: EncodedConversation) -> None:
        size = PackShape(len(example.tokens), example.frames)
        if size.tokens > self._shape.tokens or size.frames > self._shape.frames:
            raise ValueError(
                f"row {conversation.row_id}: {size.tokens} tokens and {size.frames} frames do not "
                f"fit into {self._shape.tokens} and {self._shape.frames}; raise sft.packing.tokens "
                "or sft.packing.frames, or show fewer frames"
            )


def pack_stream(
    conversations: Conversations,
    render: Callable[[Conversation], EncodedConversation],
    shape: PackShape,
    packs_per_step: int,
    seed: int,
    skips: UnusableCount,
    *,
    fit: Literal["first", "best"] = "first",
    bins: int = 64,
    threads: int = 4,
) -> StepStream[Pack]:
    """Compose the stream: shuffle anew each epoch, render, pack, batch.

    Args:
        conversations: the rows.
        render: makes the example of a conversation (`ConversationRenderer`).
        shape: room of a row; conversations that do not fit into it are skipped.
        packs_per_step: rows of one step.
        seed: of the order.
        skips: counts what cannot be used.
        fit: one of `FITS`.
        bins: rows open at a time. More of them are filled better, and take longer to begin (16 fill
            0.95 of their tokens, 64 fill 0.97, see `docs/log.md`).
        threads: conversations rendered side by side, ahead of their use.

    Raises:
        ValueError: there are no conversations, or an argument is out of range.
    """
    if not len(conversations):
        raise ValueError("there are no conversations to pack; check --data")
    order = grain.MapDataset.source(conversations).seed(seed).shuffle().repeat()
    examples = order.map_with_index(ConversationEncoder(render, shape, skips))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    packed = FITS[fit](
        examples.to_iter_dataset(ahead),
        length_struct=shape._asdict(),
        num_packing_bins=bins,
        seed=seed,
        meta_features=("example", "drawn"),
    )
    return StepStream(packed.map(_row).batch(packs_per_step, batch_fn=list))


def _row(packed: dict[str, Any]) -> Pack:
    return dataclasses.replace(pack(packed["example"]), drawn=max(packed["drawn"]))


def fill(packs: Sequence[Pack], tokens: int) -> float:
    """Share of the rows' tokens that is used, the rest being padding."""
    return sum(len(item.stream.tokens) for item in packs) / (tokens * len(packs))


def conversations_in(packs: Sequence[Pack]) -> int:
    """How many conversations the rows hold."""
    return sum(int(item.segments[-1]) for item in packs)
