"""TPU's attention kernel against the plain computation: emulated here, compiled where libtpu is."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from models.common import attention, splash
from models.common.attention import reference, visibility
from models.common.kernels import by_heads, to_tokens
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.shared_rows import Bounds, SharedRows, unit_of
from tests.support.shared_rows import shared_rows, visible_in

pytestmark = pytest.mark.slow

TOKENS = 300
PACKED = np.repeat([[1, 2, 3, 0], [1, 1, 2, 0]], TOKENS // 4, axis=1)


def draw(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


ROWS, SLOTS = shared_rows(300, 200, 128)
COARSE, COARSE_SLOTS = shared_rows(300, 200, 256)

CASES = {
    "causal": ((2, TOKENS, 4, 2, 128), {"causal": True}),
    "packed": ((2, TOKENS, 4, 2, 64), {"causal": True, "segments": PACKED}),
    "frames": ((2, TOKENS, 3, 3, 72), {"causal": False, "segments": PACKED == 0}),
    "whole frames": ((1, TOKENS, 2, 2, 72), {"causal": False}),
    "shared": ((2, SLOTS, 4, 2, 128), {"causal": True, "shared": ROWS}),
    "coarse": ((2, COARSE_SLOTS, 2, 1, 128), {"causal": True, "shared": COARSE}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_plain_computation(name):
    (b, t, n, k, h), terms = CASES[name]
    if "segments" in terms:
        terms = terms | {"segments": jnp.asarray(terms["segments"], jnp.int32)}
    query, key, value, weights = draw((b, t, n, h), (b, t, k, h), (b, t, k, h), (b, t, n, h))
    visible = visibility(t, t, CASES[name][1]["causal"], segments=terms.get("segments"))
    if "shared" in terms:
        visible = visible_in(terms["shared"], t)
        # What padding sees means nothing.
        weights = jnp.where((terms["shared"].segments(t) >= 0)[..., None, None], weights, 0)

    def weighed(attend, *inputs):
        mixed = attend(*inputs)
        return jnp.sum(mixed * weights), jnp.where(weights == 0, 0, mixed)

    def both(attend):
        loss = functools.partial(weighed, attend)
        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    ours = both(functools.partial(splash.attend, **terms, interpret=True))
    plain = both(lambda *inputs: reference(inputs[0], inputs[1], inputs[2], visible))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(
    ("mesh", "shard"),
    [
        ("data:2,fsdp:2,tensor:2", (1, 2)),
        ("fsdp:2,tensor:4", (2, 1)),
        ("fsdp:2,context:2,tensor:2", (2, 1)),
    ],
)
def test_rows_and_heads_are_split_over_a_mesh(mesh, shard):
    """Also where there are fewer key heads than parts of heads."""
    inputs = draw((4, 128, 4, 128), (4, 128, 2, 128), (4, 128, 2, 128))
    segments = jnp.asarray(np.repeat([[1, 2]] * 4, 64, axis=1), jnp.int32)
    ours = functools.partial(splash.attend, causal=True, segments=segments, interpret=True)
    alone = jax.jit(ours)(*inputs)
    sizes = parse_mesh(mesh, 8)
    with jax.set_mesh(make_mesh(sizes)):
        split = jax.jit(ours)(*inputs)
    np.testing.assert_allclose(split, alone, atol=1e-6)
    assert split.sharding.shard_shape(split.shape) == (shard[0], 128, shard[1], 128)


@pytest.mark.parametrize(
    ("tokens", "slots", "block"),
    [(130, 256, 256), (512, 512, 512), (513, 768, 768), (1500, 1536, 768), (20_096, 20_480, 1024)],
)
def test_rows_are_padded_to_few_large_blocks(tokens, slots, block):
    assert splash.padded_length(tokens) == (slots, block)


@pytest.mark.parametrize("sizes", [(), (300, 200, 64), (700, 130, 256), (10, 1, 128)])
def test_blocks_of_the_mask_are_found_without_looking_at_each_key(sizes):
    mask = splash.StaticMask(1024, *sizes)
    query, key = np.ogrid[:1024, :1024]
    seen = query >= key
    if sizes:
        prompt, own, unit = sizes
        seen &= (key < prompt) | (key > query - max(own, unit))
    blocks = [slice(at, at + 128) for at in range(0, 1024, 128)]
    for block in itertools.product(blocks, blocks):
        np.testing.assert_array_equal(mask[block], seen[block])


def test_streams_begin_where_numbers_of_31_bits_can_tell():
    """Those of long prompts at multiples of more slots; the kernel then sees the same."""
    assert unit_of("cpu", 131_072, 5_000, 8) == 1
    units = {prompt: unit_of("tpu", prompt, 5_000, 8) for prompt in (0, 5_000, 16_000, 131_072)}
    assert units == {0: 128, 5_000: 128, 16_000: 128, 131_072: 512}
    assert splash.holds(Bounds(131_072, 5_000, 512), 176_128)
    assert not splash.holds(Bounds(131_072, 5_000, 256), 176_128)


def test_what_the_kernel_serves(monkeypatch):
    """16 bits on a TPU, and no row too short, no block of a cache: the rest is XLA's."""
    shape = (1, splash.SHORT, 2, 128)
    query = jnp.zeros(shape, jnp.bfloat16)
    assert not splash.serves(query, query)
    monkeypatch.setattr(splash, "platform", lambda: "tpu")
    assert splash.serves(query, query)
    assert not splash.serves(query.astype(jnp.float32), query.astype(jnp.float32))
    assert not splash.serves(query[:, 1:], query[:, 1:])
    assert not splash.serves(query[:, 1:], query)


@pytest.mark.parametrize("causal", [True, False])
def test_the_door_takes_the_kernel_and_tells_it_the_lengths(monkeypatch, causal):
    monkeypatch.setattr(splash, "platform", lambda: "tpu")
    emulated = functools.partial(splash.attend, interpret=True)
    monkeypatch.setattr(splash, "attend", emulated)
    shapes = (2, TOKENS, 4, 128), (2, TOKENS, 2, 128), (2, TOKENS, 2, 128)
    inputs, lengths = draw(*shapes, dtype=jnp.bfloat16), jnp.asarray([200, TOKENS], jnp.int32)
    got = jax.jit(functools.partial(attention.attend, causal=causal, key_lengths=lengths))(*inputs)
    visible = visibility(TOKENS, TOKENS, causal, key_lengths=lengths)
    query, key, value = (x.astype(jnp.float32) for x in inputs)
    exact = reference(query, key, value, visible)
    real = (jnp.arange(TOKENS)[None] < lengths[:, None])[..., None, None]
    assert float(jnp.abs(jnp.where(real, got.astype(jnp.float32) - exact, 0)).max()) < 0.02


@pytest.mark.parametrize("streams", [0, 8])
def test_it_compiles_for_a_tpu_and_nothing_is_gathered(streams):
    """Forward and backward pass of a layer's attention, its rows and heads split over eight chips;
    each is one kernel, in which XLA sees nothing to partition."""
    pytest.importorskip("libtpu", reason="compiling for a TPU takes libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices
    mesh = make_mesh(parse_mesh("fsdp:4,tensor:2", 8), devices)
    where = NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor"))
    query, key = (
        jax.ShapeDtypeStruct((4, 2048, heads, 128), jnp.bfloat16, sharding=where)
        for heads in (8, 4)
    )

    def rows(numbers):
        starts = jnp.tile(1024 + 128 * jnp.arange(streams, dtype=jnp.int32), 4)
        return SharedRows(numbers, starts, 0 * starts + 100, Bounds(1024, 128, 128))

    def loss(*inputs):
        shared = rows(jnp.full(4, 1000, jnp.int32)) if streams else None
        mixed = attention.attend(*inputs, causal=True, shared=shared)
        return jnp.sum(mixed.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key).compile().as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not re.search("all-gather|all-to-all|collective-permute", text)


def test_long_rows_are_exchanged_by_heads_and_nothing_is_gathered():
    """Rows that four chips share, forward and back: queries, keys, values and what is mixed."""
    pytest.importorskip("libtpu", reason="compiling for a TPU takes libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices
    mesh = make_mesh(parse_mesh("fsdp:2,context:4", 8), devices)
    where = NamedSharding(mesh, PartitionSpec("fsdp", "context"))
    query, key = (
        jax.ShapeDtypeStruct((2, 2048, heads, 128), jnp.bfloat16, sharding=where)
        for heads in (8, 4)
    )

    def loss(*inputs):
        mixed = to_tokens(attention.attend(*by_heads(*inputs), causal=True))
        return jnp.sum(mixed.astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(query, key, key).compile().as_text() or ""
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 8
    assert not re.search("all-gather|all-reduce|collective-permute", text)


def test_the_door_takes_the_kernel_where_prompts_are_shared(monkeypatch):
    """If streams begin where it can tell them apart."""
    inputs = draw((2, SLOTS, 4, 64), (2, SLOTS, 2, 64), (2, SLOTS, 2, 64))

    def door(shared):
        return jax.jit(functools.partial(attention.attend, causal=True, shared=shared))(*inputs)

    plain, calls = door(shared=ROWS), []

    def emulated(*inputs, **terms):
        calls.append(terms)
        return kernel(*inputs, **terms, interpret=True)

    kernel = splash.attend
    monkeypatch.setattr(splash, "serves", lambda query, key: query.shape[1] == SLOTS)
    monkeypatch.setattr(splash, "attend", emulated)
    real = np.asarray(ROWS.segments(SLOTS) >= 0)
    np.testing.assert_allclose(door(shared=ROWS)[real], plain[real], atol=2e-6)
    assert len(calls) == 1
    finer = dataclasses.replace(ROWS, bounds=dataclasses.replace(ROWS.bounds, unit=64))
    assert not splash.holds(finer.bounds, SLOTS)
    np.testing.assert_array_equal(door(shared=finer)[real], plain[real])
    assert len(calls) == 1
