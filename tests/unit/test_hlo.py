"""Costs of compiled programs, against programs counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paravt_jax.mesh import make_mesh, parse_mesh
from train.compile.cost import Cost, group_size, program_cost, ring_bytes
from train.compile.hlo import read
from train.compile.largest import largest_arrays, largest_collectives

LAYERS, ROWS, WIDTH = 6, 8, 64
MESH = make_mesh(parse_mesh("fsdp:8", 8))


def compiled(function, *shapes, specs=None, donate=()):
    """The program of a function of float32 arrays, on one device or on eight."""
    homes = specs and [NamedSharding(MESH, PartitionSpec(*spec)) for spec in specs]
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=homes[i] if homes else None)
        for i, shape in enumerate(shapes)
    ]
    lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    return read(lowered.compile().as_text())


def cost(*arguments, **settings) -> Cost:
    return program_cost(compiled(*arguments, **settings))


def scanned(stack, x):
    return jax.lax.scan(lambda x, own: (jnp.tanh(x @ own), None), x, stack)[0]


STACK, X = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)


def test_products_of_a_loop_count_as_often_as_it_runs():
    """The compiler's own count has them once."""
    found = cost(scanned, STACK, X)
    assert found.flops == LAYERS * 2 * ROWS * WIDTH * WIDTH and not found.open_loops
    # Each layer is read once, whatever the loop slices; what is passed on is small.
    weights = 4 * LAYERS * WIDTH * WIDTH
    assert weights <= found.bytes < 5 * weights


def test_loops_in_loops_multiply():
    def nested(stack, x):
        return jax.lax.fori_loop(0, 5, lambda _, x: scanned(stack, x), x)

    assert cost(nested, STACK, X).flops == 5 * LAYERS * 2 * ROWS * WIDTH * WIDTH


def test_a_loop_whose_length_is_data_counts_by_iteration():
    """And what surrounds it is shared by its iterations."""

    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100, lambda x: x @ x, jnp.sin(x))

    module = compiled(until, (WIDTH, WIDTH))
    found, shared = program_cost(module), program_cost(module, tokens=4)
    assert found.flops == shared.flops == 2 * WIDTH**3
    assert found.open_loops == 1 and shared.bytes < found.bytes


def test_the_dearer_branch_counts():
    def choose(x, y):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ y) @ y, lambda: x @ y)

    assert cost(choose, X, (WIDTH, WIDTH)).flops == 2 * 2 * ROWS * WIDTH * WIDTH


def test_batched_products_and_gradients():
    def loss(x, y):
        return jnp.sum(jnp.einsum("bij,bjk->bik", x, y) ** 2)

    found = cost(jax.grad(loss, argnums=(0, 1)), (4, ROWS, WIDTH), (4, WIDTH, 16))
    assert found.flops == 3 * 2 * 4 * ROWS * WIDTH * 16


def test_a_convolution_counts_what_it_does_not_multiply_with_padding():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )

    # Windows of 3 over 10 places: at both ends one of the three is padding.
    assert cost(convolve, (2, 10, 4), (3, 4, 5)).flops == 2 * 2 * 4 * 5 * (3 * 10 - 2)


def test_an_update_in_place_counts_by_its_size():
    """A cache that is donated: a token is written, not all of it."""
    cache, token = (64, 1024, 16), (64, 1, 16)

    def write(cache, token):
        return jax.lax.dynamic_update_slice(cache, token, (0, 7, 0))

    found = cost(write, cache, token, donate=(0,))
    assert found.bytes <= 4 * 4 * 64 * 16


def test_a_slice_counts_by_its_size():
    found = cost(lambda x: jnp.sin(jax.lax.dynamic_slice(x, (3, 0), (2, 16))), (1000, 16))
    assert found.bytes <= 4 * 4 * 2 * 16


def test_weights_that_are_split_are_gathered_in_each_iteration():
    """Columns of each layer are split eight ways, so that what it gives is gathered: rows of it."""
    found = cost(scanned, STACK, X, specs=[(None, None, "fsdp"), ()])
    gathered = found.collectives["all-gather"]
    assert set(found.collectives) == {"all-gather"}
    assert gathered.count == LAYERS
    assert gathered.bytes == LAYERS * 4 * ROWS * WIDTH
    assert gathered.sent == gathered.bytes * 7 / 8
    assert found.flops == LAYERS * 2 * ROWS * WIDTH * WIDTH / 8


def test_a_sum_over_devices_is_an_all_reduce():
    found = cost(lambda x, y: x @ y, X, (WIDTH, 32), specs=[(None, "fsdp"), ("fsdp", None)])
    reduced = found.collectives["all-reduce"]
    assert (reduced.count, reduced.bytes) == (1, 4 * ROWS * 32)
    assert reduced.sent == 2 * reduced.bytes * 7 / 8


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, x", 2),
        ("replica_groups=[2,4]<=[8], x", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", 2),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a', 'b'}, x", 8),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}, x", 4),
        ("replica_groups={}, x", 16),
    ],
)
def test_sizes_of_groups(text, size):
    assert group_size(text, 16) == size


def test_bytes_of_rings():
    assert ring_bytes("all-gather", 1.0, 8.0, 8) == 7
    assert ring_bytes("reduce-scatter", 8.0, 1.0, 8) == 7
    assert ring_bytes("all-reduce", 8.0, 8.0, 8) == 14
    assert ring_bytes("all-to-all", 8.0, 8.0, 8) == 7
    assert ring_bytes("collective-permute", 8.0, 8.0, 8) == 8


TPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%cond (p: (s32[], bf16[8,512])) -> pred[] {
  %limit = s32[]{:T(128)} constant(36)
  %p = (s32[]{:T(128)}, /*index=1*/bf16[8,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], bf16[8,512])) -> (s32[], bf16[8,512]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %x = bf16[8,512]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %near = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %y = bf16[8,512]{1,0} fusion(%near), kind=kLoop, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, bf16[8,512]{1,0:T(8,128)(2,1)}) tuple(%next, %y)
}

%all-reduce-scatter.1 (q: bf16[8,512]) -> bf16[8,512] {
  %q = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %sum = bf16[8,512]{1,0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%add
}

%windows (a: bf16[8,4,128], b: bf16[8,96,128]) -> bf16[8,4,96] {
  %a = bf16[8,4,128] parameter(0)
  %b = bf16[8,96,128] parameter(1)
  ROOT %c = bf16[8,4,96]{2,1,0} convolution(%a, %b), window={size=8 stride=7 lhs_dilate=8}, \
dim_labels=0bf_0oi->0bf
}

ENTRY %main (x.1: bf16[8,512], a.1: bf16[8,4,128], b.1: bf16[8,96,128]) -> bf16[8,512] {
  %x.1 = bf16[8,512]{1,0:T(8,128)(2,1)} parameter(0)
  %a.1 = bf16[8,4,128]{2,1,0} parameter(1)
  %b.1 = bf16[8,96,128]{2,1,0} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %first = s32[]{:T(128)} copy(%zero)
  %scores = bf16[8,4,96]{2,1,0:S(1)} fusion(%a.1, %b.1), kind=kOutput, calls=%windows
  %state = (s32[]{:T(128)}, bf16[8,512]{1,0}) tuple(%first, %x.1)
  %loop = (s32[]{:T(128)}, bf16[8,512]{1,0}) while(%state), condition=%cond, body=%body
  ROOT %last = bf16[8,512]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_what_a_tpu_compiler_writes():
    """Loops without a known count, batches as dilated windows, arrays on the chip, and sums whose
    slices are kept: as in a program of libtpu 0.0.42, shortened."""
    found = program_cost(read(TPU))
    block, trips = 2 * 8 * 512, 36 // 2
    assert found.flops == 2 * 8 * 4 * 96 * 128
    scattered = found.collectives["reduce-scatter"]
    assert scattered.count == trips and scattered.sent == trips * block * 3 / 4
    # Per trip: read x, write y. The copy stays on the chip, and so do the scores.
    keys = 2 * 8 * 128 * (4 + 96)
    assert found.bytes == pytest.approx(trips * 2 * block + keys, rel=0.01)


KERNELS = """HloModule jit_f, is_scheduled=true

%beside (x: bf16[4,8], y: bf16[8,2]) -> bf16[4,2] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[8,2]{1,0} parameter(1)
  ROOT %d = bf16[4,2]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}, execution_thread="sparsecore"

ENTRY %main (q: bf16[32,512,128], k: bf16[8,256,128]) -> bf16[32,512,128] {
  %x.1 = bf16[4,8]{1,0} constant({...})
  %y.1 = bf16[8,2]{1,0} constant({...})
  %s = (bf16[4,2]{1,0}, u32[]) call-start(%x.1, %y.1), to_apply=%beside
  %q = bf16[32,512,128]{2,1,0} parameter(0)
  %k = bf16[8,256,128]{2,1,0} parameter(1)
  %mask = s8[1,8,8]{2,1,0} constant({...})
  %splash_mha_fwd.3 = bf16[32,512,128]{2,1,0} custom-call(%mask, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="x"}
  %told.1 = bf16[32,512,128]{2,1,0} custom-call(%splash_mha_fwd.3), \
custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1000"}}
  ROOT %silent = bf16[32,512,128]{2,1,0} custom-call(%told.1), custom_call_target="tpu_custom_call"
}
"""


def test_kernels_count_as_they_say_or_as_causal_attention():
    """Their metadata spreads over several lines; what runs beside them counts, too."""
    found = program_cost(read(KERNELS))
    assert found.flops == 2 * (2 * 32 * 512 * 256 * 128) / 2 + 1000 + 2 * 4 * 8 * 2
    assert found.kernels == 1


def test_the_largest_are_named():
    """Layers whose columns are split: rows are gathered, once a layer."""
    module = compiled(scanned, STACK, X, specs=[(None, None, "fsdp"), ()])
    (first, *_) = largest_collectives(module)
    assert first.startswith(f"{LAYERS} x all-gather f32[{ROWS},{WIDTH}] ")
    widest = compiled(lambda x: jnp.sin(x).T @ x, (ROWS, 4 * WIDTH))
    assert largest_arrays(widest)[0].startswith(f"f32[{4 * WIDTH},{4 * WIDTH}] ")


def test_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        read("module @jit_f {\n}\n")
