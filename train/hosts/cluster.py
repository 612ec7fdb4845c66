"""Several hosts as one program: every host runs the same command and holds the same view.

Hosts do the same work on the same rows (prompts, rewards, text); the device work is split over
the mesh. What a host reads back is replicated first, so all hosts take the same decisions. What
disks and clocks decide, hosts agree on: otherwise they would wait for one another for ever.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from rollout.tools import ToolError

T = TypeVar("T")

ERRORS: dict[str, type[Exception]] = {
    "ToolError": ToolError,
    "TimeoutError": TimeoutError,
    "ValueError": ValueError,
}
"""Errors whose kind makes a difference."""


def start() -> None:
    """Join the other hosts, if there are any, and open the devices.

    Cloud TPU VMs, GKE, SLURM, Open MPI and Kubernetes are recognised by JAX. Elsewhere set
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`; `JAX_NUM_PROCESSES=1`
    alone keeps a host to itself.

    Raises:
      ValueError: a variable is missing or no number, hosts cannot be joined, or there are no
        devices of the kind that `JAX_PLATFORMS` names.
    """
    # Its handler would take SIGTERM from `train.hosts.interrupt`.
    jax.config.update("jax_enable_preemption_service", False)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        jax.distributed.initialize(address, _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID"))
    elif _several_hosts():
        jax.distributed.initialize()
    _open_devices()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise ValueError(f"{name}={text!r}: set it to a number beside JAX_COORDINATOR_ADDRESS")
    return int(text)


def _several_hosts() -> bool:
    """Whether `jax.distributed.initialize` would find other hosts, by JAX's own detection.

    Raises:
      ValueError: a cluster that was recognised does not say how many hosts it has.
    """
    if os.environ.get("JAX_NUM_PROCESSES") == "1":
        return False
    # An interactive shell in a job of many tasks is one task, which would wait for the others.
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        return False
    kind = None
    try:
        kind = next((kind for kind in _detectors() if kind.is_env_present()), None)
        return kind is not None and kind.get_process_count() > 1
    except Exception as error:
        raise ValueError(
            f"a cluster was recognised ({getattr(kind, '__name__', 'of which kind is unknown')}), "
            f"but not its hosts ({error}); set JAX_NUM_PROCESSES=1 for this host alone, or "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from error


def _detectors() -> Iterator[type[ClusterEnv]]:
    """The kinds of cluster that JAX looks for, in its order."""
    return (kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method)


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
    if jax.process_count() == 1:
        return list(numbers)
    gathered = multihost_utils.process_allgather(np.array(numbers, np.int32))
    return np.asarray(gathered).reshape(-1, len(numbers)).max(0).tolist()


def from_first(value: T) -> T:
    """The first host's value, which JSON can hold, on every host; what the others give does not
    matter."""
    return value if jax.process_count() == 1 else json.loads(texts_from_all(json.dumps(value))[0])


def texts_from_all(text: str) -> list[str]:
    """The text of each host, on every host."""
    if jax.process_count() == 1:
        return [text]
    raw = text.encode()
    data, mark = np.frombuffer(raw, np.uint8), np.array([zlib.crc32(raw), len(raw)], np.uint32)
    marks = np.asarray(multihost_utils.process_allgather(mark))
    if (marks == mark).all():
        return [text] * len(marks)
    # Each length would be compiled: few lengths occur.
    padded = np.resize(data, 1 << int(marks[:, 1].max()).bit_length())
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, (_, size) in zip(texts, marks, strict=True)]


def sync_errors(errors: Sequence[Exception | None]) -> list[Exception | None]:
    """What failed on any host fails on all of them, in the words of the first."""
    if jax.process_count() == 1:
        return list(errors)
    own = {at: _described(error) for at, error in enumerate(errors) if error is not None}
    known: dict[str, tuple[str, str]] = {}
    for text in reversed(texts_from_all(json.dumps(own))):
        known |= json.loads(text)
    told = [known.get(str(at)) for at in range(len(errors))]
    return [None if t is None else ERRORS.get(t[0], RuntimeError)(t[1]) for t in told]


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
    if jax.process_count() == 1:
        return
    own = 0
    for part in parts:
        own = zlib.crc32(part, own)
    held = texts_from_all(str(own))
    others = [number for number, value in enumerate(held) if value != held[0]]
    if others:
        raise ValueError(
            f"{what} differ between hosts (hosts {others} from host 0): some file cannot be read "
            "everywhere, or is another one; give all hosts the same files and start again"
        )
