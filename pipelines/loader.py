"""Rows to an endless, checkpointable stream of rendered prompts, by Grain."""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeGuard, TypeVar

import grain
from absl import flags

from paravt_jax.interfaces import FrameReader, Renderer
from paravt_jax.records import Frames, Prompt, Row
from pipelines.budget import check_budgets, frame_budget, shares
from pipelines.container import UnreadableVideo
from pipelines.faults import Unusable
from pipelines.row_share import ONE_HOST, Coming, OwnRows, RowShare, Taken, shared
from pipelines.subtitles import UnreadableSubtitles

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

ByShare = Callable[[Sequence[Row], Callable[[Sequence[Row]], Iterable[Any]]], Iterable[Any]]
"""What work gives for rows, in their order, whoever of several hosts does it."""

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


class BadRow(NamedTuple):
    """A row whose video or subtitles cannot be read, or that cannot be put into a prompt."""

    row_id: str
    reason: str


class BadRows:
    """Leaves out rows that cannot be read: counts them, tells each once, and refuses too many.

    Args:
        rows: how many rows there are.
        limit: largest share of them that may be bad.
    """

    def __init__(self, rows: int, limit: float):
        self.total, self._limit = rows, limit
        self.ids: set[str] = set()
        """The bad rows so far."""
        self.seen = 0
        """Rows looked at so far, bad ones included."""

    def is_good(self, item: PromptItem | BadRow) -> TypeGuard[PromptItem]:
        """Whether there is a prompt; if not, take note of why.

        Raises:
            ValueError: the share of bad rows is above the limit, or all are bad.
        """
        self.seen += 1
        if isinstance(item, PromptItem):
            return True
        if item.row_id not in self.ids:
            self.ids.add(item.row_id)
            _LOG.warning("row %s is left out: %s", item.row_id, item.reason)
        if len(self.ids) > self._limit * self.total or len(self.ids) == self.total:
            raise ValueError(
                f"{len(self.ids)} of {self.total} rows cannot be read, more than data.max_bad_rows="
                f"{self._limit:g} allows; mend or remove them, or raise it. The last one is "
                f"{item.row_id}: {item.reason}"
            )
        return False


@dataclasses.dataclass(frozen=True)
class DrawnRow:
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
        here: str = "",
    ):
        """`here` is put after the reason why a row cannot be read."""
        check_budgets(budgets)
        self._reader, self._renderer = reader, renderer
        self._budgets, self._seed, self._tools = tuple(budgets), seed, tools
        self._here = here

    def at(self, index: int, draw: DrawnRow) -> PromptItem | BadRow:
        """The same, for a row of a stream; its place there decides nothing."""
        return self(draw)

    def __call__(self, draw: DrawnRow) -> PromptItem | BadRow:
        """Draw K for the row, decode K frames, render; or say what cannot be read.

        Raises:
            ValueError: there are more videos than frames.
        """
        row = draw.row
        budget = frame_budget(self._seed, draw.epoch, row.row_id, self._budgets)
        try:
            frames = overviews(self._reader, row, budget)
            prompt = self._renderer.main_prompt(row, frames, self._tools)
        except (UnreadableVideo, UnreadableSubtitles, Unusable) as error:
            return BadRow(row.row_id, f"{error}{self._here}")
        return PromptItem(row, budget, prompt)


def _with_own_row(taken: Taken) -> PromptItem | BadRow:
    """The prompt of a row, whose file may lie elsewhere on the host that made it."""
    item = taken.outcome
    return item._replace(row=taken.row.row) if isinstance(item, PromptItem) else item


def overviews(reader: FrameReader, row: Row, budget: int) -> list[Frames]:
    """Frames of each of the row's videos, which share the budget.

    Raises:
        UnreadableVideo: one of them cannot be read.
        ValueError: there are more videos than frames.
    """
    each = zip(row.videos, shares(budget, len(row.videos)), strict=True)
    return [reader.overview(video, count) for video, count in each]


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


class PromptStream(StepStream[PromptItem]):
    """Steps of prompts, without the rows that cannot be read."""

    def __init__(self, steps_from: Callable[[int], grain.IterDataset], bad_rows: BadRows):
        """`steps_from` gives the steps that begin with a row of the stream."""
        super().__init__(steps_from(0))
        self._steps_from, self._bad_rows = steps_from, bad_rows

    @property
    def metrics(self) -> dict[str, float]:
        """How often all questions were shown, and the bad rows so far, for `metrics.jsonl`."""
        return {
            "data/epoch": self._bad_rows.seen / self._bad_rows.total,
            "data/bad_rows": float(len(self._bad_rows.ids)),
        }

    def get_state(self) -> dict[str, Any]:
        """Position after the last step that was taken, and the bad rows, as JSON values."""
        return {"position": self._bad_rows.seen, "bad_rows": sorted(self._bad_rows.ids)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved position; the arguments of the stream must be the same, but for the
        number of workers: a position counts rows, whoever decodes them.

        Raises:
            ValueError: an earlier version wrote it, which knew its own worker processes only.
        """
        position = state["position"]
        if isinstance(position, dict):  # as Grain has it, where it counts rows with threads alone
            position = position.get("next_index")
        if position is None:
            raise ValueError(
                "the position of the data was saved by an earlier version with data.workers above "
                "0; continue with that version, or start again with another --workdir"
            )
        self.close()
        super().__init__(self._steps_from(position))
        self._bad_rows.ids, self._bad_rows.seen = set(state["bad_rows"]), position


def prompt_stream(
    rows: Rows | Mixture,
    reader: FrameReader,
    renderer: Renderer,
    budgets: Sequence[int],
    groups_per_step: int,
    seed: int,
    tools: bool = True,
    threads: int = 4,
    workers: int = 0,
    max_bad_rows: float = 0.0,
    steps_ahead: int = 2,
    share: RowShare = ONE_HOST,
) -> PromptStream:
    """Compose the stream: shuffle anew each epoch, draw K, decode, leave out what cannot be read,
    batch. Batches are always full.

    Args:
        rows: the questions; of a mixture, any stretch of the stream has the data sets in
            proportion to their weights, and each shows all its rows once before it repeats one.
        budgets: choices of K (frame gating); one value switches gating off.
        groups_per_step: prompts of one step.
        tools: whether the prompts offer the tools.
        threads: rows decoded side by side, ahead of their use.
        workers: decode in this many worker processes instead, each with `threads` threads. The
            order and saved positions stay the same.
        max_bad_rows: share of the rows that may turn out to be unreadable and are left out.
        steps_ahead: steps whose prompts are made before they are asked for.
        share: which rows are made by this host, and how it gets the others.

    Raises:
        ValueError: an argument is out of range. Taking a step raises it if too many rows are bad.
    """
    _check(rows, groups_per_step)
    mixed = rows if isinstance(rows, Mixture) else Mixture((rows,), (1.0,))
    parts = [_draws(source, seed + number) for number, source in enumerate(mixed.sources)]
    draws = grain.MapDataset.mix(parts, mixed.weights) if len(parts) > 1 else parts[0]
    make = PromptMaker(reader, renderer, budgets, seed, tools, share.here)
    ahead = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, steps_ahead * groups_per_step)
    )
    told = functools.partial(shared, share)
    bad_rows = BadRows(len(rows), max_bad_rows)

    def steps_from(start: int) -> grain.IterDataset:
        own = OwnRows(make.at, share.begin(groups_per_step))
        made = draws.map_with_index(own)[start:]
        if workers:
            # Grain reads absl flags when it starts workers, and insists that they were parsed.
            flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers)
            coming = made.to_iter_dataset(ahead).mp_prefetch(options).map(told)
        else:
            coming = made.map(told).to_iter_dataset(ahead)
        # Behind the worker processes, so that one place sees every row that is left out.
        prompts = coming.map(Coming.taken).map(_with_own_row).filter(bad_rows.is_good)
        return prompts.batch(groups_per_step, batch_fn=list)

    return PromptStream(steps_from, bad_rows)


def _draws(rows: Rows, seed: int) -> grain.MapDataset[DrawnRow]:
    """Epoch after epoch, every row once in each, in an order of its own."""
    length = len(rows)
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat()
    return order.map_with_index(lambda index, row: DrawnRow(row, index // length))


def prompt_list(
    rows: Rows,
    reader: FrameReader,
    renderer: Renderer,
    budget: int,
    tools: bool = True,
    max_bad_rows: float = 0.0,
    made: Callable[[], object] = lambda: None,
    by_share: ByShare = lambda rows, work: work(rows),
) -> list[PromptItem]:
    """One prompt of K = `budget` frames for every row, in their order: what an evaluation takes.
    `made` is called after each that is made here; `by_share` has each of several hosts make some.

    Raises:
        ValueError: `budget` is not positive, or more than a share of `max_bad_rows` of the rows
            cannot be read.
    """
    make = PromptMaker(reader, renderer, (budget,), seed=0, tools=tools)
    bad_rows = BadRows(len(rows), max_bad_rows)

    def made_of(own: Sequence[Row]) -> Iterator[PromptItem | BadRow]:
        for row in own:
            yield make(DrawnRow(row, epoch=0))
            made()

    whole = [rows[index] for index in range(len(rows))]
    good: list[PromptItem] = []
    for row, item in zip(whole, by_share(whole, made_of), strict=True):
        if bad_rows.is_good(item):
            good.append(item._replace(row=row))
    return good


def _check(rows: Rows | Mixture, groups_per_step: int) -> None:
    empty = isinstance(rows, Mixture) and min(map(len, rows.sources)) == 0
    if len(rows) == 0 or empty:
        raise ValueError("rows is empty: check the question types and the question file")
    if groups_per_step < 1:
        raise ValueError(f"groups_per_step={groups_per_step} must be at least 1")
