"""Who does what: host work of a row is done by the host whose devices hold it, once.

Hosts drive the same rollouts in the same order, so that all of them know what is to be done and by
whom. One does it and tells the others what came of it, errors included (`train.hosts.exchange`).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from rollout.workers import Job, Submit
from train.hosts.exchange import EXCHANGE, Name

T = TypeVar("T")
U = TypeVar("U")


def host_of(place: int, count: int, hosts: int) -> int:
    """The host of the `place`-th of so many rows, which lie on the devices of hosts in their
    order."""
    return place * hosts // count


def own_places(count: int) -> list[int]:
    """The rows of this host among so many."""
    hosts = EXCHANGE.count
    return [at for at in range(count) if host_of(at, count, hosts) == EXCHANGE.number]


class HostWork:
    """What this host did since it was last asked: how often, and in how many seconds of all its
    threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: collections.Counter[str] = collections.Counter()
        self._seconds = 0.0

    @contextlib.contextmanager
    def doing(self, what: str, times: int = 1) -> Iterator[None]:
        """Count what is done inside, and how long it takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(what, times, time.perf_counter() - began)

    def add(self, what: str, times: int, seconds: float) -> None:
        """Count what is done already."""
        with self._lock:
            self._done[what] += times
            self._seconds += seconds

    def take(self) -> dict[str, float]:
        """Numbers by name; those of before begin anew."""
        with self._lock:
            done, self._done = self._done, collections.Counter()
            seconds, self._seconds = self._seconds, 0.0
        counts = {f"hosts/{name}": float(done[name]) for name in ("overviews", "tools", "rewards")}
        return counts | {"hosts/seconds": seconds}


WORK = HostWork()
"""Of this process."""


def shared_job(place: tuple[int, int], submit: Submit, work: Callable[[], Any]) -> Job:
    """`rollout.workers.Share` among hosts: the row's own host does the work, the others get what it
    tells of it. All hosts ask in the same order."""

    def counted() -> Any:
        with WORK.doing("tools"):
            return work()

    host, name = host_of(*place, EXCHANGE.count), EXCHANGE.next_name()
    if host != EXCHANGE.number:
        return EXCHANGE.expect(name)
    job = submit(counted)
    if EXCHANGE.count > 1:
        job.add_done_callback(lambda done: EXCHANGE.tell_outcome(name, done))
    return job


@dataclasses.dataclass(frozen=True)
class _Owned:
    """Which rows of a stream are a host's: in each step the part that its devices hold."""

    number: int
    hosts: int
    per_step: int

    def __call__(self, index: int) -> bool:
        return host_of(index % self.per_step, self.per_step, self.hosts) == self.number


class RowsOfHosts:
    """`pipelines.row_share.RowShare` among the hosts of a run."""

    def __init__(self) -> None:
        self.here = f" (host {EXCHANGE.number})" if EXCHANGE.count > 1 else ""
        self.hosts = EXCHANGE.count
        self._stream: Name = ()

    def begin(self, per_step: int) -> Callable[[int], bool]:
        """See `RowShare`; all hosts call it in the same order."""
        EXCHANGE.forget(self._stream)
        self._stream = EXCHANGE.next_name()
        return _Owned(EXCHANGE.number, EXCHANGE.count, per_step)

    def tell(self, index: int, made: Future[Any]) -> None:
        """See `RowShare`."""
        if EXCHANGE.count > 1:
            EXCHANGE.tell_outcome((self._stream, index), made)

    def expect(self, index: int) -> Future[Any]:
        """See `RowShare`."""
        return EXCHANGE.expect((self._stream, index))

    def used(self, seconds: float) -> None:
        """See `RowShare`."""
        WORK.add("overviews", 1, seconds)


def by_share(items: Sequence[T], work: Callable[[Sequence[T]], Iterable[U]]) -> list[U]:
    """What `work` gives for each of the items, in their order: each host does its own part of them,
    and all hosts have all results. All hosts call it in the same order.

    Raises:
      Exception: that of the first host where it failed, on all of them.
    """
    if EXCHANGE.count == 1:
        return list(work(items))
    ours = [items[place] for place in own_places(len(items))]
    done: Future[Sequence[U]] = Future()
    try:
        done.set_result(list(work(ours)) if ours else [])
    except Exception as error:
        done.set_exception(error)
    return [result for part in _of_all(done) for result in part]


def from_all(value: T) -> list[T]:
    """The value of each host, on all of them."""
    if EXCHANGE.count == 1:
        return [value]
    done: Future[T] = Future()
    done.set_result(value)
    return _of_all(done)


def _of_all(value: Future[T]) -> list[T]:
    """What each host has, in their order, once all of them are here."""
    call = EXCHANGE.next_name()
    EXCHANGE.tell_outcome((*call, EXCHANGE.number), value)
    futures = [
        value if host == EXCHANGE.number else EXCHANGE.expect((*call, host))
        for host in range(EXCHANGE.count)
    ]
    return [done.result() for done in futures]


def summed(numbers: Mapping[str, float]) -> dict[str, float]:
    """The sum of each number over all hosts."""
    of_hosts = from_all(dict(numbers))
    return {name: sum(each[name] for each in of_hosts) for name in numbers}


def busiest(numbers: Mapping[str, float]) -> dict[str, float]:
    """The largest of each number over all hosts."""
    of_hosts = from_all(dict(numbers))
    return {name: max(each[name] for each in of_hosts) for name in numbers}


def work_metrics(read: Mapping[str, float]) -> dict[str, float]:
    """What was `read` from videos, by all hosts together; and under `hosts/`, of the host that did
    most of it, how much host work a step was, for `metrics.jsonl`."""
    ours = {"hosts/frames": read["frames/decoded"], **WORK.take()}
    ours["hosts/sent_mib"] = EXCHANGE.take_sent() / 2**20
    return summed(read) | busiest(ours)
