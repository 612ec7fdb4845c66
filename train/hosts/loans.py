"""Pixels stay with the host that made them until another host needs them (ADR 39).

What hosts tell one another holds of `Patches`, and of frames that are not cut into patches yet,
their sizes and a number. A host that puts a row of them onto its devices asks for the pixels then;
one that does not never gets them.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from paravt_jax.lazy_array import LazyArray
from paravt_jax.records import Patches
from pipelines.conversation import VisionInput

PIXELS: dict[type, str] = {Patches: "values", VisionInput: "pixels"}
"""What holds pixels, and in which field."""
Loan = tuple[int, int]
"""A host, and its number for an array that it keeps for the others."""


class Loans:
    """Arrays that this host keeps for others, each until all of them have had or forgotten it; and
    what this host may ask others for."""

    def __init__(self, borrow: Callable[[Loan], np.ndarray], returned: Callable[[Loan], object]):
        """
        Args:
          borrow: gets an array from the host that keeps it, which then expects no more questions.
          returned: tells that host that this one will never ask. Called wherever the last reference
            to an array ends, in any thread: it must not wait.
        """
        self._number, self._borrowers = 0, 0
        self._borrow, self._returned = borrow, returned
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._kept: dict[int, tuple[np.ndarray, int]] = {}
        """Arrays, and how many hosts may ask for them yet."""

    def begin(self, number: int, count: int) -> None:
        """Be host `number` of `count`."""
        self._number, self._borrowers = number, count - 1

    @property
    def kept(self) -> int:
        """Arrays that others may ask for yet."""
        return len(self._kept)

    def dumps(self, value: Any) -> bytes:
        """A value for all others, without its pixels, which are kept."""
        out = io.BytesIO()
        _Pickler(out, self._keep).dump(value)
        return out.getvalue()

    def loads(self, data: bytes) -> Any:
        """What another host's `dumps` gave; its pixels come when they are first looked at."""
        return _Unpickler(io.BytesIO(data), self._lazy).load()

    def hand_out(self, number: int) -> np.ndarray:
        """An array that is kept, for one host that asks, or does not want it any more."""
        with self._lock:
            array, left = self._kept.pop(number)
            if left > 1:
                self._kept[number] = array, left - 1
        return array

    def _keep(self, array: np.ndarray) -> Loan:
        with self._lock:
            number = next(self._numbers)
            self._kept[number] = array, self._borrowers
        return self._number, number

    def _lazy(self, loan: Loan, shape: tuple[int, ...], dtype: str) -> LazyArray:
        def fetch() -> np.ndarray:
            unasked.detach()
            return self._borrow(loan)

        array = LazyArray(shape, np.dtype(dtype), fetch)
        unasked = weakref.finalize(array, self._returned, loan)
        # Others may have ended by then, and nobody keeps anything any more.
        unasked.atexit = False
        return array


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO, keep: Callable[[np.ndarray], Loan]) -> None:
        super().__init__(out, protocol=5)
        self._keep = keep

    def persistent_id(self, obj: Any) -> Any:
        """Of what holds pixels: where they are, their sizes, and its other fields."""
        if (name := PIXELS.get(type(obj))) is None:
            return None
        fields = {own.name: getattr(obj, own.name) for own in dataclasses.fields(obj)}
        pixels = np.asarray(fields.pop(name))
        return type(obj), (self._keep(pixels), pixels.shape, pixels.dtype.str), fields


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: io.BytesIO, lazy: Callable[..., LazyArray]) -> None:
        super().__init__(data)
        self._lazy = lazy

    def persistent_load(self, pid: Any) -> Any:
        """What a `persistent_id` is of."""
        kind, pixels, fields = pid
        return kind(**{PIXELS[kind]: self._lazy(*pixels)}, **fields)
