"""What is written to a cache is read back: exactly, or within half a step of int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.kv_cache import CacheArray, SlotsLast, empty_keys

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 2, 5, 8)
ROWS = jnp.arange(SHAPE[1])
ALL = (slice(None), slice(None), slice(None))


def numbers(seed=0, shape=SHAPE):
    """Each vector of another magnitude, over six orders."""
    key, other = jax.random.split(jax.random.key(seed))
    return jax.random.normal(key, shape) * 10.0 ** jax.random.uniform(
        other, (*shape[:-1], 1), minval=-3, maxval=3
    )


@pytest.fixture(params=[CacheArray, SlotsLast], ids=lambda cls: cls.__name__)
def kind(request):
    return request.param


def written(kind, x, dtype, stacks=SHAPE[0]):
    """A cache that holds these numbers, in one array for each layer or in one for all."""
    empty = kind.empty(x.shape, dtype)
    assert len(empty.stacks) == SHAPE[0]  # as on a CPU
    if stacks == 1:
        arrays = (empty.stacks, empty.scales)
        empty = kind(*(x and (jnp.concatenate(x),) for x in arrays))
    return empty.with_rows(ROWS, x)


def layers(slots):
    """What is read of one layer after the other."""
    found = []
    for number in range(SHAPE[0]):
        found.append(slots.read(number, ALL, jnp.float32))
        slots = slots.turned()
    return jnp.stack(found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_floats_come_back_as_their_own_type_has_them(kind, dtype):
    x = numbers()
    expected = x.astype(dtype).astype(jnp.float32)
    np.testing.assert_array_equal(layers(written(kind, x, dtype)), expected)


def test_int8_errs_by_half_a_step_of_each_vector(kind):
    x = numbers()
    slots = written(kind, x, jnp.int8)
    assert slots.dtype == jnp.int8 and slots.shape == SHAPE and slots.count == SHAPE[3]
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    error = np.abs(layers(slots) - x) / step
    assert 0.4 < error.max() < 0.501
    levels = jnp.stack(slots.stacks)
    assert int(levels.max()) == 127 and int(levels.min()) == -127


def test_zeros_stay_zeros(kind):
    x = numbers().at[:, 1].set(0)
    back = layers(written(kind, x, jnp.int8))
    assert np.isfinite(back).all()
    assert (back[:, 1] == 0).all() and (back[:, 0] != 0).any()


@pytest.mark.parametrize("stacks", [1, SHAPE[0]])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_writing_touches_the_given_slots_of_its_layer_alone(kind, dtype, stacks):
    """Rows write at places of their own, one of them beyond the last slot."""
    before, x = numbers(), numbers(1, (2, 2, *SHAPE[2:3], SHAPE[4]))
    slots = written(kind, before, dtype, stacks)
    rows, at = jnp.array([[0], [2]]), jnp.array([[0, 1], [4, 5]])
    after = slots.turned().write(1, (rows, slice(None), at), x).turned()
    expected = np.array(layers(slots))
    for row, place, new in ((0, 0, x[0, 0]), (0, 1, x[0, 1]), (2, 4, x[1, 0])):
        expected[1, row, :, place] = new
    step = np.abs(expected).max(axis=-1, keepdims=True) / 127
    assert (np.abs(layers(after) - expected) <= 0.501 * step).all()


@pytest.mark.parametrize("stacks", [1, SHAPE[0]])
def test_pages_of_a_layer(kind, stacks):
    """Three pages in one group; a cache that grows keeps them."""
    x = numbers()
    slots = written(kind, x, jnp.float32, stacks).grown(1, 4)
    assert slots.shape == (SHAPE[0], 4, *SHAPE[2:])
    second = slots.turned()
    np.testing.assert_array_equal(second.first_pages(1, 1, 2, jnp.float32), x[1, :2])
    picked = second.pages(1, jnp.array([[2, 0]]), jnp.float32)
    np.testing.assert_array_equal(picked, x[1, jnp.array([2, 0])])


def test_a_cpu_keeps_slots_of_keys_last():
    keys = empty_keys(SHAPE, jnp.float32)
    assert keys.shape == SHAPE and keys.stacks[0].shape == (1, 3, 2, 8, 5)
    assert keys.with_pages(7).stacks[0].shape == (1, 7, 2, 8, 5)


@pytest.mark.parametrize("dtype", ["int4", "uint8", "int32"])
def test_other_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype}.*int8"):
        CacheArray.empty(SHAPE, dtype)
