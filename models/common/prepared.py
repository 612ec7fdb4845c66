"""Weights prepared for decoding, once per rollout instead of once per token.

Decoding is bound by reading weights. So the matrices of the language model are cast to the
compute dtype beforehand, a tied head gets a matrix of its own, transposed, and on CPU, where a
product first copies its layer out of the stack, layers are unstacked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array

from models.common.layers import unstack_layers
from paravt_jax.lora import is_adapter
from paravt_jax.mesh import AnyMesh, platform, sharding
from paravt_jax.params import Params, ParamSpec, Table, head_of


def prepare(params: Params, table: Table, head: str, dtype: Any) -> dict[str, Any]:
    """Weights of the model whose parameter table this is, with its head under the name `head`; what
    stays as it is, is not copied."""
    unstacked = platform() == "cpu"
    prepared = {
        name: _prepare(weights, dtype if is_product(table[name]) else weights.dtype, unstacked)
        if table[name].is_stacked
        else weights
        for name, weights in params.items()
        if name in table
    }
    makes_logits = head_of(table)
    kernel = params[makes_logits.name]
    # Read by its transpose, a head of 32,768 x 1,024 comes at 8 GB/s on CPU, by itself at 16.
    kernel = kernel if makes_logits.part == "head" else _transpose(kernel)
    return prepared | {head: _prepare(kernel, dtype, unstacked=False)}


def shardings(
    prepared: Mapping[str, Any], table: Table, head: str, mesh: AnyMesh
) -> dict[str, Any]:
    """Where each of the prepared weights lives on a mesh."""
    # A head that was tied is the embedding, transposed.
    axes = {head: head_of(table).axes[::-1]} | {name: spec.axes for name, spec in table.items()}

    def shards(name: str, weights: Any) -> Any:
        if isinstance(weights, tuple):
            return tuple(sharding(mesh, axes[name][1:], layer.shape) for layer in weights)
        return sharding(mesh, axes[name], weights.shape)

    return {name: shards(name, weights) for name, weights in prepared.items()}


def is_product(spec: ParamSpec) -> bool:
    """Whether a parameter of the language model's layers is a matrix that is multiplied in the
    compute dtype: routers of experts and adapters work in float32."""
    in_layers = spec.is_stacked and spec.part == "layers"
    return in_layers and spec.is_matrix and not is_adapter(spec.name)


def _prepare(weights: Array, dtype: Any, unstacked: bool) -> Array | tuple[Array, ...]:
    if not unstacked:
        return weights if weights.dtype == dtype else _cast(weights, dtype)
    return _cast_unstacked(weights, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _cast(weights: Array, dtype: Any) -> Array:
    return weights.astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _cast_unstacked(weights: Array, dtype: Any) -> tuple[Array, ...]:
    return unstack_layers(weights.astype(dtype))


@jax.jit
def _transpose(weights: Array) -> Array:
    return weights.T
