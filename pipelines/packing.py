"""Conversations packed into rows of one length: an endless stream whose position can be saved.

Grain decides which conversations share a row (first fit or best fit, `num_packing_bins` rows open
at a time); their tokens and frames are put together when a row is complete.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset, FirstFitPackIterDataset

from paravt_jax.records import Conversation, Pack
from pipelines.conversation import EncodedConversation, pack
from pipelines.loader import StepStream
from pipelines.row_share import ONE_HOST, Coming, OwnRows, RowShare, shared

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
        self._limit = limit
        self.seen = self.skipped = 0

    def __call__(self, fault: str | None) -> bool:
        """One more conversation, which can be used without a `fault`; whether it can.

        Raises:
            ValueError: the share of unusable ones is above the limit.
        """
        self.seen += 1
        self.skipped += fault is not None
        most = self._limit * max(self.seen, SKIPS_SEEN)
        if fault is not None and self.skipped > most:
            raise ValueError(
                f"{self.skipped} of {self.seen} conversations cannot be used, above the share "
                f"of {self._limit:g} that data.max_rejected allows; the last one: {fault}"
            )
        return fault is None


class Encoded(NamedTuple):
    """What came of a conversation."""

    drawn: int
    """How many were drawn up to it."""
    example: EncodedConversation | None
    fault: str | None = None
    """Why there is no example."""

    def room(self) -> dict[str, Any]:
        """What Grain packs by: arrays as long as the room that each thing takes, and the rest."""
        assert self.example is not None
        sizes = {"tokens": len(self.example.tokens), "frames": self.example.frames}
        # Grain packs by the lengths of arrays and copies them: a byte for each token and frame will
        # do.
        arrays = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
        return arrays | {"example": self.example, "drawn": self.drawn}


class ConversationEncoder:
    """Renders a conversation, if it can be read and fits into a row."""

    def __init__(
        self,
        render: Callable[[Conversation], EncodedConversation],
        shape: PackShape,
        here: str = "",
    ):
        """`here` is put after the reason why one cannot be used."""
        self._render, self._shape, self._here = render, shape, here

    def __call__(self, index: int, conversation: Conversation) -> Encoded:
        """What comes of the conversation at a place of the stream."""
        try:
            example = self._render(conversation)
            self._check_room(conversation, example)
        except ValueError as error:
            return Encoded(index + 1, None, f"{error}{self._here}")
        return Encoded(index + 1, example)

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
    share: RowShare = ONE_HOST,
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
        share: which conversations are rendered by this host, and how it gets the others.

    Raises:
        ValueError: there are no conversations, or an argument is out of range. Taking a step raises
            it if too many conversations cannot be used.
    """
    if not len(conversations):
        raise ValueError("there are no conversations to pack; check --data")
    order = grain.MapDataset.source(conversations).seed(seed).shuffle().repeat()
    # By turns, as nobody knows yet which row of which step will hold one.
    own = OwnRows(ConversationEncoder(render, shape, share.here), share.begin(share.hosts))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads * share.hosts)
    coming = order.map_with_index(own).map(functools.partial(shared, share)).to_iter_dataset(ahead)
    usable = coming.map(Coming.taken).filter(lambda taken: skips(taken.outcome.fault))
    packed = FITS[fit](
        usable.map(lambda taken: taken.outcome.room()),
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
