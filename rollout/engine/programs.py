"""Shapes of an engine's calls, by which they are compiled ahead of time for devices that are
elsewhere: of each function the largest call that rollouts within given sizes can make, which needs
most memory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from paravt_jax.interfaces import Params
from paravt_jax.mesh import AnyMesh, batch_shards, sharding
from paravt_jax.records import VisionFeatures
from rollout.engine.engine import Engine, GeneratingRows, PaddedTokens
from rollout.engine.padding import MIN_APPEND, MIN_PROMPT, NO_LIMIT, full_batch, static_size
from rollout.engine.precompile import InputSizes, Size
from rollout.engine.session import generating_rows


@dataclasses.dataclass(frozen=True)
class EngineCall:
    """One call of a jitted function of an engine."""

    function: str
    """`encode`, `prefill`, `append` or `decode`."""
    pools: tuple[str, ...]
    rows: int
    """Prompts, blocks or streams; padding of the batch included."""
    tokens: int
    """Of each row, frames not counted."""
    frames: int
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """As tables have it."""
        return f"{self.function} {' + '.join(self.pools)}"


class EngineCalls:
    """The largest calls of an engine for each of its pools."""

    def __init__(
        self,
        engine: Engine,
        params: Params,
        inputs: Mapping[str, InputSizes],
        mesh: AnyMesh,
        patch_values: int,
    ) -> None:
        """
        Args:
            params: shapes of what `Policy.prepare` returns, laid out.
            inputs: for each pool of the engine.
            patch_values: values of a flattened patch.
        """
        self._engine, self._params, self._inputs = engine, params, inputs
        self._mesh, self._patch_values = mesh, patch_values
        self._states = engine.caches.abstract(mesh)

    def __iter__(self) -> Iterator[EngineCall]:
        """All of them: per pool, and decoding per set of pools."""
        for name in self._engine.pools:
            yield from self._prompts(name)
            yield from self._appended(name)
        count = len(self._engine.pools)
        for size in range(1, count + 1):
            for pools in itertools.combinations(self._engine.pools, size):
                yield self._decode(pools)

    def _prompts(self, name: str) -> Iterator[EngineCall]:
        """Encode and prefill a full batch of the largest prompts."""
        pool = self._engine.pools[name]
        sizes = self._inputs[name].prompt_sizes(pool)
        largest = max(static_size(*size, MIN_PROMPT, pool.prompt_tokens) for size in sizes)
        rows = full_batch(pool.prompts, batch_shards(dict(self._mesh.shape)))
        yield from self._encode(name, rows, largest)
        arguments = (
            self._params,
            self._states[name].prompts,
            self._padded(rows, largest[0]),
            self._features(rows, largest[1]),
            _host((rows,), jnp.int32),
        )
        yield EngineCall("prefill", (name,), rows, *largest, arguments)

    def _appended(self, name: str) -> Iterator[EngineCall]:
        """Append the largest block to all rows at once."""
        rows, sizes = self._engine.pools[name].rows, self._inputs[name].appended_sizes()
        if not sizes:
            return
        largest = max(static_size(*size, MIN_APPEND, NO_LIMIT) for size in sizes)
        yield from self._encode(name, rows, largest, "encode appended")
        arguments = (
            self._params,
            self._states[name],
            self._padded(rows, largest[0]),
            self._features(rows, largest[1]),
            None,
        )
        yield EngineCall("append", (name,), rows, *largest, arguments)

    def _encode(
        self, name: str, rows: int, size: Size, function: str = "encode"
    ) -> Iterator[EngineCall]:
        if size[1]:
            arguments = self._params, *self._patches(rows, size[1])
            yield EngineCall(function, (name,), rows, 0, size[1], arguments)

    def _decode(self, pools: Sequence[str]) -> EngineCall:
        rows = sum(self._engine.pools[name].rows for name in pools)
        automata = self._engine.automata
        generating: GeneratingRows = jax.tree.map(_like, generating_rows([None] * rows))
        whole = sharding(self._mesh, (None, None), (1, 1))
        table = jax.ShapeDtypeStruct((automata.states, automata.vocab), jnp.int16, sharding=whole)
        states = tuple(self._states[name] for name in pools)
        arguments = self._params, states, generating, table, _host((), jnp.int32)
        return EngineCall("decode", tuple(pools), rows, 1, 0, arguments)

    def _padded(self, rows: int, tokens: int) -> PaddedTokens:
        def zeros() -> PaddedTokens:
            one = jnp.zeros((rows, tokens), jnp.int32)
            positions, lengths = jnp.zeros((rows, tokens, 3), jnp.int32), jnp.zeros(rows, jnp.int32)
            return PaddedTokens(one, positions, one, lengths)

        return jax.tree.map(_like, jax.eval_shape(zeros))

    def _patches(self, rows: int, frames: int) -> tuple[Any, Any]:
        patches = self._engine.frame_patches
        values = _host((rows, frames, patches, self._patch_values), jnp.float32)
        return values, _host((rows, frames, 2), jnp.int32)

    def _features(self, rows: int, frames: int) -> VisionFeatures | None:
        """What the tower makes of frames, rows laid out as the engine lays out its input."""
        if not frames:
            return None
        made = jax.eval_shape(
            self._engine.policy.encode, self._params, *self._patches(rows, frames)
        )

        def lay_out(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = ("batch", *(None,) * (leaf.ndim - 1))
            placement = sharding(self._mesh, axes, leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

        return jax.tree.map(lay_out, made)


def _host(shape: tuple[int, ...], dtype: Any) -> Any:
    """The shape of an array that comes from the host: it has no sharding."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _like(x: Any) -> Any:
    return _host(x.shape, x.dtype)
