"""One table of parameters: it drives initialisation, sharding, checkpoints and conversion.

A model is built *abstract*: its modules declare each parameter beside the code that uses it
(`declare`), with shape, logical axes, initialiser and Hugging Face name, and no memory is
allocated. `Blueprint` gathers the declarations into a table. Weights themselves live outside
the modules, in a flat dict `{dotted name: array}`, the pytree that jit, optax and Orbax see.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array

from paravt_jax.mesh import AnyMesh, sharding
from paravt_jax.parts import Part

Params = dict[str, Array]
Box = tuple[slice, ...]
"""A part of an array: one slice for each axis, with start and stop."""
Model = TypeVar("Model", bound=nnx.Module)
Initialiser = Callable[[Array, tuple[int, ...], jnp.dtype], Array]


@runtime_checkable
class Tensor(Protocol):
    """An array, or what reads one from a file when it is indexed."""

    def __getitem__(self, box: Box, /) -> np.ndarray:
        """The values of a box."""
        ...


@dataclasses.dataclass(frozen=True)
class HfLayout:
    """How one layer of a parameter lies in a Hugging Face checkpoint."""

    shape: tuple[int, ...]
    """Shape of the tensor there."""
    swapped: bool = True
    """Whether it is a torch weight `[*batch, out, in...]` that we keep as `[*batch, in, out]`;
    otherwise the same values in another shape."""
    batch: int = 0
    """Leading dimensions that are no part of the matrix (experts)."""

    def read(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Our layer of this `shape` from a tensor in this layout."""
        if self.swapped:
            tensor = tensor.reshape(*self.shape[: self.batch + 1], -1).swapaxes(-1, -2)
        return tensor.reshape(shape)

    def write(self, value: np.ndarray) -> np.ndarray:
        """Inverse of `read`."""
        if self.swapped:
            batch, out = self.shape[: self.batch], self.shape[self.batch]
            value = value.reshape(*batch, -1, out).swapaxes(-1, -2)
        return value.reshape(self.shape)

    def read_box(self, tensor: Tensor, shape: tuple[int, ...], box: Box) -> np.ndarray:
        """`read(tensor, shape)[box]`, taking from `tensor` little more than the box."""
        taken, rest = [slice(None)] * len(self.shape), list(box)
        inner = list(shape)
        for axis, dimension in self.common_axes(shape).items():
            taken[dimension], rest[axis] = box[axis], slice(None)
            inner[axis] = box[axis].stop - box[axis].start
        part = tensor[tuple(taken)]
        narrow = dataclasses.replace(self, shape=part.shape)
        return narrow.read(part, tuple(inner))[tuple(rest)]

    def write_rows(self, value: np.ndarray) -> np.ndarray:
        """`write` of a box that is whole but for the axis of the tensor's first dimension."""
        rows = value.size // math.prod(self.shape[1:])
        return dataclasses.replace(self, shape=(rows, *self.shape[1:])).write(value)

    def common_axes(self, shape: tuple[int, ...]) -> dict[int, int]:
        """Axes of a layer of this `shape` that are a dimension of the tensor, and which one.

        Those are the leading and the trailing ones of equal size: between them the tensor's
        dimensions are split or joined in another way.
        """
        order = list(range(len(self.shape)))
        if self.swapped:
            order.append(order.pop(self.batch))
        sizes = [self.shape[dimension] for dimension in order]
        head = _common_prefix(sizes, shape)
        tail = min(_common_prefix(sizes[::-1], shape[::-1]), len(sizes) - head)
        pairs = [(axis, order[axis]) for axis in range(head)]
        pairs += [(len(shape) - 1 - i, order[len(order) - 1 - i]) for i in range(tail)]
        return dict(pairs)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """Everything that is known about one parameter."""

    name: str
    """Dotted path in the module tree; the key in the flat dict."""
    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    """Logical axis of each dimension; `paravt_jax.mesh.RULES` maps them to the mesh."""
    init: Initialiser
    hf_name: str
    """Name in a Hugging Face checkpoint, with `{}` for the layer number of a stacked one."""
    hf_layouts: tuple[HfLayout, ...] = ()
    """Layouts of one layer that occur in Hugging Face checkpoints where they differ from ours;
    the first that fits is read, the first is written."""
    layers: tuple[int, ...] | None = None
    """Numbers of the layers stacked in the leading dimension; None for a parameter that stands
    alone."""
    part: Part = "layers"
    """The part of the model that it belongs to: what trains, and what rollouts cast, goes by it."""

    @property
    def is_stacked(self) -> bool:
        """Whether it belongs to the stacked layers of the language model, routers included."""
        return self.layers is not None and self.part in ("layers", "router")

    @property
    def is_matrix(self) -> bool:
        """Whether (each of its layers) is a matrix, or a batch of them."""
        return len(self.layer_shape) >= 2

    @property
    def hf_names(self) -> list[str]:
        """Names of all tensors in a Hugging Face checkpoint that make up this parameter."""
        return [self.hf_name.format(number) for number in self.layers or (0,)]

    @property
    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Shapes that each tensor named by `hf_names` may have."""
        return [layout.shape for layout in self._layouts]

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """One layer of this parameter from a tensor of a Hugging Face checkpoint.

        Raises:
          ValueError: the tensor has none of `hf_shapes`.
        """
        return self._layout(tensor.shape).read(tensor, self.layer_shape)

    def box_from_hf(self, tensor: Tensor, shape: tuple[int, ...], box: Box) -> np.ndarray:
        """`from_hf(tensor)[box]` of a tensor of this `shape`, taking little more than the box.

        Raises:
          ValueError: `shape` is none of `hf_shapes`.
        """
        return self._layout(shape).read_box(tensor, self.layer_shape, box)

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """Inverse of `from_hf` in the first layout."""
        return self._layouts[0].write(value)

    def rows_to_hf(self, value: np.ndarray) -> np.ndarray:
        """Rows of `to_hf(layer)`, of a layer that is whole but for its `row_axis`."""
        return self._layouts[0].write_rows(value)

    @property
    def row_axis(self) -> int | None:
        """Axis along which the rows of a Hugging Face tensor lie; None where a layer can only be
        converted as a whole."""
        axes = self._layouts[0].common_axes(self.layer_shape)
        found = (axis + bool(self.layers) for axis, dimension in axes.items() if dimension == 0)
        return next(found, None)

    @property
    def part_axes(self) -> tuple[int, ...]:
        """Axes along which the parameter can be cut into parts that are converted one by one:
        that of the layers, then that of the rows."""
        rows = () if self.row_axis is None else (self.row_axis,)
        return (0, *rows) if self.layers else rows

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer as we keep it."""
        return self.shape[1:] if self.layers else self.shape

    def _layout(self, shape: tuple[int, ...]) -> HfLayout:
        for layout in self._layouts:
            if layout.shape == shape:
                return layout
        raise ValueError(f"{self.hf_name}: shape {shape} is none of {self.hf_shapes}")

    @property
    def _layouts(self) -> tuple[HfLayout, ...]:
        return self.hf_layouts or (HfLayout(self.layer_shape, swapped=False),)


Table = dict[str, ParamSpec]


def only_of(table: Table, part: Part) -> ParamSpec | None:
    """The parameter that is a part of the model by itself, as `embedding` and `head` are; None in a
    model without it, as one whose head is the embedding."""
    return next((spec for spec in table.values() if spec.part == part), None)


def head_of(table: Table) -> ParamSpec:
    """The parameter that makes logits: the head, or the embedding where both are one.

    Raises:
      ValueError: the table declares neither.
    """
    found = only_of(table, "head") or only_of(table, "embedding")
    if found is None:
        raise ValueError("the table of parameters names no part `head` and no part `embedding`")
    return found


def declare(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initialiser,
    hf_name: str,
    *hf_layouts: HfLayout,
) -> nnx.Param:
    """An abstract parameter of a module; see `ParamSpec` for the arguments."""
    spec = ParamSpec("", shape, jnp.dtype("float32"), axes, init, hf_name, hf_layouts)
    return _abstract(spec)


def stack(module: Model, layers: Sequence[int]) -> Model:
    """Give every parameter of an abstract module a leading axis with one entry for each of the
    layers of these numbers."""
    for _, param in nnx.iter_graph(module):
        if isinstance(param, nnx.Param):
            spec: ParamSpec = param.get_metadata("spec")
            _respecify(
                param,
                dataclasses.replace(
                    spec,
                    shape=(len(layers), *spec.shape),
                    axes=("layers", *spec.axes),
                    layers=tuple(layers),
                ),
            )
    return module


def _abstract(spec: ParamSpec) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(spec.shape, spec.dtype), spec=spec)


def _respecify(param: nnx.Param, spec: ParamSpec) -> None:
    param.set_value(jax.ShapeDtypeStruct(spec.shape, spec.dtype))
    param.set_metadata("spec", spec)


class Blueprint(Generic[Model]):
    """An abstract module, its parameter table, and the way back from a flat dict to a module."""

    def __init__(self, module: Model, part_of: Callable[[str], Part] = lambda name: "layers"):
        """
        Args:
          part_of: the part that the parameter of a name belongs to.
        """
        self._graphdef, state = nnx.split(module)
        flat = nnx.to_flat_state(state)
        self._treedef = jax.tree.structure(state)
        self.table: Table = {}
        for path, param in flat:
            name = ".".join(str(part) for part in path)
            spec: ParamSpec = param.get_metadata("spec")
            self.table[name] = dataclasses.replace(spec, name=name, part=part_of(name))

    def bind(self, params: Mapping[str, Array]) -> Model:
        """The module with weights in it; cheap, for use inside a trace.

        Raises:
          KeyError: a parameter of the table is not in `params`.
        """
        # The table is in the order of the leaves; `params` may be in any.
        leaves = [params[name] for name in self.table]
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))


def initialise(
    table: Table, key: Array, mesh: Mesh | None = None, dtype: jnp.dtype | str = "float32"
) -> Params:
    """Fresh weights, made where they will live.

    Each parameter's key folds in a hash of its name, so that adding a parameter does not
    change the others.
    """

    def build(key: Array) -> Params:
        return {name: _initial_value(spec, key, jnp.dtype(dtype)) for name, spec in table.items()}

    return jax.jit(build, out_shardings=param_shardings(table, mesh))(key)


def _initial_value(spec: ParamSpec, key: Array, dtype: jnp.dtype) -> Array:
    # Not `hash`: Python salts it anew in every process, and hosts must agree.
    own_key = jax.random.fold_in(key, zlib.crc32(spec.name.encode()))
    return spec.init(own_key, spec.shape, jnp.dtype("float32")).astype(dtype)


def param_shardings(table: Table, mesh: AnyMesh | None) -> dict[str, jax.sharding.Sharding]:
    """Where each parameter lives; without a mesh, on the first device."""
    if mesh is None:
        return dict.fromkeys(table, SingleDeviceSharding(jax.local_devices()[0]))
    return {name: sharding(mesh, spec.axes, spec.shape) for name, spec in table.items()}


def abstract_params(
    table: Table, mesh: AnyMesh | None = None, dtype: jnp.dtype | str = "float32"
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of all parameters, with no memory behind them."""
    homes = param_shardings(table, mesh)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=homes[name])
        for name, spec in table.items()
    }


def format_table(
    table: Table, mesh: AnyMesh | None = None, dtype: jnp.dtype | str = "float32"
) -> str:
    """A table for people: name, shape, logical axes, partition, bytes on one device."""
    lines, total = [], 0
    width = max(map(len, table))
    for name, value in abstract_params(table, mesh, dtype).items():
        local = math.prod(value.sharding.shard_shape(value.shape)) * value.dtype.itemsize
        total += local
        partition = getattr(value.sharding, "spec", "one device")
        axes = ",".join(axis or "-" for axis in table[name].axes)
        shape = "x".join(map(str, value.shape))
        lines.append(f"{name:<{width}}  {shape:<18} {axes:<24} {local:>14,}  {partition}")
    count = sum(math.prod(spec.shape) for spec in table.values())
    head = f"{'parameter':<{width}}  {'shape':<18} {'axes':<24} {'bytes/device':>14}  partition"
    return "\n".join([head, *lines, f"{count:,} parameters, {total:,} bytes on each device"])


@dataclasses.dataclass(frozen=True)
class Normal:
    """Independent normal values."""

    stddev: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return self.stddev * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Independent uniform values between `-bound` and `bound`."""

    bound: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)
