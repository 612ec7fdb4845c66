"""Requests as the engine's thread runs them: chat completions, and answers of our agent."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evaluate.asking import Answer
from evaluate.serving.errors import ApiError
from evaluate.serving.prompts import ServedPrompt
from evaluate.serving.worker import RowLease
from evaluate.serving.writing import Finished, Piece, Vocabulary, Wanted, Writing
from evaluate.watch import Watcher
from paravt_jax.records import Prompt, Row
from rollout.agent import Agent, Rollout, RunContext
from rollout.engine.sampler import SamplingConfig
from rollout.engine.slots import StreamId
from rollout.limits import MAIN
from rollout.record import derive_seed
from rollout.tasks import Generate, Program
from rollout.workers import Workers


@dataclasses.dataclass(frozen=True)
class Grown:
    """A completion has grown."""

    index: int
    piece: Piece


@dataclasses.dataclass(frozen=True)
class Ended:
    """A completion has ended."""

    index: int
    finished: Finished


@dataclasses.dataclass(frozen=True)
class Thought:
    """The agent has written, called or been told something."""

    text: str


@dataclasses.dataclass(frozen=True)
class Answered:
    """The agent has answered."""

    answer: Answer


@dataclasses.dataclass(frozen=True)
class Done:
    """Nothing more comes."""


Event = Grown | Ended | Thought | Answered | Done | ApiError
Emit = Callable[[Event], None]
"""Told of events, in the engine's thread."""


class Chat:
    """One request for chat completions: a row for each of its choices."""

    def __init__(
        self,
        prompt: ServedPrompt,
        sampling: SamplingConfig,
        limit: int,
        seeds: Sequence[int],
        writings: Sequence[Writing],
        watched: bool,
        emit: Emit,
    ) -> None:
        """
        Args:
          limit: most tokens of a completion.
          seeds: of each choice.
          writings: their texts.
          watched: whether they are looked at while they grow: for a stream, or for stop strings.
          emit: told of what happens.
        """
        self.asked, self._sampling, self._limit = prompt, sampling, limit
        self._seeds, self._writings, self._watched, self._emit = seeds, writings, watched, emit
        self._indices: dict[StreamId, int] = {}

    def programs(self, lease: RowLease) -> Sequence[Program]:
        """One for each choice."""
        return [self._choice(lease, index) for index in range(len(self._seeds))]

    def grew(self, stream: StreamId, tokens: np.ndarray, lease: RowLease) -> bool:
        """Tell what is new; whether a stop string ends the turn."""
        if not self._watched:
            return False
        index = self._indices[stream]
        writing = self._writings[index]
        stopped = writing.add(lease.written(stream))
        piece = writing.take()
        if piece.text or piece.log_probs:
            self._emit(Grown(index, piece))
        return stopped

    def done(self, results: list[Any]) -> None:
        """All choices are written."""
        self._emit(Done())

    def failed(self, error: ApiError) -> None:
        """Tell it."""
        self._emit(error)

    def _choice(self, lease: RowLease, index: int) -> Program:
        (stream,) = lease.open(MAIN, self.asked.prompt, [self._seeds[index]])
        self._indices[stream] = index
        generated = yield Generate(stream, self.asked.head, self._sampling, self._limit)
        lease.close(stream)
        self._emit(Ended(index, self._writings[index].finish(generated)))


def writings(vocabulary: Vocabulary, wanted: Wanted, count: int) -> list[Writing]:
    """One for each choice."""
    return [Writing(vocabulary, wanted) for _ in range(count)]


@dataclasses.dataclass(frozen=True)
class Question:
    """What the agent is asked."""

    row: Row
    frames: int
    prompt: Prompt
    seed: int


class Ask:
    """One question to the agent."""

    def __init__(
        self,
        question: Question,
        agent: Callable[[Watcher], Agent],
        watcher: Callable[[Callable[[str, str], None]], Watcher],
        workers: Workers,
        emit: Emit,
    ) -> None:
        """
        Args:
          agent: makes an agent that tells a watcher what it does.
          watcher: makes a watcher that shows pieces of text and their kind.
          workers: run its tools.
          emit: told of what happens.
        """
        self._question, self._workers, self._emit = question, workers, emit
        self._watcher = watcher(self._show)
        self._agent = agent(self._watcher)
        self._began = time.perf_counter()

    def programs(self, lease: RowLease) -> Sequence[Program]:
        """The episode."""
        own = self._question
        seed = derive_seed(own.seed, own.row.row_id, 0, 0)
        (stream,) = lease.open(MAIN, own.prompt, [seed])
        run = RunContext(lease, self._workers, policy_version=0)
        return [self._agent.episode(Rollout(run, own.row, own.frames, own.prompt, seed, stream))]

    def grew(self, stream: StreamId, tokens: np.ndarray, lease: RowLease) -> bool:
        """Tell what is new."""
        self._watcher.wrote(stream, tokens)
        return False

    def done(self, results: list[Any]) -> None:
        """Tell the answer."""
        (trajectory,) = results
        seconds = time.perf_counter() - self._began
        calls = tuple(self._watcher.answered_calls)
        self._emit(Answered(Answer(self._question.row.question, trajectory, calls, seconds)))
        self._emit(Done())

    def failed(self, error: ApiError) -> None:
        """Tell it."""
        self._emit(error)

    def _show(self, text: str, kind: str) -> None:
        self._emit(Thought(text if kind == "text" else f"\n{text}\n"))
