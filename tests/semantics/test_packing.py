"""Law 2 for packs: what a stream learns in a pack is what it learns alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.qwen3_vl.attention import QUERY_CHUNK, attend


@pytest.mark.parametrize("length", [20, QUERY_CHUNK + 30], ids=["at once", "in chunks"])
def test_a_token_attends_to_its_own_segment_alone(length):
    rng = np.random.default_rng(0)
    query, key, value = jnp.asarray(rng.normal(size=(3, 1, length, 2, 8)), jnp.float32)
    cut = length // 3
    segments = jnp.repeat(jnp.array([1, 2]), jnp.array([cut, length - cut]))[None]
    packed = attend(query, key, value, causal=True, segments=segments)
    for part in (slice(0, cut), slice(cut, length)):
        alone = attend(query[:, part], key[:, part], value[:, part], causal=True)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-6)
