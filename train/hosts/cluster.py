"""Several hosts as one program: every host runs the same command and holds the same view.

The device work is split over the mesh. What a host reads back is replicated first, so all hosts
take the same decisions; the work that this asks of them they share (`train.hosts.share`). What
disks and clocks decide, hosts agree on: otherwise they would wait for one another for ever.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import jax

from rollout.tools import ToolError
from train.hosts.exchange import EXCHANGE
from train.hosts.interrupt import SIGNALS_OF_RUN
from train.hosts.joining import join
from train.hosts.share import from_all
from train.hosts.watch import WATCH

T = TypeVar("T")

ERRORS: dict[str, type[Exception]] = {
    "ToolError": ToolError,
    "TimeoutError": TimeoutError,
    "ValueError": ValueError,
}
"""Errors whose kind makes a difference."""


def start() -> None:
    """Join the other hosts, if there are any (`train.hosts.joining`), and open the devices.

    Raises:
      ValueError: hosts cannot be joined, or there are no devices of the kind that `JAX_PLATFORMS`
        names.
    """
    # Its handler would take SIGTERM from `train.hosts.interrupt`.
    jax.config.update("jax_enable_preemption_service", False)
    EXCHANGE.knows(ERRORS)
    join()
    SIGNALS_OF_RUN.announce = WATCH.announce
    _open_devices()


def _open_devices() -> None:
    """Open the devices, which may fail in ways that are no fault of a user's settings.

    Raises:
      ValueError: naming what was asked for and what is missing.
    """
    try:
        jax.devices()
    except Exception as error:  # a RuntimeError or a bare assertion, as the case may be
        why = str(error).partition("\n")[0] or "no plug-in for it"
        raise ValueError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: no devices ({why}); install "
            "jax[tpu] or jax[cuda13] beside it, or choose another"
        ) from error


def is_first() -> bool:
    """Whether this host writes the files of which there is one."""
    return jax.process_index() == 0


def max_over_hosts(numbers: Sequence[int]) -> list[int]:
    """The largest of each number over all hosts, on every host."""
    return [max(own) for own in zip(*from_all([int(n) for n in numbers]), strict=True)]


def from_first(value: T) -> T:
    """The first host's value on every host; what the others give does not matter."""
    return from_all(value)[0]


def sync_errors(errors: Sequence[Exception | None]) -> list[Exception | None]:
    """What failed on any host fails on all of them, in the words of the first."""
    if EXCHANGE.count == 1:
        return list(errors)
    ours = {at: _described(error) for at, error in enumerate(errors) if error is not None}
    of_hosts = from_all(ours)
    return [_first_of([failed.get(at) for failed in of_hosts]) for at in range(len(errors))]


def _first_of(errors: Sequence[tuple[str, str] | None]) -> Exception | None:
    """The first of what hosts told; an error that some were spared names its `host`."""
    number = next((number for number, text in enumerate(errors) if text is not None), None)
    if number is None:
        return None
    kind, text = cast(tuple[str, str], errors[number])
    error = ERRORS.get(kind, RuntimeError)(text)
    if None in errors:
        error.host = number  # pyright: ignore[reportAttributeAccessIssue]
    return error


def _described(error: Exception) -> tuple[str, str]:
    kinds = (name for name, kind in ERRORS.items() if isinstance(error, kind))
    return next(kinds, ""), str(error)


def on_all_hosts(work: Callable[[], T]) -> T:
    """What `work` gives on this host; where it fails on one host, it fails on all of them.

    Raises:
      ValueError: it failed.
    """
    value, failed = None, None
    try:
        value = work()
    except ValueError as error:
        failed = error
    (synced,) = sync_errors([failed])
    if synced is not None:
        raise synced
    return cast(T, value)


def require_same(parts: Iterable[bytes | memoryview], what: str) -> None:
    """Stop all hosts where one of them holds something else."""
    if EXCHANGE.count == 1:
        return
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    checksums = from_all(checksum)
    others = [number for number, value in enumerate(checksums) if value != checksums[0]]
    if others:
        raise ValueError(
            f"{what} differ between hosts (hosts {others} from host 0): some file cannot be read "
            "everywhere, or is another one; give all hosts the same files and start again"
        )
