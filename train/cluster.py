"""Several hosts as one program: every host runs the same command and holds the same view.

Hosts do the same work on the same rows (prompts, rewards, text); the device work is split over
the mesh. What a host reads back is replicated first, so all hosts take the same decisions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def start() -> None:
    """Join the other hosts, if the environment names any.

    Set `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` by hand, or run under
    SLURM, Open MPI or on a TPU pod slice, which JAX recognises itself.

    Raises:
      ValueError: a variable is missing or no number.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        jax.distributed.initialize(address, _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID"))
    elif _several_hosts():
        jax.distributed.initialize()


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise ValueError(f"{name}={text!r}: set it to a number beside JAX_COORDINATOR_ADDRESS")
    return int(text)


def _several_hosts() -> bool:
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = os.environ.get("SLURM_NTASKS", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    return len(workers) > 1 or tasks not in ("", "1")


def is_first() -> bool:
    """Whether this host writes the files of which there is one."""
    return jax.process_index() == 0


def from_first(values: np.ndarray) -> np.ndarray:
    """The first host's numbers, on every host; in float32 where there are several hosts."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values.astype(np.float32)))


def texts_from_first(texts: Sequence[str]) -> list[str]:
    """The first host's texts, on every host; what the others give does not matter."""
    if jax.process_count() == 1:
        return list(texts)
    data = np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)
    share = multihost_utils.broadcast_one_to_all
    size = int(share(np.int32(len(data))))
    return json.loads(np.asarray(share(np.resize(data, size))).tobytes())
