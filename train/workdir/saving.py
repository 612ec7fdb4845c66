"""When the state of a run is saved: by steps, by minutes, and where a signal ends the run."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from train.hosts.cluster import is_first, max_over_hosts
from train.hosts.interrupt import Interrupted, Signals
from train.state import TrainState
from train.workdir.checkpoints import Checkpoints
from train.workdir.lock import WorkdirLock, lost_message
from train.workdir.settings import OutputSettings


class Saver:
    """Stands between the steps of a stage; what it decides, all hosts decide together."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        output: OutputSettings,
        signals: Signals,
        lock: WorkdirLock | None,
        first_step: int,
        figure: Callable[[int], float | None] = lambda step: None,
    ):
        """
        Args:
          figure: what the state after so many steps was evaluated to, None if it was not.
        """
        self._checkpoints, self._output = checkpoints, output
        self._signals, self._lock, self._first = signals, lock, first_step
        self._figure, self._stalled = figure, 0.0
        self._saved_at, self._step = time.monotonic(), first_step + 1
        self._save: Callable[[], None] | None = None
        """Saves the state of before the step that is being made, as long as that exists."""

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Within it a signal waits for a place where the run can be ended, and the last whole
        state is saved before it is."""
        with self._signals.deferred("the first step"):
            try:
                yield
            except Interrupted:
                self._save_last()
                raise
            except Exception as error:
                # Ctrl-C reaches the processes that decode, too; a step may fail for want of them.
                if not self._signals.received:
                    raise
                self._save_last()
                raise Interrupted(self._signals.received) from error

    def between_steps(self, done: int, state: TrainState, data_state: Any) -> None:
        """Between two steps, `done` of which are done; `data_state` is JSON.

        Raises:
          Interrupted: a signal asked for the end.
          OSError: the workdir is gone, or a checkpoint could not be written.
        """
        self._save, self._stalled = None, 0.0
        self._step, self._signals.doing = done + 1, f"the next pause in step {done + 1}"
        figure = self._figure(done)
        if done > self._first:
            self._save = functools.partial(self._checkpoints.save, done, state, data_state, figure)
        failed = self._checkpoints.failure()
        lost = self._lock is not None and self._lock.lost
        number, due, any_failed, any_lost = max_over_hosts(
            [self._signals.received, self._is_due(figure), failed is not None, lost]
        )
        if any_lost:
            raise OSError(lost_message(self._checkpoints.folder.parent))
        if any_failed:
            raise failed or OSError("another host could not write its part of a checkpoint")
        if number:
            raise Interrupted(number, synced=True)
        every = self._output.checkpoint_every
        if self._save and (due or (every and done % every == 0)):
            began = time.monotonic()
            self._save()
            self._saved_at = time.monotonic()
            self._stalled = self._saved_at - began

    def metrics(self) -> dict[str, float]:
        """How long the run stood still before this step to be saved."""
        return {"time/save": self._stalled}

    def begin_update(self) -> None:
        """From here on the state of before the step is donated, and there is nothing to save."""
        self._save = None
        self._signals.doing = f"the update of step {self._step}"

    def finish(self, done: int, state: TrainState, data_state: Any) -> None:
        """After the last step: the state is on the disk when this returns."""
        self.between_steps(done, state, data_state)
        self._signals.doing = "the last checkpoint"
        self._checkpoints.save(done, state, data_state, self._figure(done))
        self._checkpoints.wait()

    def _is_due(self, figure: float | None) -> bool:
        """By the clock of the first host, or because there is hardly a better state."""
        minutes = self._output.checkpoint_minutes
        late = minutes and time.monotonic() - self._saved_at >= 60 * minutes
        return is_first() and bool(late or self._checkpoints.is_best(figure))

    def _save_last(self) -> None:
        if self._save is not None:
            self._signals.doing = "the last checkpoint"
            self._save()
            self._checkpoints.wait()
