"""LoRA (Hu et al., 2021): frozen matrices W with a trained product of low rank beside them.

A module with kernel W `[in, out]` computes `x @ W + scale * (x @ A) @ B`, where A is `[in, rank]`,
B is `[rank, out]` and the scale is `alpha / rank`. B begins at zero, so training begins at the
frozen model. In the flat dict of parameters, A and B of `x.kernel` are `x.lora.a` and `x.lora.b`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from paravt_jax.array_store import StoredArray
from paravt_jax.params import Box, Table
from paravt_jax.ranges import at_least
from paravt_jax.settings import Refused, Settings

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = get_args(Target)
"""Projections of a decoder layer under their Hugging Face names."""


@dataclasses.dataclass(frozen=True)
class LoraConfig(Settings):
    """Which projections of the language model get an adapter, and how large it is.

    Raises:
      Refused: no such targets or sizes.
    """

    rank: Annotated[int, at_least(0)] = 0
    """Inner width of each adapter; 0 trains the weights themselves, without LoRA."""
    alpha: Annotated[int, at_least(1)] = 32
    """The adapters' product is scaled by `alpha / rank`: the best learning rate then hardly depends
    on the rank (Schulman et al., LoRA Without Regret, 2025)."""
    targets: tuple[Target, ...] = TARGETS
    """Hugging Face names of the adapted projections."""

    def check_together(self) -> None:
        """Refuse no target, or one twice."""
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise Refused(self, "{targets}: name each projection once, and at least one")

    @property
    def scale(self) -> float:
        """Factor of the adapters' product.

        Raises:
          ZeroDivisionError: there are no adapters.
        """
        return self.alpha / self.rank

    def adapts(self, module: str) -> bool:
        """Whether the module of this dotted Hugging Face name gets an adapter."""
        return self.rank > 0 and module.rpartition(".")[2] in self.targets


NO_LORA = LoraConfig()


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name belongs to an adapter."""
    return name.endswith((".lora.a", ".lora.b"))


def adapter_table(table: Table) -> Table:
    """The adapters' part of a parameter table."""
    return {name: spec for name, spec in table.items() if is_adapter(name)}


class Merged(Mapping[str, Any]):
    """The weights without adapters that compute what `params` compute with theirs.

    An adapted kernel is computed when it is asked for and not kept (one on disk box by box), so
    that a model can be written part by part without a second copy in memory.
    """

    def __init__(self, params: Mapping[str, Array | StoredArray], lora: LoraConfig):
        self._params, self._lora = params, lora

    def __getitem__(self, name: str) -> Array | StoredArray:
        if is_adapter(name):
            raise KeyError(name)
        module, _, kind = name.rpartition(".")
        if kind != "kernel" or f"{module}.lora.a" not in self._params:
            return self._params[name]
        kernel = self._params[name]
        a, b = (self._params[f"{module}.lora.{part}"] for part in "ab")
        if isinstance(kernel, StoredArray):
            return MergedStore(kernel.store, name, np.asarray(a), np.asarray(b), self._lora.scale)
        return _add_product(kernel, a, b, self._lora.scale)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._params if not is_adapter(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@functools.partial(jax.jit, static_argnames="scale")
def _add_product(
    kernel: Float[Array, "*l i o"],
    a: Float[Array, "*l i r"],
    b: Float[Array, "*l r o"],
    scale: float,
) -> Float[Array, "*l i o"]:
    """`kernel + scale * a @ b`, computed in float32."""
    # In bfloat16 an update smaller than 1/256 of the weight would be rounded away.
    wide = [x.astype(jnp.float32) for x in (kernel, a, b)]
    product = jnp.matmul(wide[1], wide[2], precision=jax.lax.Precision.HIGHEST)
    return (wide[0] + scale * product).astype(kernel.dtype)


@dataclasses.dataclass(frozen=True)
class MergedStore(StoredArray):
    """A kernel on disk with its adapter added, in float32, to every box that is read."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def __getitem__(self, box: Box) -> np.ndarray:
        kernel, (*layers, rows, columns) = super().__getitem__(box), box
        a, b = self.a[(*layers, rows)], self.b[(*layers, slice(None), columns)]
        product = np.matmul(a.astype(np.float32), b.astype(np.float32))
        return (kernel.astype(np.float32) + self.scale * product).astype(kernel.dtype)
