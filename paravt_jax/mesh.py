"""The device mesh, and which logical axis of an array is split over which of its axes.

Mesh axes: `data` (replicas of the weights), `fsdp` (weights split, gathered when used),
`expert` (whole experts split; other weights replicated), `context` (the tokens of each row split,
and weights as by `fsdp`) and `tensor` (heads, MLP width and vocabulary split). The rows of a batch
are split over the first three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or of devices that are elsewhere."""
AXES = ("data", "fsdp", "expert", "context", "tensor")
HOST = "pinned_host"
"""The kind of memory of a host that its devices read by themselves."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    # Rows on their way to experts: every owner of experts sees those of the others.
    "expert_batch": ("data", "fsdp"),
    "expert": ("expert",),
    # Long rows are shared by devices, whole in turn by tokens, by heads and by width (ADR 40).
    "tokens": ("context",),
    "row_heads": ("tensor", "context"),
    "width": ("context",),
    # Frames know nothing of each other, whosever they are.
    "frames": ("data", "fsdp", "expert", "context"),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # See `split_columns`. `tensor` first: columns that it splits stay where they are.
    "columns": ("tensor", "fsdp", "context", "expert", "data"),
    # Layers are walked by a scan: splitting them would gather one whole layer per step anyway.
    "layers": (),
    # Scales and biases of width d are small and used everywhere: replicated.
    "norm": (),
    # Rows of the learned position table: split by width ("embed"), gathered by row.
    "positions": (),
}
"""Logical axis -> mesh axes over which that dimension is split; () keeps it whole."""


def parse_mesh(text: str | None, device_count: int, flag: str = "--mesh") -> dict[str, int]:
    """Sizes of all mesh axes from `"data:2,fsdp:4,tensor:2"`, which `flag` gave.

    Axes not named have size 1; one may be -1 and takes the remaining devices. None puts all
    devices on `data`, which is the fastest mesh for a model that fits one device.

    Raises:
      ValueError: an unknown or repeated axis, a size that is no number, two sizes of -1, or a
        product that is not the number of devices.
    """
    try:
        return _sizes(text, device_count)
    except ValueError as error:
        raise ValueError(f"{flag} {text}: {error}") from None


def _sizes(text: str | None, device_count: int) -> dict[str, int]:
    sizes = dict.fromkeys(AXES, 1) | (_read_sizes(text) if text is not None else {"data": -1})
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one axis may be -1, not {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and device_count % fixed == 0:
        sizes[free[0]] = device_count // fixed
    if math.prod(sizes.values()) != device_count:
        raise ValueError(
            f"the sizes must multiply to the {device_count} devices of this run; "
            "set one axis to -1 to take what is left"
        )
    return sizes


def _read_sizes(text: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition(":"))
        if axis not in AXES:
            raise ValueError(f"unknown axis {axis!r}; choose from {', '.join(AXES)}")
        if axis in sizes:
            raise ValueError(f"axis {axis!r} is given twice; name it once")
        if not size.lstrip("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ValueError(f"size {size!r} of {axis!r} must be a positive number or -1")
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the given sizes (see `parse_mesh`), left to the compiler's propagation.

    Activate it with `jax.set_mesh(mesh)` so that `constrain` takes effect.
    """
    shape = tuple(sizes[axis] for axis in AXES)
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # Sizes that no whole axes of a TPU's torus multiply to: 8 and 2 of 4 x 4.
        grid = create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def reshape_mesh(mesh: Mesh, sizes: dict[str, int]) -> Mesh:
    """Another mesh over the same devices in the same order, so that one program on them can take
    arrays from one layout to the other; `mesh` itself where the sizes are its own."""
    if dict(mesh.shape) == sizes:
        return mesh
    devices = mesh.devices.reshape(tuple(sizes[axis] for axis in AXES))
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_before_copy(x: Array, home: NamedSharding) -> Array:
    """Lay out an array that is on its way to a home where it is both split and copied: split over
    all devices, as far as they divide. To do both at once the compiler would make it whole."""
    sizes = home.mesh.shape
    owners = [(part,) if isinstance(part, str) else part or () for part in home.spec]
    copies = tuple(axis for axis in sizes if axis not in {own for part in owners for own in part})
    for at, own in enumerate(owners):
        if math.prod(sizes[axis] for axis in own) > 1 and x.shape[at] % home.mesh.size == 0:
            parts = [*home.spec[:at], own + copies, *home.spec[at + 1 :]]
            split = NamedSharding(home.mesh, PartitionSpec(*parts))
            return jax.lax.with_sharding_constraint(x, split)
    return x


def on_host(tree: Any) -> Any:
    """The arrays in the memory of the hosts of their devices, split as they were."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), tree)


def on_device(tree: Any) -> Any:
    """The arrays in the memory of their devices; those that are there already are not copied."""

    def fetched(x: Array) -> Array:
        home = x.sharding
        if not isinstance(home, NamedSharding) or home.memory_kind != HOST:
            return x
        return jax.device_put(x, NamedSharding(home.mesh, home.spec))

    return jax.tree.map(fetched, tree)


def axes_text(mesh: AnyMesh) -> str:
    """A mesh as its flag would name it."""
    return ",".join(f"{axis}:{mesh.shape[axis]}" for axis in AXES)


def partition(
    mesh_shape: dict[str, int], axes: Sequence[str | None], shape: Sequence[int]
) -> PartitionSpec:
    """How to split an array with these logical axes.

    A dimension that its mesh axes do not divide stays whole: correct, at the price of memory.

    Raises:
      ValueError: an unknown logical axis, or two dimensions that would share a mesh axis.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for shape {tuple(shape)}")
    parts, owner = [], {}
    for axis, size in zip(axes, shape, strict=True):
        names = tuple(name for name in _mesh_axes(axis) if name in mesh_shape)
        for name in names:
            if name in owner:
                raise ValueError(
                    f"logical axes {owner[name]!r} and {axis!r} of {tuple(axes)} both "
                    f"map to mesh axis {name!r}: change RULES or the axes"
                )
            owner[name] = axis
        splits = math.prod(mesh_shape[name] for name in names)
        parts.append(None if not names or size % splits else names)
    return PartitionSpec(*(p[0] if p and len(p) == 1 else p for p in parts))


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    if axis is None:
        return ()
    if axis not in RULES:
        raise ValueError(f"unknown logical axis {axis!r}; choose from {', '.join(RULES)}")
    return RULES[axis]


def batch_shards(mesh_shape: dict[str, int]) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(mesh_shape.get(axis, 1) for axis in RULES["batch"])


def sharding(mesh: AnyMesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Where an array with these logical axes lives on the mesh; errors as `partition`."""
    return NamedSharding(mesh, partition(dict(mesh.shape), axes, shape))


def moved_by_layers(x: Array, home: NamedSharding) -> Array:
    """`split_before_copy`, stacked layers one after the other: where the compiler cannot go from
    one layout to another by pieces, it makes an array whole, all experts of all layers at once."""
    if x.ndim < 3 or (home.spec and home.spec[0] is not None):
        return split_before_copy(x, home)
    layer = NamedSharding(home.mesh, PartitionSpec(*home.spec[1:]))
    settle = functools.partial(jax.lax.with_sharding_constraint, shardings=layer)
    return jax.lax.map(lambda own: settle(split_before_copy(own, layer)), x)


def copied_apart(tree: Any, homes: Any) -> Any:
    """Arrays, copied to homes that are on other devices; on several hosts each host copies from
    its own devices to its own."""
    if all(home.is_fully_addressable for home in jax.tree.leaves(homes)):
        return jax.device_put(tree, homes)
    return jax.tree.map(_copied_within_hosts, tree, homes)


def _copied_within_hosts(x: Array, home: NamedSharding) -> Array:
    """Whole on all devices that it leaves, one array at a time; each device at home gets its part
    from one of its own host."""
    assert isinstance(x.sharding, NamedSharding)
    copies = [shard.data for shard in _made_whole(x.sharding.mesh)(x).addressable_shards]
    places = home.addressable_devices_indices_map(x.shape).items()
    parts = [
        jax.device_put(copies[number % len(copies)][index], device)
        for number, (device, index) in enumerate(places)
    ]
    return jax.make_array_from_single_device_arrays(x.shape, home, parts)


@functools.cache
def _made_whole(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def put_rows(x: Any, mesh: Mesh) -> Array:
    """A host array on a mesh, its leading dimension split over the batch axes. With several hosts,
    each of them gives the rows alone that its devices hold, by `x[index]`."""
    home = sharding(mesh, ("batch", *(None,) * (x.ndim - 1)), x.shape)
    if home.is_fully_addressable:
        return jax.device_put(x, home)
    # To compare them, `device_put` would send every array to every host (jax 0.10).
    known: dict[str, Any] = {}  # devices that hold the same rows ask one after the other

    def part(index: Any) -> Any:
        if str(index) not in known:
            known[str(index)] = x[index]
        return known[str(index)]

    return jax.make_array_from_callback(x.shape, home, part)


def platform() -> str:
    """What the program that is being traced will run on, "cpu", "tpu" or "gpu": the platform of the
    active mesh, whose devices may be elsewhere (`--compile-only`), or of this process without one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: Array, *axes: str | None) -> Array:
    """Ask the compiler to lay out an activation by its logical axes; no-op without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition(dict(mesh.shape), axes, x.shape))


def splits_tokens() -> bool:
    """Whether the active mesh shares the tokens of a row among devices (`context`)."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def constrain_context(x: Array, *axes: str | None) -> Array:
    """`constrain` where tokens of a row are shared; nothing elsewhere, where the compiler's own
    layout is kept."""
    return constrain(x, *axes) if splits_tokens() else x


def by_tokens(x: Float[Array, "b t *d"]) -> Float[Array, "b t *d"]:
    """Where tokens of a row are shared: what is known of each, on the device that has it."""
    return constrain_context(x, "batch", "tokens", *[None] * (x.ndim - 2))


def by_width(x: Float[Array, "b *l t d"]) -> Float[Array, "b *l t d"]:
    """Where tokens of a row are shared: all of them on each device, but a part of their width, so
    that any of them can be looked up. The exchange moves each number at most once."""
    return constrain_context(x, "batch", *[None] * (x.ndim - 2), "width")


def frames_axis(frames: int) -> str:
    """The logical axis of so many frames: all devices that share rows or tokens share them, if they
    divide, and elsewhere those that share rows."""
    shape = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(shape.get(axis, 1) for axis in RULES["frames"])
    return "batch" if frames % ways else "frames"


def split_columns(
    product: Callable[[Float[Array, "*b d"], Float[Array, "d n"]], Float[Array, "*b n"]],
    kernel: Callable[[], Float[Array, "d n"]],
) -> Callable[[Float[Array, "*b d"]], Float[Array, "*b n"]]:
    """`x -> product(x, kernel())` with the columns of the kernel and of products over all devices.

    For a wide kernel that a scan multiplies with few rows at a time. Where rows and kernel are
    split over `fsdp`, each product gathers the kernel and reduces its gradient. Split by columns, a
    device has its part of the gradient to itself, and what is gathered are rows. Columns need not
    divide: JAX pads them. On one device it changes nothing.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return lambda x: product(x, kernel())
    lay_out, columns = jax.lax.with_sharding_constraint, RULES["columns"]
    # In two steps: the compiler gathers the kernel where it is to do both at once.
    split_kernel = kernel()
    for axes in (RULES["vocab"] + RULES["embed"], columns):
        split_kernel = lay_out(split_kernel, PartitionSpec(None, axes))

    def split(x: Float[Array, "*b d"]) -> Float[Array, "*b n"]:
        y = product(lay_out(x, PartitionSpec(*[None] * x.ndim)), split_kernel)
        return lay_out(y, PartitionSpec(*[None] * (x.ndim - 1), columns))

    return split
