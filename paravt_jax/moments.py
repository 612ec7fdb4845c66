"""Moments of the optimiser in fewer bits: bfloat16, or 8 bits with a scale for each block.

The 8 bits are those of 8-bit Adam (Dettmers et al., 2022, arXiv 2110.02861): blocks of an array are
divided by their largest value, and what remains is coded in decades, the largest one most finely
("dynamic tree quantization"). Two things differ. Values are rounded up or down by chance, with the
right mean: in a step a second moment moves by 0.1 % of itself, less than half of the distance to
the next number, and rounded to the nearest it would stand still. And what is positive stays so,
because Adam divides by its root.

Chance is a hash of the step and of the place, so that a resumed run goes on to the bit and no
layout matters.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Integer, Shaped, UInt32

from paravt_jax.checksum import scramble

Kept = Literal["float32", "bfloat16", "int8"]
"""What moments are kept in."""
SMALLEST = 4096
"""Arrays of fewer elements stay float32, as in the paper's implementation: they cost nothing."""
BLOCK = 256
"""Most elements that share a scale."""


class Blocks(NamedTuple):
    """An array in 8 bits."""

    codes: Integer[Array, "*shape n"]
    """`int8`, or `uint8` of what is never negative, of values over their scales."""
    scales: Float[Array, "*shape m"]
    """The largest magnitude of each of the `m` blocks along the last axis."""


class Packed(NamedTuple):
    """The state of an optimiser, moments in fewer bits."""

    step: Int[Array, ""]
    """Steps that rounded it, which decide the next chances."""
    inner: Any


def keep_moments(
    update: optax.GradientTransformation, dtype: Kept
) -> optax.GradientTransformationExtraArgs:
    """The optimiser `update` with moments kept in fewer bits between steps; it computes with
    float32."""
    inner = optax.with_extra_args_support(update)

    def init(params: Any) -> Packed:
        return Packed(jnp.zeros((), jnp.int32), _pack(inner.init(params), params, dtype, None))

    def step(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Packed]:
        moved, after = inner.update(updates, _unpack(state.inner), params, **extra)
        number = state.step + jnp.int32(1)
        return moved, Packed(number, _pack(after, updates, dtype, number))

    return optax.GradientTransformationExtraArgs(init, step)


def weight_of(path: tuple, weights: Any) -> str | None:
    """The name of the weight that a leaf of an optimiser's state belongs to; None for counts.

    Optax keeps moments in copies of the weights' dict, so a key above a leaf names its weight.
    """
    keys = (part.key for part in reversed(path) if isinstance(part, jax.tree_util.DictKey))
    name = next(keys, None)
    return name if isinstance(name, str) and name in weights else None


def _pack(state: Any, weights: Any, dtype: Kept, step: Array | None) -> Any:
    """Moments of large weights in fewer bits; without a step, before the first, they are 0."""

    def one(path: tuple, x: Array) -> Any:
        name = weight_of(path, weights)
        if name is None or x.shape != weights[name].shape or x.size < SMALLEST:
            return x
        squares = any(getattr(part, "name", None) == "nu" for part in path)
        if step is None:
            return _nothing(x.shape, dtype, signed=not squares)
        chances = _chances(x.shape, zlib.crc32(jax.tree_util.keystr(path).encode()), step)
        if dtype == "bfloat16":
            return _to_bfloat16(x, chances)
        return quantise(x, chances, signed=not squares)

    return jax.tree_util.tree_map_with_path(one, state)


def _nothing(shape: tuple[int, ...], dtype: Kept, signed: bool) -> Any:
    """Zeros as they are kept. To pack some, a compiler folds large constants for seconds."""
    if dtype == "bfloat16":
        return jnp.zeros(shape, jnp.bfloat16)
    scales = (*shape[:-1], shape[-1] // _block(shape[-1]))
    return Blocks(jnp.zeros(shape, jnp.int8 if signed else jnp.uint8), jnp.zeros(scales))


def _unpack(state: Any) -> Any:
    def one(x: Any) -> Array:
        if isinstance(x, Blocks):
            return dequantise(x)
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, Blocks))


def _chances(shape: tuple[int, ...], name: int, step: Array) -> UInt32[Array, "*shape"]:
    """32 random bits for each element of an array."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, stride in enumerate(math.prod(shape[i + 1 :]) for i in range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        place = place + index * jnp.uint32(stride % 2**32)
    seed = scramble(step.astype(jnp.uint32) ^ jnp.uint32(name))
    return scramble(scramble(place + seed) ^ seed)


def _to_bfloat16(x: Float[Array, "*shape"], chances: UInt32[Array, "*shape"]) -> Array:
    """Rounded up or down by chance: bfloat16 is the upper half of a float32."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (chances & jnp.uint32(0xFFFF))
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def quantise(
    x: Float[Array, "*shape n"], chances: UInt32[Array, "*shape n"], signed: bool
) -> Blocks:
    """An array in 8 bits, rounded by chance."""
    blocks = _split(x)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    relative = blocks / jnp.where(scales > 0, scales, 1.0)[..., None]
    uniform = (_split(chances) >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    codes = _encode(jnp.abs(relative), uniform, 7 if signed else 8)
    codes = codes * jnp.sign(relative) if signed else codes
    return Blocks(codes.astype(jnp.int8 if signed else jnp.uint8).reshape(x.shape), scales)


def dequantise(x: Blocks) -> Float[Array, "*shape n"]:
    """The array as float32."""
    codes = _split(x.codes).astype(jnp.float32)
    sizes = _decode(jnp.abs(codes), 7 if x.codes.dtype == jnp.int8 else 8)
    return (jnp.sign(codes) * sizes * x.scales[..., None]).reshape(x.codes.shape)


def _encode(x: Array, uniform: Array, bits: int) -> Array:
    """The code of a number in [0, 1]. There are `bits` decades, the largest one last. Decade n is
    cut evenly into 2**n parts, of which codes 2**n to 2**(n+1) - 1 name the upper ends; 0 is 0.
    Between two of them a number goes up where `uniform`, in [0, 1), is no less than what it lacks.
    """
    parts, top = _decade(x, [10.0 ** (number - bits) for number in range(bits)])
    # Below the lowest decade's end there is nothing but 0.
    cut = jnp.where(parts > 1, (x / top - 0.1) / 0.9 * parts, x / top)
    codes = jnp.floor(cut + uniform) + parts - 1
    return jnp.clip(codes, jnp.where(x > 0, 1.0, 0.0), 2.0**bits - 1)


def _decode(codes: Array, bits: int) -> Array:
    parts, top = _decade(codes, [2.0**number for number in range(bits)])
    values = top * (0.1 + 0.9 * (codes + 1 - parts) / parts)
    return jnp.where(codes > 0, values, 0.0)


def _decade(x: Array, starts: list[float]) -> tuple[Array, Array]:
    """Parts and upper end of the decade that each number is in, by where decades start."""
    bits = len(starts)
    parts, top = jnp.ones_like(x), jnp.full_like(x, 10.0 ** (1 - bits))
    for number, start in enumerate(starts[1:], 1):
        parts = jnp.where(x >= start, 2.0**number, parts)
        top = jnp.where(x >= start, 10.0 ** (number + 1 - bits), top)
    return parts, top


def _split(x: Shaped[Array, "*shape n"]) -> Shaped[Array, "*shape m block"]:
    """The blocks of an array: as long as divides its last axis."""
    block = _block(x.shape[-1])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _block(n: int) -> int:
    """The largest divisor up to `BLOCK`."""
    return next(size for size in range(min(BLOCK, n), 0, -1) if n % size == 0)
