"""Every shape that rollouts can take, compiled before the first of them.

A run must not stop to compile in the middle: at 8B a compilation takes longer than a step. The
sizes of what a pool can be given are known beforehand (`InputSizes`) and static sizes are few, so
a session is asked for each of them once, with requests that mean nothing.
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
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.padding import MIN_APPEND, MIN_PROMPT, NO_LIMIT, smallest_batch, static_size
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import IDLE, Session

Size = tuple[int, int]
"""Tokens and frames of a prompt or an appended block."""


@dataclasses.dataclass(frozen=True)
class SizeRange:
    """Prompts or blocks with this many frames have from `least` to `most` tokens."""

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
class InputSizes:
    """What the rows of a pool can be given, by size."""

    prompts: tuple[SizeRange, ...]
    appended: tuple[SizeRange, ...] = ()
    """Before a turn, besides the prompt: forced prefixes, tool responses."""
    sampling: SamplingConfig = IDLE
    """How the rows draw: stop strings take room in the table of automata, which has a size too."""

    def prompt_sizes(self, pool: SlotPool) -> list[Size]:
        """One prompt of each static size."""
        return _distinct(self.prompts, MIN_PROMPT, pool.prompt_tokens)

    def appended_sizes(self) -> list[Size]:
        """One block of each static size."""
        return _distinct(self.appended, MIN_APPEND, NO_LIMIT)


def _distinct(ranges: Iterable[SizeRange], unit: int, cap: int) -> list[Size]:
    by_shape = {
        static_size(tokens, frames, unit, cap): (tokens, frames)
        for lengths in ranges
        for tokens, frames in lengths.sizes(unit, cap)
    }
    return [by_shape[key] for key in sorted(by_shape)]


Progress = AbstractContextManager[Callable[[], object]]
"""Within it, the function that it gives is called whenever one more is done."""


def precompile(
    engine: Engine,
    params: Params,
    inputs: Mapping[str, InputSizes],
    patch_values: int = 0,
    progress: Callable[[int], Progress] = lambda total: contextlib.nullcontext(lambda: None),
) -> int:
    """Compile all that requests within `inputs` can need; how many functions that were.

    Args:
        inputs: for each pool of the engine.
        patch_values: values of a flattened patch, where anything has frames.
        progress: is told how many requests there will be, and of each that is done.

    Raises:
        ValueError: a pool is missing in `inputs`.
    """
    missing = set(engine.pools) - set(inputs)
    if missing:
        raise ValueError(f"inputs lacks the pools {', '.join(sorted(missing))}; add them")
    before = engine.compilations
    first = _Precompiler(engine, params, inputs, patch_values)
    requests = [list(first.requests())]
    requests += [list(first.of_each_size())] * (engine.caches.rungs - 1)
    with progress(sum(map(len, requests))) as done:
        for rung, of_rung in enumerate(requests):
            engine.caches.release()
            engine.caches.open(rung)
            # A block that is longer than it seems by its size may come at any of them.
            engine.caches.fixed = True
            precompiler = _Precompiler(engine, params, inputs, patch_values)
            for request in of_rung:
                precompiler.run(*request)
                done()
    engine.caches.fixed = False
    _grow(engine)
    return engine.compilations - before


def _grow(engine: Engine) -> None:
    """Compile each step of the cache to the next."""
    engine.caches.release()
    engine.caches.open()
    for _ in range(1, engine.caches.rungs):
        engine.caches.grow(engine.caches.growing)
    engine.caches.release()
    engine.caches.take_peak()  # no rollout took that


Request = tuple[list[tuple[str, Size]], Size, int | None]
"""Pools and sizes of prompts, what is appended to their rows, and to how many: all, if None."""


class _Precompiler:
    """Dummy requests, one of each shape."""

    def __init__(
        self, engine: Engine, params: Params, inputs: Mapping[str, InputSizes], patch_values: int
    ) -> None:
        self._engine, self._session = engine, Session(engine, params)
        self._inputs, self._patch_values = inputs, patch_values
        self._shortest = {
            name: inputs[name].prompt_sizes(pool)[0] for name, pool in engine.pools.items()
        }

    def requests(self) -> Iterator[Request]:
        """All of them."""
        for name in self._engine.pools:
            yield from self._prompts(name)
            yield from self._appended(name)
        yield from self._mixtures()

    def of_each_size(self) -> Iterator[Request]:
        """Those that read the cache which grows."""
        growing = self._engine.caches.growing
        yield from self._appended(growing)
        for request in self._mixtures():
            if growing in dict(request[0]):
                yield request

    def _prompts(self, name: str) -> Iterator[Request]:
        """Prefill each size of prompt, alone and in a batch."""
        pool = self._engine.pools[name]
        for size in self._inputs[name].prompt_sizes(pool):
            for count in sorted({1, smallest_batch(pool.prompts)}):
                yield [(name, size)] * count, (0, 0), None

    def _appended(self, name: str) -> Iterator[Request]:
        """Append each size of block to one row, to a batch of rows and to all of them."""
        pool = self._engine.pools[name]
        for size in self._inputs[name].appended_sizes():
            for rows in sorted({1, smallest_batch(pool.rows), pool.rows}):
                yield [(name, self._shortest[name])] * pool.prompts, size, rows

    def _mixtures(self) -> Iterator[Request]:
        """Decode each set of pools."""
        for chosen in itertools.product((False, True), repeat=len(self._shortest)):
            yield list(itertools.compress(self._shortest.items(), chosen)), (0, 0), None

    def run(self, opened: Sequence[tuple[str, Size]], appended: Size, rows: int | None) -> None:
        """Open prompts, let the first `rows` of their streams generate a token, close all."""
        session, opened_streams = self._session, []
        for name, size in opened:
            copies = range(self._engine.pools[name].copies)
            # A grammar has no shape of its own, and would not let a blank prompt go on.
            sampling = dataclasses.replace(self._inputs[name].sampling, constrain="")
            streams = session.open(name, self._block(size), copies)
            opened_streams += [(stream, sampling) for stream in streams]
        for stream, sampling in opened_streams[:rows]:
            session.generate(stream, self._block(appended), sampling, 1)
        while session.generating:
            session.step()
        for stream, _ in opened_streams:
            session.close(stream)

    def _block(self, size: Size) -> Prompt:
        tokens, frames = size
        block = text_block([self._engine.pad_id] * tokens)
        if not frames:
            return block
        empty = np.zeros((frames, self._engine.frame_patches, self._patch_values), np.float32)
        return dataclasses.replace(block, patches=Patches(empty, np.full((frames, 2), 2, np.int32)))
