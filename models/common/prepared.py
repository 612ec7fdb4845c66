"""Weights as rollouts read them: what every token would do again is done once.

Decoding is bound by reading weights. So the matrices of the language model are cast to the
compute dtype beforehand, a tied head gets a matrix of its own in the order in which its product
reads it, and on CPU, where a product copies what it takes from a stack, layers stand apart.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array

from models.common.layers import lay_apart
from paravt_jax.params import Params, Table

EMBEDDING, HEAD = "text.embedding", "head.kernel"
LAYERS = ("text.layers.", "text.sparse_layers.")
MATRICES = (".kernel", ".gate_up", ".down")


def prepare(params: Params, table: Table, dtype: Any) -> dict[str, Any]:
    """Weights of the model whose parameter table this is; what stays as it is, is not copied."""
    apart = jax.default_backend() == "cpu"
    prepared = {
        name: _prepare(weights, dtype if is_product(name) else weights.dtype, apart)
        if name.startswith(LAYERS)
        else weights
        for name, weights in params.items()
        if name in table
    }
    head = params[HEAD] if HEAD in table else _transpose(params[EMBEDDING])
    return prepared | {HEAD: _prepare(head, dtype, apart=False)}


def is_product(name: str) -> bool:
    """Whether a parameter of a layer is a matrix that is multiplied in the compute dtype: the
    router of experts works in float32."""
    return name.endswith(MATRICES) and ".router." not in name


def _prepare(weights: Array, dtype: Any, apart: bool) -> Array | tuple[Array, ...]:
    if not apart:
        return weights if weights.dtype == dtype else _cast(weights, dtype)
    return _cast_apart(weights, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _cast(weights: Array, dtype: Any) -> Array:
    return weights.astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _cast_apart(weights: Array, dtype: Any) -> tuple[Array, ...]:
    return lay_apart(weights.astype(dtype))


@jax.jit
def _transpose(weights: Array) -> Array:
    return weights.T
