"""Products with weights, whose gradients may be wider than the products are.

In bfloat16, a weight's gradient is rounded on each device before devices add theirs, and their sum
is rounded again at each of them. Here it is float32 from the product on, and asked for where the
weight lives, so that the compiler scatters the sum instead of giving all of it to every device.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from paravt_jax.mesh import constrain, splits_tokens

Axes = tuple[str | None, ...] | None
"""Logical axes of a kernel, so that its gradient can be laid out; None leaves that alone."""


def precision(dtype: Any) -> jax.lax.Precision:
    """Full float32 products where float32 was asked for: accelerators round to less by default."""
    full = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if full else jax.lax.Precision.DEFAULT


class Weighted(nnx.Module):
    """Base of modules that multiply with weights of their own."""

    wide_gradients = False
    """Whether gradients of weights are float32 although products are not."""


def widen_gradients(module: nnx.Module) -> None:
    """Let all gradients of weights below a module be float32."""
    for _, part in nnx.iter_graph(module):
        if isinstance(part, Weighted):
            part.wide_gradients = True


def flat_rows(x: Float[Array, "*b i"]) -> Float[Array, "*rows i"]:
    """All rows along one axis, which XLA's CPU backend multiplies best; as they are where a mesh
    splits their tokens, as several of its parts need not be one part of such an axis."""
    return x if splits_tokens() else x.reshape(-1, x.shape[-1])


def without_ones(x: Float[Array, "*b i"]) -> Float[Array, "*rows i"]:
    """Without leading axes of one, along which YNNPACK, XLA's on CPUs, sums ten times slower."""
    while x.ndim > 1 and x.shape[0] == 1:
        x = x[0]
    return x


def multiply(
    x: Float[Array, "*n i"], kernel: Float[Array, "i o"], axes: Axes, wide: bool, out: Any = None
) -> Float[Array, "*n o"]:
    """`x @ kernel` in the type of `x`, returned as `out` if one is given; the gradient of the
    kernel is float32 if `wide`."""
    return (_wide_product if wide else _product)(x, kernel, axes, out)


def along_last(vector: Float[Array, " d"], like: Float[Array, "*b d"]) -> Float[Array, "*one d"]:
    """A vector along the last axis of another array, so that no rank is promoted in silence."""
    return jnp.expand_dims(vector, tuple(range(like.ndim - 1)))


def add_bias(y: Float[Array, "*b o"], bias: Float[Array, " o"], wide: bool) -> Float[Array, "*b o"]:
    """`y + bias` in the type of `y`; the gradient of the bias is float32 if `wide`."""
    return (_wide_sum if wide else _sum)(y, bias)


def _product(x: Array, kernel: Array, axes: Axes, out: Any) -> Array:
    return jnp.matmul(
        x, kernel.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=out
    )


_wide_product = jax.custom_vjp(_product, nondiff_argnums=(2, 3))


def _product_forward(x: Array, kernel: Array, axes: Axes, out: Any) -> Any:
    return _product(x, kernel, axes, out), (x, kernel)


def _product_backward(axes: Axes, out: Any, saved: Any, slope: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    multiply = functools.partial(jax.lax.dot_general, precision=precision(x.dtype))
    columns = ((x.ndim - 1,), (1,)), ((), ())
    own = multiply(slope, kernel.astype(x.dtype), columns, preferred_element_type=x.dtype)
    wide = multiply(x, slope, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return own, (wide if axes is None else constrain(wide, *axes)).astype(kernel.dtype)


_wide_product.defvjp(_product_forward, _product_backward)


def _sum(y: Array, bias: Array) -> Array:
    return y + along_last(bias.astype(y.dtype), y)


_wide_sum = jax.custom_vjp(_sum)


def _sum_backward(like: Array, slope: Array) -> tuple[Array, Array]:
    summed = jnp.sum(slope, axis=tuple(range(slope.ndim - 1)), dtype=jnp.float32)
    return slope, summed.astype(like.dtype)


_wide_sum.defvjp(lambda y, bias: (_sum(y, bias), bias), _sum_backward)
