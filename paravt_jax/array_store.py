"""One array of an Orbax checkpoint, read and written box by box.

Orbax keeps each array as a zarr array, under the array's name, in the OCDBT database that the
item's folder is (https://orbax.readthedocs.io, "Checkpoint format"). It reads and writes whole
arrays; TensorStore, which it uses for that, also takes boxes, so that an array of any size
passes through little memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorstore as ts

from paravt_jax.params import Box


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array on disk. Boxes that are whole chunks are read and written fastest."""

    store: ts.TensorStore
    name: str

    @classmethod
    def open(cls, item: Path, name: str) -> StoredArray:
        """The array of this name in the folder of a checkpoint item.

        Raises:
          ValueError: it is missing or damaged.
        """
        try:
            # `auto`: which version of zarr Orbax wrote is its own choice.
            store = ts.open(f"file://{item}/|ocdbt:{name}/|auto:", open=True).result()
        except ValueError as error:
            raise ValueError(f"{item} is damaged at {name}: {_first(error)}") from error
        return cls(store, name)

    def resized(self, shape: Sequence[int], chunk: Sequence[int]) -> StoredArray:
        """The array laid out anew, empty, with this shape and chunk, in the same encoding.

        Raises:
          OSError: the disk is full.
        """
        old, spec = self.store, self.store.spec().to_json()
        layout = ts.ChunkLayout(write_chunk_shape=chunk)
        try:
            store = ts.open(
                {"driver": spec["driver"], "kvstore": spec["kvstore"]},
                create=True,
                delete_existing=True,
                dtype=old.dtype,
                codec=old.codec,
                shape=shape,
                chunk_layout=layout,
            ).result()
        except ValueError as error:
            raise OSError(str(error)) from error
        return StoredArray(store, self.name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Size along each axis."""
        return tuple(self.store.shape)

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return self.store.dtype.numpy_dtype

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of what is stored, and so read, as one."""
        return tuple(self.store.chunk_layout.read_chunk_template.shape)

    def __getitem__(self, box: Box) -> np.ndarray:
        """The values of a box.

        Raises:
          ValueError: they are damaged.
        """
        try:
            return self.store[box].read().result()
        except ValueError as error:
            why = f"the checkpoint is damaged at {self.name}: {_first(error)}"
            raise ValueError(f"{why}; give another one") from error

    def __setitem__(self, box: Box, values: np.ndarray) -> None:
        """Write a box.

        Raises:
          OSError: the disk is full.
        """
        try:
            # Without a copy: `values` stay alive until all is written.
            self.store[box].write(values, can_reference_source_data_indefinitely=True).result()
        except ValueError as error:  # what TensorStore makes of a full disk
            raise OSError(str(error)) from error

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """The whole array, for numpy and jax."""
        values = self[tuple(slice(0, size) for size in self.shape)]
        return values if dtype is None else values.astype(dtype)


def _first(error: ValueError) -> str:
    """What TensorStore says, without the places in its own source."""
    return " ".join(str(error).partition(" [")[0].split())


def boxes(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[Box]:
    """All chunks of an array of this shape, the last axis fastest."""
    starts = (range(0, size, step) for size, step in zip(shape, chunk, strict=True))
    for corner in itertools.product(*starts):
        ends = (min(at + step, size) for at, step, size in zip(corner, chunk, shape, strict=True))
        yield tuple(slice(at, end) for at, end in zip(corner, ends, strict=True))
