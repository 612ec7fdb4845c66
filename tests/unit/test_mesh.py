"""Mesh descriptions, and which dimension is split over which mesh axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paravt_jax import mesh as meshes
from paravt_jax.mesh import constrain, make_mesh, parse_mesh, sharding


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (None, (8, 1, 1, 1, 1)),
        ("data:2,fsdp:2,tensor:2", (2, 2, 1, 1, 2)),
        ("data:2,expert:-1", (2, 1, 4, 1, 1)),
        ("fsdp:-1", (1, 8, 1, 1, 1)),
        ("fsdp:2,context:-1", (1, 2, 1, 4, 1)),
        ("tensor:2, data:-1", (4, 1, 1, 1, 2)),
        ("data:-1,fsdp:8", (1, 8, 1, 1, 1)),
    ],
)
def test_parse(text, sizes):
    assert tuple(parse_mesh(text, 8)[axis] for axis in meshes.AXES) == sizes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("model:8", "unknown axis 'model'; choose from data, fsdp, expert, context, tensor"),
        ("data:2,data:4", "given twice"),
        ("data:two", "positive number or -1"),
        ("data", "positive number or -1"),
        ("data:0", "positive number or -1"),
        ("data:-2", "positive number or -1"),
        ("data:-1,fsdp:-1", "only one axis may be -1"),
        ("data:3", "multiply to the 8 devices"),
        ("data:3,fsdp:-1", "multiply to the 8 devices"),
        ("", "unknown axis"),
    ],
)
def test_parse_refuses(text, why):
    with pytest.raises(ValueError, match=why) as refusal:
        parse_mesh(text, 8)
    assert str(refusal.value).startswith(f"--mesh {text}:")


@pytest.fixture
def mesh():
    return make_mesh(parse_mesh("data:2,fsdp:2,tensor:2", 8))


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "heads"), (8, 6), PartitionSpec(("fsdp", "context"), "tensor")),
        (("layers", "embed", "mlp"), (3, 8, 6), PartitionSpec(None, ("fsdp", "context"), "tensor")),
        (
            ("batch", None, "vocab"),
            (4, 3, 10),
            PartitionSpec(("data", "fsdp", "expert"), None, "tensor"),
        ),
        (("vocab", "embed"), (7, 8), PartitionSpec(None, ("fsdp", "context"))),
        (("batch", None), (6, 3), PartitionSpec(None, None)),
    ],
)
def test_rules(mesh, axes, shape, spec):
    assert sharding(mesh, axes, shape).spec == spec


def test_two_axes_on_one_mesh_axis_collide(mesh):
    with pytest.raises(ValueError, match=r"'heads' and 'mlp'.*'tensor'"):
        sharding(mesh, ("heads", "mlp"), (4, 4))
    with pytest.raises(ValueError, match="'fsdp'"):
        sharding(mesh, ("batch", "embed"), (4, 4))


def test_unknown_axes_and_wrong_rank_are_refused(mesh):
    with pytest.raises(ValueError, match="unknown logical axis 'depth'"):
        sharding(mesh, ("depth",), (4,))
    with pytest.raises(ValueError, match="2 logical axes"):
        sharding(mesh, ("embed", "mlp"), (4,))


def test_constrain_lays_out_activations_only_under_a_mesh(mesh):
    x = jnp.arange(32.0).reshape(4, 8)
    double = jax.jit(lambda x: constrain(2 * x, "batch", "mlp"))
    assert len(double(x).sharding.device_set) == 1
    with jax.set_mesh(mesh):
        spread = jax.jit(lambda x: constrain(3 * x, "batch", "mlp"))(x)
    assert spread.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
    np.testing.assert_array_equal(spread, 3 * x)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "tensor")])
def test_a_host_copies_parts_from_its_own_devices_to_its_own(spec):
    """As on each of several hosts; here on one, whose devices are all there are."""
    learner = make_mesh(parse_mesh("fsdp:3", 3), jax.devices()[:3])
    rollouts = make_mesh(parse_mesh("data:2,tensor:2", 4), jax.devices()[4:])
    values = np.arange(24.0).reshape(6, 4)
    x = jax.device_put(values, NamedSharding(learner, PartitionSpec("fsdp")))
    home = NamedSharding(rollouts, spec)
    copied = meshes._copied_within_hosts(x, home)
    assert copied.sharding == home
    for shard in copied.addressable_shards:
        np.testing.assert_array_equal(shard.data, values[shard.index])


@pytest.mark.parametrize("spec", [PartitionSpec(None, "expert", None, "tensor"), PartitionSpec()])
def test_stacked_layers_move_to_another_layout_one_by_one(spec):
    learner = make_mesh(parse_mesh("fsdp:2,expert:2,tensor:2", 8))
    rollouts = meshes.reshape_mesh(learner, parse_mesh("data:2,expert:2,tensor:2", 8))
    values = np.arange(3 * 4 * 8 * 6.0).reshape(3, 4, 8, 6)
    x = jax.device_put(values, NamedSharding(learner, PartitionSpec(None, "expert", "fsdp")))
    home = NamedSharding(rollouts, spec)
    move = jax.jit(lambda x: meshes.moved_by_layers(x, home), out_shardings=home)
    assert "while" in move.lower(x).as_text()
    moved = move(x)
    assert moved.sharding.is_equivalent_to(home, 4)
    np.testing.assert_array_equal(moved, values)
