"""Signs of life: where a run works and with what, and how far long work is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FIRST_LINE = 10.0
"""Seconds until a long work is heard of where there is no terminal; each next line takes twice as
long as the one before, so that a log does not fill."""


def introduction(
    workdir: Path | str, mesh: Mesh, weights: str, data: str, compiled: str | None
) -> list[str]:
    """What a run is about to use, before it takes its time: where weights and data come from, and
    the folder that keeps compiled programs, if any does."""
    devices = jax.devices()
    sizes = ",".join(f"{axis}:{size}" for axis, size in mesh.shape.items())
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return [
        f"workdir   {workdir}",
        f"devices   {len(devices)} x {devices[0].device_kind}{hosts}, mesh {sizes}",
        f"weights   {weights}",
        f"data      {data}",
        f"compiled  {compiled or 'programs are not kept (output.compile_cache=none)'}",
    ]


class SignsOfLife:
    """Tells from time to time what a run is stuck in, while it is: compiling, mostly.

    with SignsOfLife(print, compilations.__str__):
        ...
    """

    def __init__(
        self, tell: Callable[[str], object], what: Callable[[], str], first: float = FIRST_LINE
    ):
        """`what` names what takes time at this moment, nothing if nothing does. It is asked every
        `first` seconds, and what it names is printed at ever longer intervals."""
        self._tell, self._what, self._first = tell, what, first
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="signs of life", daemon=True)

    def __enter__(self) -> SignsOfLife:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        waits, next_told = 0, 1
        while not self._over.wait(self._first):
            line = self._what()
            waits = waits + 1 if line else 0
            next_told = next_told if line else 1
            if line and waits >= next_told:
                next_told *= 2
                self._tell(line)


class ProgressBar:
    """How far something is: a bar on a terminal, elsewhere a line now and then.

    with ProgressBar(console, "evaluating", total=64) as bar:
        bar()  # one more is done
    """

    def __init__(self, console: Console, title: str, total: int, done: int = 0):
        """`done`: how many were done before."""
        self._console, self._title, self._total = console, title, total
        self._done, self._began, self._wait = done, time.monotonic(), FIRST_LINE
        times = TimeElapsedColumn(), TimeRemainingColumn()
        columns = "{task.description}", BarColumn(), MofNCompleteColumn(), *times
        shown = console.is_terminal and not console.quiet
        self._bar = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._bar.add_task(title, total=total, completed=done)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def __call__(self, note: str = "") -> None:
        """One more is done; `note` is what is known by now."""
        self._done += 1
        self._bar.update(self._task, advance=1, description=f"{self._title} {note}".rstrip())
        if self._console.is_terminal or self._done >= self._total:
            return
        if time.monotonic() - self._began >= self._wait:
            self._wait *= 2
            line = f"{self._title} {self._done} of {self._total}  {note}".rstrip()
            self._console.print(line, soft_wrap=True)
