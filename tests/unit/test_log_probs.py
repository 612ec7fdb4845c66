"""Gathered, chunked log-probabilities equal the plain formula, gradient included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.log_probs import gathered_log_probs

B, T, D, V = 3, 11, 5, 13
rng = np.random.default_rng(0)
HIDDEN = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
HEAD = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
TOKENS = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
CHOSEN = jnp.asarray(rng.random((B, T)) < 0.5)


def plain(head, temperature):
    logits = HIDDEN[:, :-1] @ head / temperature
    table = jax.nn.log_softmax(logits, axis=-1)
    picked = jnp.take_along_axis(table, TOKENS[:, 1:, None], axis=-1)[..., 0]
    entropy = -(jnp.exp(table) * table).sum(-1)
    keep = CHOSEN[:, 1:]
    pad = ((0, 0), (1, 0))
    return jnp.pad(picked * keep, pad), jnp.pad(entropy * keep, pad)


@pytest.mark.parametrize("chunk", [2, 4, 128])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_the_plain_formula(chunk, temperature):
    def ours(head):
        return gathered_log_probs(
            HIDDEN,
            TOKENS,
            CHOSEN,
            lambda h: h @ head,
            temperature=temperature,
            budget=T,
            chunk=chunk,
        )

    for got, want in zip(jax.jit(ours)(HEAD), plain(HEAD, temperature), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    slope = jax.grad(lambda head: ours(head)[0].sum())(HEAD)
    want = jax.grad(lambda head: plain(head, temperature)[0].sum())(HEAD)
    np.testing.assert_allclose(slope, want, atol=1e-4)


def test_nothing_chosen_gives_zeros_and_finite_gradients():
    def total(head):
        none = jnp.zeros((B, T), bool)
        log_probs, _ = gathered_log_probs(
            HIDDEN, TOKENS, none, lambda h: h @ head, temperature=1.0, budget=4
        )
        return log_probs.sum()

    value, slope = jax.value_and_grad(total)(HEAD)
    assert value == 0 and not slope.any()
