"""Routing replay: the experts that served a token in the sampler serve it in the learner."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from models.common.experts import Experts
from paravt_jax.params import Blueprint, Normal
from paravt_jax.routing import UNKNOWN, Routing, RoutingShape, routing_gap
from paravt_jax.shared_rows import Bounds
from tests.support.rollout_fakes import text_prompt
from train.batch import LearnerStream, learner_batch, shared_batch

pytestmark = pytest.mark.slow

WIDTH, INNER, COUNT, CHOSEN = 3, 4, 5, 2
BLUEPRINT = Blueprint(Experts(WIDTH, INNER, COUNT, CHOSEN, "silu", Normal(0.1), "", "float32"))
SHAPE = RoutingShape(layers=2, per_token=2, experts=4)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    dice = np.random.default_rng(seed)
    return {name: dice.normal(size=spec.shape) for name, spec in BLUEPRINT.table.items()}


def by_hand(params, x, choices) -> np.ndarray:
    """Tokens `[t, d]` through these experts `[t, k]` in float64, one product at a time."""
    out = np.zeros_like(x)
    for token, (row, chosen) in enumerate(zip(x, choices, strict=True)):
        scores = row @ params["router.kernel"]
        shares = np.exp(scores[chosen]) / np.exp(scores[chosen]).sum()
        for share, expert in zip(shares, chosen, strict=True):
            gate, up = np.moveaxis(np.einsum("d,dci->ci", row, params["gate_up"][expert]), 0, 0)
            out[token] += share * ((gate / (1 + np.exp(-gate)) * up) @ params["down"][expert])
    return out


def own_choices(params, x) -> np.ndarray:
    return np.argsort(-(x @ params["router.kernel"]), axis=-1)[:, :CHOSEN]


TOKENS = np.random.default_rng(1).normal(size=(6, WIDTH))
WORST = np.argsort(TOKENS @ weights()["router.kernel"], axis=-1)[:, :CHOSEN]
"""The least likely experts of each token, but for the last two: nobody noted theirs."""
RECORD = np.where(np.arange(6)[:, None] < 4, WORST, UNKNOWN)
SERVED = np.where(RECORD < 0, own_choices(weights(), TOKENS), RECORD)


def through_experts(params, record):
    x = jnp.asarray(TOKENS[None], jnp.float32)
    replayed = None if record is None else jnp.asarray(record[None], jnp.int8)
    return BLUEPRINT.bind(params)(x, replayed)


def as_float32(params):
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


def test_replayed_experts_serve_with_the_weights_of_the_router():
    params = weights()
    mixed, routed = through_experts(as_float32(params), RECORD)
    assert_array_equal(routed.choices[0], SERVED)
    assert_allclose(mixed[0], by_hand(params, TOKENS, SERVED), rtol=1e-5, atol=1e-5)
    own, routed = through_experts(as_float32(params), None)
    assert_array_equal(routed.choices[0], own_choices(params, TOKENS))
    assert_allclose(own[0, 4:], mixed[0, 4:], rtol=1e-6)
    assert np.abs(own[0, :4] - mixed[0, :4]).max() > 0.1


def test_replaying_the_own_choice_changes_no_bit():
    params = as_float32(weights())
    plain, routed = through_experts(params, None)
    again, _ = through_experts(params, np.asarray(routed.choices[0]))
    assert_array_equal(plain, again)


def test_gradients_pass_through_the_gates():
    """Against central differences of the sum by hand, in float64."""
    params, target = weights(), np.random.default_rng(2).normal(size=TOKENS.shape)

    @jax.jit
    @jax.grad
    def slopes_of(params):
        return jnp.sum(through_experts(params, RECORD)[0][0] * jnp.asarray(target, jnp.float32))

    slopes = slopes_of(as_float32(params))
    for name, value in params.items():
        expected = np.zeros_like(value)
        for at in np.ndindex(value.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = {**params, name: value.copy()}
                moved[name][at] += step
                ends.append(np.sum(by_hand(moved, TOKENS, SERVED) * target))
            expected[at] = (ends[0] - ends[1]) / 2e-6
        assert np.abs(expected).max() > 0.1
        assert_allclose(slopes[name], expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


def test_what_differs_by_hand():
    """Two layers, top 2 of 4. Token 0: one of four choices differs; token 1 agrees, its order does
    not count; token 2 was not noted; token 3 is padding."""
    logits = np.zeros((2, 1, 4, 4), np.float32)
    logits[0, 0, :, :] = [4.0, 3.0, 2.0, 1.0]
    logits[1, 0, :, :] = [1.0, 2.0, 3.0, 4.0]
    record = [[0, 2, 3, 2], [1, 0, 2, 3], [UNKNOWN] * 4, [3, 3, 3, 3]]
    valid = jnp.asarray([[True, True, True, False]])
    gap = routing_gap(jnp.asarray(logits), jnp.asarray([record], jnp.int8), valid)
    assert jax.tree.leaves(gap) == [1, 8, 1, 2]
    assert gap.means() == {"router/choices_differ": 1 / 8, "router/tokens_differ": 1 / 2}


def streams() -> list[LearnerStream]:
    """Two that continue one prompt of two tokens; nobody noted the second one's own experts."""
    prompt, noted = text_prompt("ab"), np.arange(8, dtype=np.int8).reshape(2, 4) % 4
    own = np.full((3, 4), 3, np.int8)
    values = np.ones(3, np.float32)
    known = LearnerStream(
        prompt, np.arange(3, dtype=np.int32), values, -values, routing=Routing(noted, own)
    )
    blank = LearnerStream(prompt, np.arange(2, dtype=np.int32), values[:2], -values[:2])
    return [known, blank]


def test_a_batch_holds_a_prompts_record_once():
    sizes = {"pad_id": 0, "group_size": 2, "per_row": 2, "routing": SHAPE}
    batch = shared_batch(streams(), slots=9, bounds=Bounds(2, 3), **sizes)
    prompt, nobody = [[0, 1, 2, 3], [0, 1, 2, 3]], [[UNKNOWN] * 4]
    assert batch.routing.dtype == np.int8
    assert batch.routing.tolist() == [[*prompt, *[[3] * 4] * 3, *nobody * 4]]
    whole = learner_batch(streams(), length=6, pad_id=0, routing=SHAPE)
    assert whole.routing.tolist() == [[*prompt, *[[3] * 4] * 3, *nobody], nobody * 6]
    assert learner_batch(streams(), length=6, pad_id=0).routing is None


@pytest.mark.parametrize(("experts", "dtype"), [(128, np.int8), (129, np.int16)])
def test_a_record_takes_a_byte_where_that_holds_all_experts(experts, dtype):
    blank = RoutingShape(layers=48, per_token=8, experts=experts).unknown(10_000)
    assert blank.dtype == dtype and blank.shape == (10_000, 384)
    assert blank.max() < 0 and np.iinfo(blank.dtype).max >= experts - 1
