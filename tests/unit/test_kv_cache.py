"""What is written to a cache is read back: exactly, or within half a step of int8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.kv_cache import CacheArray

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 2, 5, 8)
ALL = (slice(None), slice(None), slice(None), slice(None))


def numbers(seed=0, shape=SHAPE):
    """Each vector of another magnitude, over six orders."""
    key, other = jax.random.split(jax.random.key(seed))
    return jax.random.normal(key, shape) * 10.0 ** jax.random.uniform(
        other, (*shape[:-1], 1), minval=-3, maxval=3
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_floats_come_back_as_their_own_type_has_them(dtype):
    x = numbers()
    slots = CacheArray.empty(SHAPE, dtype).write(ALL, x)
    np.testing.assert_array_equal(slots.read(ALL, jnp.float32), x.astype(dtype).astype(jnp.float32))


def test_int8_errs_by_half_a_step_of_each_vector():
    x = numbers()
    slots = CacheArray.empty(SHAPE, jnp.int8).write(ALL, x)
    assert slots.stored.dtype == jnp.int8 and slots.count == SHAPE[3]
    step = np.abs(x).max(axis=-1, keepdims=True) / 127
    error = np.abs(slots.read(ALL, jnp.float32) - x) / step
    assert 0.4 < error.max() < 0.501
    assert int(slots.stored.max()) == 127 and int(slots.stored.min()) == -127


def test_zeros_stay_zeros():
    x = numbers().at[:, 1].set(0)
    back = CacheArray.empty(SHAPE, jnp.int8).write(ALL, x).read(ALL, jnp.float32)
    assert np.isfinite(back).all()
    assert (back[:, 1] == 0).all() and (back[:, 0] != 0).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_writing_touches_the_given_slots_alone(dtype):
    """Rows write at places of their own, one of them beyond the last slot."""
    before, x = numbers(), numbers(1, (2, 2, *SHAPE[2:3], SHAPE[4]))
    slots = CacheArray.empty(SHAPE, dtype).write(ALL, before)
    rows, at = jnp.array([[0], [2]]), jnp.array([[0, 1], [4, 5]])
    after = slots.write((1, rows, slice(None), at), x)
    expected = np.array(slots.read(ALL, jnp.float32))
    for row, place, new in ((0, 0, x[0, 0]), (0, 1, x[0, 1]), (2, 4, x[1, 0])):
        expected[1, row, :, place] = new
    step = np.abs(expected).max(axis=-1, keepdims=True) / 127
    assert (np.abs(after.read(ALL, jnp.float32) - expected) <= 0.501 * step).all()


@pytest.mark.parametrize("dtype", ["int4", "uint8", "int32"])
def test_other_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype}.*int8"):
        CacheArray.empty(SHAPE, dtype)
