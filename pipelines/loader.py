"""Rows to an endless, checkpointable stream of rendered prompts, by Grain."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import grain
from absl import flags

from paravt_jax.interfaces import FrameReader, Renderer
from paravt_jax.records import Prompt, Row
from pipelines.budget import check_budgets, frame_budget, shares

T = TypeVar("T")

Rows = Sequence[Row] | grain.sources.RandomAccessDataSource[Row]
"""Random access to rows: a list, or `tfds_builder.RowSource`."""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several data sets, each with its own order and epochs, drawn from by weight.

    As a sequence, the rows of one after those of the other.
    """

    sources: tuple[Rows, ...]
    weights: tuple[float, ...]
    """Relative; they need not sum to 1."""

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Row:
        for source in self.sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(index)


class PromptItem(NamedTuple):
    """A question, the number of frames K that its prompt shows, and the prompt."""

    row: Row
    frame_budget: int
    prompt: Prompt


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which row to show, in which epoch."""

    row: Row
    epoch: int


class PromptMaker:
    """Decodes and renders the prompt of a row: the part of the stream that takes time."""

    def __init__(
        self,
        reader: FrameReader,
        renderer: Renderer,
        budgets: Sequence[int],
        seed: int,
        tools: bool = True,
    ):
        check_budgets(budgets)
        self._reader, self._renderer = reader, renderer
        self._budgets, self._seed, self._tools = tuple(budgets), seed, tools

    def __call__(self, draw: Draw) -> PromptItem:
        """Draw K for the row, decode K frames, render.

        Raises:
            ValueError: a video cannot be read (the message names the file), or there are more
                videos than frames.
        """
        row = draw.row
        budget = frame_budget(self._seed, draw.epoch, row.row_id, self._budgets)
        each = zip(row.videos, shares(budget, len(row.videos)), strict=True)
        frames = [self._reader.overview(video, count) for video, count in each]
        return PromptItem(row, budget, self._renderer.main_prompt(row, frames, self._tools))


class StepStream(Generic[T]):
    """Endless iterator of steps, each a list of items; its position can be saved."""

    def __init__(self, steps: grain.IterDataset):
        self._iterator = iter(steps)
        # Threads and workers that outlive the interpreter's modules die noisily.
        self.close = weakref.finalize(self, self._iterator.close)
        """Stop decoding ahead; done by itself when the stream goes out of use."""

    def __iter__(self) -> StepStream[T]:
        return self

    def __next__(self) -> list[T]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Position after the last step that was taken, as JSON values."""
        return self._iterator.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; the arguments of the stream must be the same."""
        self._iterator.set_state(state)


PromptStream = StepStream[PromptItem]


def prompt_stream(
    rows: Rows | Mixture,
    reader: FrameReader,
    renderer: Renderer,
    budgets: Sequence[int],
    groups_per_step: int,
    seed: int,
    tools: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    workers: int = 0,
) -> PromptStream:
    """Compose the stream: shuffle anew each epoch, take this process' share, draw K, decode, batch.

    Args:
        rows: the questions; of a mixture, any stretch of the stream has the data sets in
            proportion to their weights, and each shows all its rows once before it repeats one.
        budgets: choices of K (frame gating); one value switches gating off.
        groups_per_step: prompts of one step of this process.
        tools: whether the prompts offer the crop tool.
        process_index, process_count: this process takes every `process_count`-th row of the
            common order (of each data set).
        threads: rows decoded side by side, ahead of their use.
        workers: decode in this many worker processes instead, each with `threads` threads. The
            order stays the same; a saved position fits the same number of workers only.

    Raises:
        ValueError: an argument is out of range.
    """
    _check(rows, groups_per_step, process_index, process_count)
    mixed = rows if isinstance(rows, Mixture) else Mixture((rows,), (1.0,))
    parts = [
        _draws(source, seed + number)[process_index::process_count]
        for number, source in enumerate(mixed.sources)
    ]
    draws = grain.MapDataset.mix(parts, mixed.weights) if len(parts) > 1 else parts[0]
    prompts = draws.map(PromptMaker(reader, renderer, budgets, seed, tools))
    ahead = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, 2 * groups_per_step)
    )
    prompts = prompts.to_iter_dataset(ahead)
    if workers:
        # Grain reads absl flags when it starts workers, and insists that they were parsed.
        flags.FLAGS.mark_as_parsed()
        prompts = prompts.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return PromptStream(prompts.batch(groups_per_step, batch_fn=list))


def _draws(rows: Rows, seed: int) -> grain.MapDataset[Draw]:
    """Epoch after epoch, every row once in each, in an order of its own."""
    length = len(rows)
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    return order.map_with_index(lambda index, row: Draw(row, index // length))


def prompt_list(
    rows: Rows, reader: FrameReader, renderer: Renderer, budget: int, tools: bool = True
) -> list[PromptItem]:
    """One prompt of K = `budget` frames for every row, in their order: what an evaluation takes.

    Raises:
        ValueError: `budget` is not positive, or a video cannot be read.
    """
    make = PromptMaker(reader, renderer, (budget,), seed=0, tools=tools)
    return [make(Draw(rows[index], epoch=0)) for index in range(len(rows))]


def _check(
    rows: Rows | Mixture, groups_per_step: int, process_index: int, process_count: int
) -> None:
    empty = isinstance(rows, Mixture) and min(map(len, rows.sources)) == 0
    if len(rows) == 0 or empty:
        raise ValueError("rows is empty: check the question types and the question file")
    if groups_per_step < 1:
        raise ValueError(f"groups_per_step={groups_per_step} must be at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: must be 0 to {process_count - 1}")
