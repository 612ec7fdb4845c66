"""The balance of a mixture of experts, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.routing import load_balance


def test_even_use_gives_one():
    """Four tokens, each sure of another of four experts: f_e = P_e = 1/4."""
    logits = 50.0 * jnp.eye(4)[None, None]
    np.testing.assert_allclose(load_balance(logits, jnp.ones((1, 4), bool), 1), [1.0], rtol=1e-6)


def test_the_same_experts_for_all_tokens():
    """Two of four experts serve all: f = (1, 1, 0, 0), P = (1/2, 1/2, 0, 0), 4 / 2 * 1 = 2."""
    logits = jnp.broadcast_to(jnp.asarray([50.0, 50.0, 0.0, 0.0]), (1, 1, 3, 4))
    np.testing.assert_allclose(load_balance(logits, jnp.ones((1, 3), bool), 2), [2.0], rtol=1e-6)


@pytest.mark.slow
def test_mean_over_layers_and_padding_left_out():
    even, skewed = 50.0 * jnp.eye(2), jnp.asarray([[50.0, 0.0], [50.0, 0.0]])
    logits = jnp.stack([even, skewed])[:, None]
    garbage = jnp.full((2, 1, 3, 2), 7.0).at[..., 0].set(-3.0)
    padded = jnp.concatenate([logits, garbage], axis=2)
    valid = jnp.asarray([[True, True, False, False, False]])
    np.testing.assert_allclose(load_balance(padded, valid, 1), [1.5], rtol=1e-6)


@pytest.mark.slow
def test_no_real_token_is_zero_with_finite_gradient():
    logits, valid = jnp.ones((1, 1, 2, 2)), jnp.zeros((1, 2), bool)
    value, slope = jax.value_and_grad(lambda x: load_balance(x, valid, 1)[0])(logits)
    assert value == 0 and np.isfinite(slope).all()


@pytest.mark.slow
def test_descending_it_evens_the_router():
    noise = np.random.default_rng(0).normal(size=(1, 1, 32, 4))
    logits = jnp.asarray(noise + np.arange(4.0))
    valid, bias = jnp.ones((1, 32), bool), jnp.zeros((1, 1, 1, 4))
    slope = jax.grad(lambda bias: load_balance(logits + bias, valid, 1)[0])
    for _ in range(20):
        bias -= slope(bias)
    before, after = (load_balance(x, valid, 1)[0] for x in (logits, logits + bias))
    assert after < 0.7 * before
