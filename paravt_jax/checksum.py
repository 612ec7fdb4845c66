"""Checksums of arrays that do not depend on how these are laid out over devices and hosts.

Every element is mixed with its place, and all are added up modulo 2^32. A sum has no order, so
devices add up what they hold, and a checkpoint can be verified on another mesh than it was saved
from. As the mixing is one to one, a change of a single element always changes the sum; several
changes cancel one time in 2^32.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from paravt_jax.pytrees import ArrayLike

CRC = "crc32"
"""Key under which a sealed record holds the CRC of all else in it."""


@jax.jit
def checksum(x: Array) -> UInt32[Array, ""]:
    """The checksum of one array of any shape and plain type."""
    return _sum(x, (0,) * x.ndim, x.shape)


def part_checksum(x: ArrayLike, starts: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """What a box adds to the checksum of an array of this `shape`, in which it begins at
    `starts`. The sum over all boxes, modulo 2^32, is the checksum of the array."""
    return int(_part(jnp.asarray(x), jnp.asarray(starts, jnp.uint32), shape))


@functools.partial(jax.jit, static_argnames="shape")
def _part(x: Array, starts: UInt32[Array, " n"], shape: tuple[int, ...]) -> UInt32[Array, ""]:
    # Traced starts: boxes of one size share a program.
    return _sum(x, tuple(starts), shape)


def _sum(x: Array, starts: tuple[Any, ...], shape: tuple[int, ...]) -> UInt32[Array, ""]:
    place, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        # Beyond 2^32 elements places repeat, on the host as on the device.
        counted = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + jnp.uint32(starts[axis])
        place, stride = place + counted * jnp.uint32(stride % 2**32), stride * shape[axis]
    return jnp.sum(scramble(_bits(x) ^ scramble(place + 1)), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """The checksum of every array of a tree, by its path."""
    sums = jax.device_get(_checksums(tree))
    by_path = jax.tree_util.tree_leaves_with_path(sums)
    return {jax.tree_util.keystr(path): int(value) for path, value in by_path}


@jax.jit
def _checksums(tree: Any) -> Any:
    """One program: many at once, each with a sum over all devices, can starve each other on CPU."""
    return jax.tree.map(checksum, tree)


def _bits(x: Array) -> Array:
    """The bits of each element as uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def scramble(x: Array) -> Array:
    """MurmurHash3's finaliser (Appleby 2011), a one-to-one scrambling of 32 bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON with the CRC of what it says."""
    return {**record, CRC: _crc(record)}


def is_intact(record: Mapping[str, Any]) -> bool:
    """Whether a sealed record says what it said when it was sealed."""
    return _crc({key: value for key, value in record.items() if key != CRC}) == record.get(CRC)


def _crc(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())
