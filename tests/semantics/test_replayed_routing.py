"""Law 2 with experts: a sampler that routes otherwise than the learner would, replayed by it.

Here the sampler sends each token to its least likely experts. Learner and sampler then agree about
every token only if the record of routing stands at the right tokens: of prompts, turns, tool
responses with words and with frames, and sub-agents, in rows that share a prompt and in whole ones.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models.common.experts import Experts
from models.qwen3_vl import Qwen3VLPolicy
from paravt_jax.params import initialise
from tests.support.rollout_fakes import VOCAB
from tests.support.rollout_law import Shape, World, calls_of, crop_streams, what_happened
from tests.support.tiny_models import EXPERTS
from train.batch import streams_of_groups

pytestmark = pytest.mark.slow

# Two runs of sparse layers with a dense one between.
TEXT = dataclasses.replace(
    EXPERTS.text,
    vocab_size=VOCAB,
    num_hidden_layers=3,
    experts=dataclasses.replace(EXPERTS.text.experts, decoder_sparse_step=1, mlp_only_layers=(1,)),
)
POLICY = Qwen3VLPolicy(dataclasses.replace(EXPERTS, text=TEXT))


@pytest.fixture(scope="module", params=["text", pytest.param("frames", marks=pytest.mark.study)])
def rollouts(request):
    """A world, and groups of rollouts whose sampler chose the least likely experts."""
    params = initialise(POLICY.table, jax.random.key(0))
    world = World(POLICY, params, POLICY.config.vision.patch_values, request.param, copies=2)
    world.routing = POLICY.routing
    choose = Experts.__call__

    def contrary(self, x, replayed=None):
        assert replayed is None
        return choose(self, x, jax.lax.top_k(-self.router(x), self.per_token)[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout.agent.parse_tool_calls", calls_of)
        patch.setattr(Experts, "__call__", contrary)
        engine = world.engine(Shape(prompts=1, crops=1, steps_per_call=7))
        groups = world.roll_out(engine, world.items(3))
    seen = what_happened(groups, world.config)
    assert seen.tool_rounds == world.config.max_tool_rounds and min(seen.crops, seen.errors) > 0
    assert (seen.shown > 1) == (request.param == "frames")
    return world, groups


def test_the_learner_agrees_with_a_sampler_that_routes_otherwise(rollouts):
    """Prompts stand once in rows of main agents; sub-agents are whole rows."""
    world, groups = rollouts
    temperature = world.config.sampling.temperature
    (batch,) = world.batches(streams_of_groups(groups), 8, world.copies)
    assert world.check_log_probs(batch, temperature) < 1e-4
    if world.config.evidence == "frames":
        return
    own = dataclasses.replace(batch, routing=None)
    assert world.check_log_probs(own, temperature) > 0.1
    for crops in world.batches(crop_streams(groups), 8, 1):
        assert world.check_log_probs(crops, world.config.subagent_sampling.temperature) < 1e-4


def test_every_token_that_was_read_or_drawn_is_on_record(rollouts):
    _, groups = rollouts
    for group in groups:
        first = group.trajectories[0]
        for rollout in group.trajectories:
            assert rollout.routing.prompt is first.routing.prompt
            for each in (rollout, *rollout.subagents):
                sizes = len(each.prompt.tokens), len(each.tokens)
                assert (len(each.routing.prompt), len(each.routing.own)) == sizes
                assert min(each.routing.prompt.min(), each.routing.own.min()) >= 0


def test_what_is_off_is_not_in_the_program():
    """Nothing of a byte is computed, returned or read without routing."""
    params = jax.eval_shape(lambda: initialise(POLICY.table, jax.random.key(0)))
    tokens = jnp.zeros((2, 8), jnp.int32)
    arrays = tokens, jnp.zeros((2, 8, 3), jnp.int32), tokens - 1
    plain, noted = (
        str(jax.make_jaxpr(function)(params, *arrays))
        for function in (POLICY.prefill, POLICY.prefill_and_routing)
    )
    assert "i8[" not in plain and "i8[" in noted
