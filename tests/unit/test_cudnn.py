"""How attention on GPUs is put together from calls of cuDNN, with a plain computation in its place:
no GPU is needed, and none runs cuDNN here."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common import attention, cudnn
from models.common.attention import reference, visibility
from paravt_jax.mesh import make_mesh, parse_mesh
from tests.support.shared_rows import shared_rows
from tests.unit.test_splash import draw

pytestmark = pytest.mark.slow


class PlainFlash(cudnn.Flash):
    """The formulas of FlashAttention-2's two passes over whole matrices."""

    def weights(self, inputs, lengths, log_sums=None):
        query, key = inputs[0], jnp.repeat(inputs[1], inputs[0].shape[2] // inputs[1].shape[2], 2)
        scores = jnp.einsum("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
        visible = visibility(query.shape[1], key.shape[1], lengths is None, key_lengths=lengths)
        assert visible is not None
        scores = jnp.where(visible[:, None], scores, -jnp.inf)
        log_sums = jax.nn.logsumexp(scores, axis=-1) if log_sums is None else log_sums
        return jnp.exp(scores - log_sums[..., None]), log_sums

    def forward(self, inputs, lengths):
        weights, log_sums = self.weights(inputs, lengths)
        value = jnp.repeat(inputs[2], inputs[0].shape[2] // inputs[2].shape[2], 2)
        return jnp.einsum("bnts,bsnh->btnh", weights, value), log_sums

    def backward(self, inputs, lengths, mixed, log_sums, grad):
        query, key, value = inputs
        copies = query.shape[2] // key.shape[2]
        key, value = jnp.repeat(key, copies, 2), jnp.repeat(value, copies, 2)
        weights, _ = self.weights(inputs, lengths, log_sums)
        delta = jnp.sum(mixed * grad, axis=-1).swapaxes(1, 2)[..., None]
        scores = weights * (jnp.einsum("btnh,bsnh->bnts", grad, value) - delta)
        scores *= query.shape[-1] ** -0.5

        def of_heads(x):
            return x.reshape(*x.shape[:2], -1, copies, x.shape[3]).sum(axis=3)

        return (
            jnp.einsum("bnts,bsnh->btnh", scores, key),
            of_heads(jnp.einsum("bnts,btnh->bsnh", scores, query)),
            of_heads(jnp.einsum("bnts,btnh->bsnh", weights, grad)),
        )


LENGTHS = np.array([9, 12], np.int32)


def in_lanes(prompt, lanes, own):
    """Which slot of a prompt with lanes sees which, written out."""
    slots = np.arange(prompt + lanes * own)
    lane = np.where(slots < prompt, -1, (slots - prompt) // own)
    mine = (slots < prompt) | (lane == lane[:, None])
    return (slots <= slots[:, None]) & mine


CASES = {
    "causal": ({}, np.tril(np.ones((1, 40, 40), bool))),
    "frames": ({"lengths": LENGTHS}, np.arange(40) < LENGTHS[:, None, None]),
    "lanes": (
        {"lengths": LENGTHS, "prompt": 12, "lanes": 4},
        in_lanes(12, 4, 7) & ((np.arange(40) >= 12) | (np.arange(40) < LENGTHS[:, None, None])),
    ),
}


@pytest.mark.parametrize("mesh", [None, "fsdp:2,tensor:4"])
@pytest.mark.parametrize("name", CASES)
def test_parts_are_merged_to_the_plain_computation_and_its_gradient(name, mesh):
    terms, visible = CASES[name]
    terms = {name: jnp.asarray(x) if np.ndim(x) else x for name, x in terms.items()}
    query, key, value, weights = draw((2, 40, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8), (2, 40, 4, 8))
    if "lanes" in terms:
        # Padding of a prompt sees nothing of meaning; nothing reads it.
        read = (np.arange(40) >= 12) | (np.arange(40) < LENGTHS[:, None])
        weights = jnp.where(read[..., None, None], weights, 0)
        visible = visible | np.eye(40, dtype=bool)
    ours = functools.partial(cudnn.attend, **terms, flash=PlainFlash())
    plain = functools.partial(reference, visible=jnp.asarray(visible))

    def both(attend):
        loss = jax.value_and_grad(lambda *inputs: jnp.sum(attend(*inputs) * weights), (0, 1, 2))
        return jax.tree.leaves(jax.jit(loss)(query, key, value))

    expected = both(plain)
    with jax.set_mesh(make_mesh(parse_mesh(mesh or "data:1", 8 if mesh else 1))):
        got = both(ours)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_cudnn_is_called_as_it_wants(lengths, monkeypatch):
    """Its own checks of shapes and types pass, and what it would return fits."""
    monkeypatch.setattr(cudnn.library(), "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn.library(), "check_compute_capability", lambda capability: True)
    lengths = None if lengths is None else jnp.asarray(lengths)
    inputs = tuple(draw((2, 64, 4, 128), (2, 64, 2, 128), (2, 64, 2, 128), dtype=jnp.bfloat16))
    mixed, log_sums = jax.eval_shape(cudnn.CUDNN.forward, inputs, lengths)
    assert (mixed.shape, log_sums.shape) == ((2, 64, 4, 128), (2, 4, 64))
    assert (mixed.dtype, log_sums.dtype) == (jnp.bfloat16, jnp.float32)
    grads = jax.eval_shape(cudnn.CUDNN.backward, inputs, lengths, mixed, log_sums, mixed)
    assert [grad.shape for grad in grads] == [x.shape for x in inputs]


def test_what_cudnn_serves(monkeypatch):
    query = jnp.zeros((1, cudnn.SHORT, 2, 72), jnp.bfloat16)
    assert not cudnn.serves(query, query)
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    assert cudnn.serves(query, query)
    assert not cudnn.serves(query.astype(jnp.float32), query.astype(jnp.float32))
    assert not cudnn.serves(query[:, 1:], query[:, 1:])
    assert not cudnn.serves(query[..., 1:], query[..., 1:])


DOORS = {
    "causal": {"causal": True},
    "frames": {"key_lengths": LENGTHS},
    "whole frames": {},
    "shared": {"causal": True, "shared": shared_rows(12, 9)[0]},
}


@pytest.mark.parametrize("name", DOORS)
def test_the_door_takes_cudnn_on_a_gpu(name, monkeypatch):
    terms = {
        name: jnp.asarray(x) if name == "key_lengths" else x for name, x in DOORS[name].items()
    }
    inputs = draw((2, 40, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8))

    def door(*inputs, kernels="cudnn"):
        return jax.jit(functools.partial(attention.attend, kernels=kernels, **terms))(*inputs)

    plain = door(*inputs)
    calls = []

    def emulated(*inputs, **terms):
        calls.append(terms)
        return cudnn_attend(*inputs, **terms, flash=PlainFlash())

    cudnn_attend = cudnn.attend
    monkeypatch.setattr(cudnn, "attend", emulated)
    monkeypatch.setattr(cudnn, "serves", lambda query, key: True)
    got = door(*inputs)
    for kernels in ("auto", "reference", "splash"):
        door(*inputs, kernels=kernels)
    assert len(calls) == 1, "only where it is asked for"
    # What padding of rows attends to means nothing.
    real = np.ones((2, 40), bool) if name != "shared" else terms["shared"].segments(40) >= 0
    np.testing.assert_allclose(got[real], plain[real], atol=1e-5)


def test_a_jax_without_its_private_module_is_told_when_cudnn_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.cudnn", None)
    cudnn.library.cache_clear()
    with pytest.raises(ValueError, match=r"model\.attention=cudnn: jax .* set it to auto"):
        cudnn.library()
    monkeypatch.undo()
    assert cudnn.library() is not None
