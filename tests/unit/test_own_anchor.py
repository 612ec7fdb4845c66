"""An anchor that is a function of the user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paravt_jax.anchors import Structure, own_credit
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.structure import structural_tokens, tag_table

WORDS = [b"<think>", b"</think>", b"<answer>", b"</answer>", b"red"]
TABLE = tag_table(WORDS)
TOKENS = jnp.array([[0, 4, 1, 2, 4, 3], [0, 4, 4, 2, 4, 3]])


def closing(structure, rewards):
    above = rewards["format"] - rewards["format"].mean(axis=1, keepdims=True)
    return structure.mask("</think>", "</answer>") * above.reshape(-1, 1)


def per_rollout(structure, rewards):
    return rewards["format"]


def misspelt(structure, rewards):
    return structure.mask("</thought>")


def credit_of(function, generated):
    name = ObjectiveConfig(anchor=function, anchor_weight=1.0).anchor

    @jax.jit
    def compute(tokens, rewards):
        found = structural_tokens(tokens, TABLE)
        return own_credit(name, Structure(found, TABLE, generated), rewards)

    return compute(TOKENS, {"format": jnp.array([[1.0, 0.0]])})


def test_credit_stands_at_the_tags_that_it_names():
    credit = credit_of(closing, jnp.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(credit, [[0, 0, 0.5, 0, 0, 0.5], [0, 0, 0, 0, 0, -0.5]])


def test_what_was_not_generated_is_masked():
    generated = jnp.ones(TOKENS.shape, bool).at[:, 2].set(False)
    np.testing.assert_allclose(credit_of(closing, generated)[0], [0, 0, 0, 0, 0, 0.5])


def test_credit_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"objective\.anchor=.*per_rollout returned no array"):
        credit_of(per_rollout, jnp.ones(TOKENS.shape, bool))


def test_a_tag_that_is_not_looked_for_is_refused():
    with pytest.raises(ValueError, match=r"</thought>.*there are .*</think>"):
        credit_of(misspelt, jnp.ones(TOKENS.shape, bool))
