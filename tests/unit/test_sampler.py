"""The sampler draws from the distribution that it reports, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollout.sampler import SamplingConfig, nucleus, row_keys, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))


def draw(count: int, temperature: float = 1.0, top_p: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probabilities of `count` rows with the logits above."""
    keys = row_keys(jnp.arange(count, dtype=jnp.uint32), jnp.zeros(count, jnp.int32))
    settings = jnp.full(count, temperature), jnp.full(count, top_p)
    tokens, log_probs = jax.jit(sample)(jnp.tile(LOGITS, (count, 1)), keys, *settings)
    return np.asarray(tokens), np.asarray(log_probs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    tokens, _ = draw(20_000, temperature)
    expected = jax.nn.softmax(LOGITS[0] / temperature)
    np.testing.assert_allclose(np.bincount(tokens, minlength=4) / 20_000, expected, atol=0.012)


def test_log_prob_is_tempered_and_untruncated():
    tokens, log_probs = draw(64, temperature=0.5, top_p=0.6)
    expected = jax.nn.log_softmax(LOGITS[0] / 0.5)[tokens]
    np.testing.assert_allclose(log_probs, expected, rtol=1e-6)


def test_temperature_zero_is_greedy_and_reports_temperature_one():
    tokens, log_probs = draw(16, temperature=0.0)
    assert (tokens == 0).all()
    np.testing.assert_allclose(log_probs, np.log(0.5), rtol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.6, 2), (0.8, 3), (1.0, 4)])
def test_nucleus_is_the_smallest_set_that_reaches_the_mass(top_p, kept):
    assert nucleus(LOGITS, jnp.array([top_p]))[0].sum() == kept
    assert set(draw(2000, top_p=top_p)[0]) == set(range(kept))


def test_nucleus_differs_by_row():
    logits = jnp.tile(LOGITS, (2, 1))
    np.testing.assert_array_equal(nucleus(logits, jnp.array([0.3, 0.8])).sum(-1), [1, 3])


def test_keys_depend_on_seed_and_position():
    seeds = jnp.array([1, 1, 2, 1], jnp.uint32)
    data = jax.random.key_data(row_keys(seeds, jnp.array([5, 5, 5, 6])))
    assert (data[0] == data[1]).all()
    assert len({tuple(np.asarray(key)) for key in data}) == 3


@pytest.mark.parametrize(
    "bad", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingConfig(**bad)
