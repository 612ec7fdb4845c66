"""Every shape that rollouts can take, compiled before the first of them.

A run must not stop to compile in the middle: at 8B a compilation takes longer than a step. What
can be asked of a lane is known beforehand (`Reads`), static sizes are few, so all of them are
asked once, of a session, with requests that mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np

from paravt_jax.blocks import text_block
from paravt_jax.interfaces import Params
from paravt_jax.records import Patches, Prompt
from rollout.engine.engine import Engine, Lane
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import (
    APPEND_LEAST,
    BATCH,
    NEVER,
    PROMPT_LEAST,
    SILENT,
    Session,
    static_size,
)

Size = tuple[int, int]
"""Tokens and frames of something to read."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """Blocks with this many frames have from `least` to `most` tokens."""

    frames: int
    least: int
    most: int

    def sizes(self, unit: int, cap: int) -> Iterator[Size]:
        """One block of each static size, the largest that there is of it."""
        tokens = max(self.least, 1)
        while True:
            static, frames = static_size(tokens, self.frames, unit, cap)
            yield min(static, self.most), frames
            if static >= self.most:
                return
            tokens = static + 1


@dataclasses.dataclass(frozen=True)
class Reads:
    """What the rows of a lane can be given to read."""

    prompts: tuple[Extent, ...]
    given: tuple[Extent, ...] = ()
    """Before a turn, besides the prompt: forced prefixes, tool responses."""
    sampling: SamplingConfig = SILENT
    """How the rows draw: what ends their turns has a size, too."""

    def prompt_sizes(self, lane: Lane) -> list[Size]:
        """One prompt of each static size."""
        return _distinct(self.prompts, PROMPT_LEAST, lane.prompt_tokens)

    def given_sizes(self) -> list[Size]:
        """One block of each static size."""
        return _distinct(self.given, APPEND_LEAST, NEVER)


def _distinct(extents: Iterable[Extent], unit: int, cap: int) -> list[Size]:
    found = {
        static_size(tokens, frames, unit, cap): (tokens, frames)
        for extent in extents
        for tokens, frames in extent.sizes(unit, cap)
    }
    return [found[key] for key in sorted(found)]


def _few(most: int) -> int:
    """The fewest that are read as a batch, not one by one."""
    return min(BATCH, most) // 4 + 1


Told = AbstractContextManager[Callable[[], object]]
"""Within it, the function that it gives is called whenever one more is done."""


def warm_up(
    engine: Engine,
    params: Params,
    reads: Mapping[str, Reads],
    patch_values: int = 0,
    progress: Callable[[int], Told] = lambda total: contextlib.nullcontext(lambda: None),
) -> int:
    """Compile all that requests within `reads` can need; how many functions that were.

    Args:
        reads: for each lane of the engine.
        patch_values: values of a flattened patch, where anything has frames.
        progress: is told how many requests there will be, and of each that is done.

    Raises:
        ValueError: a lane is missing in `reads`.
    """
    missing = set(engine.lanes) - set(reads)
    if missing:
        raise ValueError(f"reads lacks the lanes {', '.join(sorted(missing))}; add them")
    before = engine.compilations
    rehearsal = _Rehearsal(engine, params, reads, patch_values)
    requests = list(rehearsal.requests())
    with progress(len(requests)) as done:
        for request in requests:
            rehearsal.say(*request)
            done()
    return engine.compilations - before


Request = tuple[list[tuple[str, Size]], Size, int | None]
"""Lanes and sizes of prompts, what is given to their streams, and to how many: all, if None."""


class _Rehearsal:
    """Requests that mean nothing, one of each shape."""

    def __init__(
        self, engine: Engine, params: Params, reads: Mapping[str, Reads], patch_values: int
    ) -> None:
        self._engine, self._session = engine, Session(engine, params)
        self._reads, self._patch_values = reads, patch_values
        self._shortest = {
            name: reads[name].prompt_sizes(lane)[0] for name, lane in engine.lanes.items()
        }

    def requests(self) -> Iterator[Request]:
        """All of them."""
        for name in self._engine.lanes:
            yield from self._prompts(name)
            yield from self._given(name)
        yield from self._mixtures()

    def _prompts(self, name: str) -> Iterator[Request]:
        """Read each size of prompt, alone and in a batch."""
        lane = self._engine.lanes[name]
        for size in self._reads[name].prompt_sizes(lane):
            for count in sorted({1, _few(lane.prompts)}):
                yield [(name, size)] * count, (0, 0), None

    def _given(self, name: str) -> Iterator[Request]:
        """Give each size of block to one row, to a batch of rows and to all of them."""
        lane = self._engine.lanes[name]
        for size in self._reads[name].given_sizes():
            for rows in sorted({1, _few(lane.rows), lane.rows}):
                yield [(name, self._shortest[name])] * lane.prompts, size, rows

    def _mixtures(self) -> Iterator[Request]:
        """Decode each set of lanes."""
        for chosen in itertools.product((False, True), repeat=len(self._shortest)):
            yield list(itertools.compress(self._shortest.items(), chosen)), (0, 0), None

    def say(self, opened: Sequence[tuple[str, Size]], given: Size, rows: int | None) -> None:
        """Open prompts, let the first `rows` of their streams say a token, close all."""
        session, speakers = self._session, []
        for lane, size in opened:
            copies = range(self._engine.lanes[lane].copies)
            streams = session.open(lane, self._block(size), copies)
            # A grammar has no shape of its own, and would not let a blank prompt go on.
            sampling = dataclasses.replace(self._reads[lane].sampling, constrain="")
            speakers += [(stream, sampling) for stream in streams]
        for stream, sampling in speakers[:rows]:
            session.speak(stream, self._block(given), sampling, 1)
        while session.speaking:
            session.visit()
        for stream, _ in speakers:
            session.close(stream)

    def _block(self, size: Size) -> Prompt:
        tokens, frames = size
        block = text_block([self._engine.pad_id] * tokens)
        if not frames:
            return block
        empty = np.zeros((frames, self._engine.frame_patches, self._patch_values), np.float32)
        return dataclasses.replace(block, patches=Patches(empty, np.full((frames, 2), 2, np.int32)))
