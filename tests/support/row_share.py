"""Two hosts that share the rows of a stream, as two threads."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class TwoHosts:
    """`RowShare` of two hosts that are threads: rows by turns, told through one table."""

    def __init__(self, told, lock, number):
        self.told, self.lock, self.number, self.here = told, lock, number, f" (host {number})"
        self.hosts, self.rows_made = 2, 0

    def begin(self, per_step):
        return lambda index: index % 2 == self.number

    def expect(self, index):
        with self.lock:
            return self.told.setdefault(index, Future())

    def tell(self, index, made):
        own = self.expect(index)
        if (error := made.exception()) is None:
            return own.set_result(made.result())
        return own.set_exception(error)

    def used(self, seconds):
        self.rows_made += 1


def on_both(host: Callable[[TwoHosts], Any]) -> tuple[Any, Any]:
    """What `host` gives on each of the two, which run side by side."""
    told, lock = {}, threading.Lock()
    with ThreadPoolExecutor(2) as threads:
        one, two = threads.map(host, [TwoHosts(told, lock, number) for number in range(2)])
    return one, two
