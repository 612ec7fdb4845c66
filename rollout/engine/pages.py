"""The page table of a pool's KV cache, kept on the host."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import numpy as np

from paravt_jax.kv_cache import PageTable


class PageBook:
    """The pages of a pool's rows. Low pages are taken first: attention reads up to the last taken.

    Rows lie in groups, and a row has pages of its own group's (`paravt_jax.kv_cache`).
    """

    def __init__(self, rows: int, groups: int, most: int, slots: int, count: int) -> None:
        """
        Args:
            most: pages that a row can have.
            slots: tokens of a page.
            count: pages of each group.
        """
        self._per_group, self._groups, self._most, self._slots = rows // groups, groups, most, slots
        self._by_row: dict[int, list[int]] = {}
        self._free: list[list[int]] = [[] for _ in range(groups)]
        self._count = 0
        self._table: PageTable | None = None
        self.grow(count)

    def grow(self, count: int) -> None:
        """Now each group has so many pages."""
        for free in self._free:
            for page in range(self._count, count):
                heapq.heappush(free, page)
        self._count, self._table = count, None

    def reserve(self, tokens: Mapping[int, int]) -> bool:
        """Give these rows the pages that they need for so many tokens each; gives none if there are
        too few."""
        missing = {
            row: -(-count // self._slots) - len(self._by_row.get(row, ()))
            for row, count in tokens.items()
        }
        needed = [0] * self._groups
        for row, count in missing.items():
            needed[row // self._per_group] += max(count, 0)
        if any(count > len(free) for count, free in zip(needed, self._free, strict=True)):
            return False
        for row, count in missing.items():
            for _ in range(count):
                page = heapq.heappop(self._free[row // self._per_group])
                self._by_row.setdefault(row, []).append(page)
                self._table = None
        return True

    def release(self, row: int) -> None:
        """A row that is closed needs none."""
        for page in self._by_row.pop(row, ()):
            heapq.heappush(self._free[row // self._per_group], page)
            self._table = None

    def table(self) -> PageTable:
        """All of that, for the device. Made anew when something changed: a call that still runs may
        read the one before."""
        if self._table is None:
            self._table = self._made()
        return self._table

    def _made(self) -> PageTable:
        shape = self._groups, self._per_group
        pages = np.full((*shape, self._most), self._count, np.int32)
        owners = np.full((self._groups, self._count), self._per_group, np.int32)
        order = np.zeros((self._groups, self._count), np.int32)
        for row, numbers in self._by_row.items():
            group, place = divmod(row, self._per_group)
            pages[group, place, : len(numbers)] = numbers
            owners[group, numbers] = place
            order[group, numbers] = np.arange(len(numbers))
        return PageTable(pages, owners, order)
