"""Which processes are one run: found as JAX finds them, joined within a time limit.

`docs/pods.md` says what each of JAX's detectors reads, and the commands of each kind of cluster.
"""

from __future__ import annotations

import dataclasses
import math
import os
import socket
import time
import warnings
from typing import TYPE_CHECKING, Any

import jax

from paravt_jax.deadlines import OutOfTime, within_seconds
from train.hosts.exchange import EXCHANGE
from train.hosts.watch import WATCH

if TYPE_CHECKING:
    from jax._src.clusters import ClusterEnv

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SECONDS = "PARAVT_JOIN_SECONDS"
"""Environment variable: how long a host waits for the others."""
DEFAULT_SECONDS = 50.0
METHOD = "PARAVT_CLUSTER"
"""Environment variable: the detector to use, by JAX's name of it, where its own choice is wrong."""
BY_HAND = f"set {COUNT}=1 for this host alone, or {ADDRESS}, {COUNT} and {NUMBER}"
POD = "JOB_COMPLETION_INDEX"
"""The number of a pod of an indexed Job or JobSet."""
MPI = f"`pip install mpi4py` and set {METHOD}=mpi4py"
LAUNCHERS = {
    "OMPI_COMM_WORLD_SIZE": (2, MPI),  # Open MPI 5, github.com/jax-ml/jax/issues/14576
    "PMI_SIZE": (2, MPI),  # MPICH, Intel MPI
    POD: (1, "`pip install 'jax[k8s]'`"),
    COUNT: (2, f"set {ADDRESS} and {NUMBER} beside it"),
}
"""Variables that from some number on tell of several processes, and what makes JAX find them."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Processes that are to be one run."""

    count: int
    number: int
    """The number of this host, from 0."""
    found: str
    """The variable or the detector that names them."""
    given: dict[str, Any]
    """Arguments of `jax.distributed.initialize`; what is missing JAX finds itself."""


def join() -> Hosts | None:
    """Join the other hosts; None where this process is alone.

    Raises:
      ValueError: a variable is missing or wrong, a cluster does not say what its hosts are, or
        not all of them came in time.
    """
    seconds = _seconds()
    began = time.monotonic()
    hosts = find_hosts(seconds)
    if hosts is None:
        return None
    whole = f"host {hosts.number} of {hosts.count}"
    print(f"{whole}: joining the others, by {hosts.found}", flush=True)
    seconds_left = max(0.1, seconds - (time.monotonic() - began))
    WATCH.join(hosts.number, hosts.count)
    try:
        # JAX ends the process with a stack trace when its own limit is over: ours comes before.
        work = dict(hosts.given, initialization_timeout=math.ceil(seconds_left) + 60)
        within_seconds(lambda: jax.distributed.initialize(**work), seconds_left)
    except OutOfTime as error:
        raise ValueError(f"{whole}: {_missing(hosts, seconds)}") from error
    except Exception as error:
        raise ValueError(f"{whole}: {_refused(hosts, error)}") from error
    WATCH.begin()
    _reach_others(hosts)
    return hosts


def _reach_others(hosts: Hosts) -> None:
    """Connect with them, as JAX's key-value store tells where they are."""
    from jax._src import distributed

    store = distributed.global_state.client
    EXCHANGE.begin(hosts.number, hosts.count, store, _address(hosts))


def _seconds() -> float:
    text = os.environ.get(SECONDS, "")
    if not text:
        return DEFAULT_SECONDS
    if not text.isdigit() or not int(text):
        raise ValueError(f"{SECONDS}={text!r}: set it to whole seconds, at least 1")
    return float(text)


def _missing(hosts: Hosts, seconds: float) -> str:
    """What to say when not all have come."""
    address = _address(hosts)
    late = f"the others did not join within {seconds:g} s ({SECONDS})"
    if hosts.number and address and not _listens(address):
        return (
            f"{late}, for nothing listens at {address}: start host 0, check the address, and that "
            f"its port is open between hosts; or {BY_HAND}"
        )
    return (
        f"{late}: start the same command on all {hosts.count} hosts, each with a number of its own "
        f"({NUMBER}, or that of the cluster), and see what those say that did not come; or "
        f"{BY_HAND}"
    )


def _address(hosts: Hosts) -> str:
    """Where host 0 is expected, as far as this is known."""
    from jax._src import distributed

    address = distributed.global_state.coordinator_address
    return hosts.given.get("coordinator_address") or address or ""


def _listens(address: str) -> bool:
    name, _, port = address.rpartition(":")
    try:
        socket.create_connection((name.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _refused(hosts: Hosts, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "start RPC server" in text:
        port = _address(hosts).rpartition(":")[2]
        return (
            f"port {port} of this host is in use ({text}): end the run that still holds it, or "
            f"choose another with JAX_COORDINATOR_PORT (or in {ADDRESS}) on all hosts"
        )
    return f"the others cannot be joined ({text}); {BY_HAND}"


def find_hosts(seconds: float = DEFAULT_SECONDS) -> Hosts | None:
    """The hosts that the environment or the cluster names; None where this one is alone.

    Raises:
      ValueError: what they say is incomplete, or was not said in time.
    """
    if os.environ.get(COUNT) == "1":
        return None
    if ADDRESS in os.environ and (COUNT in os.environ or NUMBER in os.environ):
        return _by_hand()
    kind, hosts = _asked(), None
    try:
        kind = kind or within_seconds(_detected, seconds)
        hosts = kind and within_seconds(lambda: _of_cluster(kind), seconds)
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no reason given'}"
        name = "of which kind is unknown" if kind is None else kind.__name__
        raise ValueError(
            f"a cluster was recognised ({name}), but not its hosts ({why}); {BY_HAND}"
        ) from error
    if kind is None and ADDRESS in os.environ:
        return _by_hand()  # which says what is missing; where there is a cluster, JAX asks it
    if kind is None:
        _refuse_unknown_launchers()
    return hosts


def _by_hand() -> Hosts:
    """Hosts by JAX's own variables."""
    address, count, number = os.environ[ADDRESS], _number(COUNT), _number(NUMBER)
    name, _, port = address.rpartition(":")
    if not name or not port.isdigit():
        raise ValueError(f"{ADDRESS}={address!r}: set it to HOST:PORT of host 0")
    if number >= count:
        raise ValueError(
            f"{NUMBER}={number}: {COUNT}={count} hosts have the numbers 0 to {count - 1}, each "
            f"its own; correct {NUMBER}, or {COUNT} on all of them"
        )
    arguments = {"coordinator_address": address, "num_processes": count, "process_id": number}
    return Hosts(count, number, f"{ADDRESS}={address}", arguments)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise ValueError(f"{name}={text!r}: set it to a number beside {ADDRESS}")
    return int(text)


def _detectors() -> list[type[ClusterEnv]]:
    """How JAX recognises clusters; none where this jax keeps that elsewhere: it is private."""
    try:
        from jax._src.clusters import ClusterEnv

        return list(ClusterEnv._cluster_types)
    except (ImportError, AttributeError):
        print(f"note: jax {jax.__version__} does not tell how it finds hosts; {BY_HAND}")
        return []


def _asked() -> type[ClusterEnv] | None:
    """The detector that the user named."""
    name = os.environ.get(METHOD)
    if not name:
        return None
    detectors = {kind.name: kind for kind in _detectors() if kind.name}
    if name not in detectors:
        raise ValueError(f"{METHOD}={name}: choose one of {', '.join(sorted(detectors))}")
    if not detectors[name].is_env_present():
        raise ValueError(f"{METHOD}={name}: JAX finds no such cluster from this host; {BY_HAND}")
    return detectors[name]


def _detected() -> type[ClusterEnv] | None:
    """The first of JAX's detectors that knows where this process is."""
    skipped = set()
    # An interactive shell in a job of many tasks is one task, which would wait for the others.
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":
        skipped.add("SlurmCluster")
    # Notebooks and services run in Kubernetes as well; JAX can only join pods that have a number.
    if POD not in os.environ:
        skipped.add("K8sCluster")
    kinds = (kind for kind in _detectors() if not kind.opt_in_only_method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not installed; see `_refuse_unknown_launchers`
        return next((k for k in kinds if k.__name__ not in skipped and k.is_env_present()), None)


def _of_cluster(kind: type[ClusterEnv]) -> Hosts | None:
    count = kind.get_process_count()
    if count <= 1:
        return None
    # Kubernetes has no name there, and is what JAX finds last.
    arguments = {"cluster_detection_method": kind.name} if kind.name else {}
    return Hosts(count, kind.get_process_id(), kind.__name__, arguments)


def _refuse_unknown_launchers() -> None:
    """Else each of their processes would be a run of its own, all of them in one workdir."""
    for name, (least, remedy) in LAUNCHERS.items():
        text = os.environ.get(name, "")
        if text.isdigit() and int(text) >= least:
            raise ValueError(
                f"{name}={text}: this process is one of several, but JAX does not find the "
                f"others; {remedy}, or {BY_HAND}"
            )
