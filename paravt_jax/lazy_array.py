"""Arrays on the host whose shape is known before their values are there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class LazyArray:
    """As a numpy array, but its values are made or fetched when they are first looked at."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], np.ndarray]
    ) -> None:
        """`make` is called once at most, by whichever thread is first."""
        self.shape, self.dtype, self._make = shape, dtype, make
        self._lock = threading.Lock()
        self._values: np.ndarray | None = None

    @property
    def ndim(self) -> int:
        """As of an array."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.__array__()[index]

    def part(self, index: slice) -> LazyArray:
        """Some of it, along the first axis, no earlier than the whole is looked at."""
        count = len(range(*index.indices(len(self))))
        return LazyArray((count, *self.shape[1:]), self.dtype, lambda: self[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self._lock:
            if self._values is None:
                self._values = self._make()
        return np.array(self._values, dtype, copy=copy)
