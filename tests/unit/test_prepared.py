"""Prepared weights compute what the others do, and hold what they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.common.prepared import is_product
from models.qwen3_vl import Qwen3VLPolicy
from paravt_jax.params import initialise
from tests.support.tiny_models import EXPERTS, QWEN

pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 9)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(9, dtype=np.int32)[:, None], (2, 9, 3))
TEXT = np.full((2, 9), -1, np.int32)

POLICIES = {
    "tied head": QWEN,
    "own head": dataclasses.replace(
        QWEN, config=dataclasses.replace(QWEN.config, tie_word_embeddings=False)
    ),
    "experts": Qwen3VLPolicy(EXPERTS),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", POLICIES)
def test_prepared_weights_give_the_same_logits(kind, dtype):
    policy = dataclasses.replace(POLICIES[kind], compute_dtype=dtype)
    params = initialise(policy.table, jax.random.key(0))

    @jax.jit
    def logits(params):
        return policy.logits(
            params, policy.prefill(params, *map(jnp.asarray, (TOKENS, POSITIONS, TEXT)))[0]
        )

    plain, prepared = logits(params), logits(policy.prepare(params))
    assert np.std(plain) > 0.01
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(prepared, plain, rtol=0, atol=tolerance * float(np.abs(plain).max()))


def test_matrices_are_cast_and_laid_apart_and_routers_stay_float32():
    policy = dataclasses.replace(POLICIES["experts"], compute_dtype="bfloat16")
    params = initialise(policy.table, jax.random.key(0))
    prepared = policy.prepare(params)
    routers = [name for name in policy.table if ".router." in name]
    assert routers and not any(is_product(policy.table[name]) for name in routers)
    for name, spec in policy.table.items():
        if name.startswith(("text.layers.", "text.sparse_layers.")):
            layers = prepared[name]
            assert isinstance(layers, tuple) and len(layers) == spec.shape[0]
            assert {x.dtype for x in layers} == {
                jnp.dtype("bfloat16" if is_product(spec) else "float32")
            }
        elif name != "head.kernel":
            assert prepared[name] is params[name]
