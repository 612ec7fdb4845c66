"""`--compile-only` short of the compiler: shapes of the largest batch, and a step traced with them.

Compiling needs libtpu, which tests cannot count on.
"""

import dataclasses

import jax
import optax
import pytest

from models.qwen3_vl import Qwen3VLPolicy
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.params import initialise
from tests.support.tiny_models import EXPERTS
from train import setup
from train.compile.ahead import LargestBatch
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.settings.override import override
from train.state import make_state, trainable_names

pytestmark = pytest.mark.slow

MESH = make_mesh(parse_mesh("fsdp:4,tensor:2", 8))


def recipe(frames_as: str):
    config = get_recipe("needle_rl")
    data = dataclasses.replace(config.data, frames_as=frames_as, frame_budgets=(2, 7))
    return dataclasses.replace(config, data=data)


def largest(config):
    """The largest minibatch of a configuration, as shapes."""
    own = config.rl, config.agent, config.data, setup.Parts(config).policy
    return LargestBatch(*own, config.model.compute_dtype, config.objective).abstract(MESH)


@pytest.mark.parametrize(("frames_as", "seen"), [("image", 7), ("video", 4)])
def test_a_video_shows_half_as_many_frames_as_images(frames_as, seen):
    """Frames of 32 x 32 pixels are one token each; videos take them in pairs."""
    config = recipe(frames_as)
    batch = largest(config)
    assert batch.features.tokens.shape == (16, seen, 128)
    assert batch.features.deepstack.shape == (16, 1, seen, 128)
    # Two groups in a micro-batch, and four devices for its rows: four rollouts to a prompt.
    assert batch.streams_per_row == 4 and batch.tokens.shape[0] == 16 * 2
    assert batch.loss_weights.shape[0] == 16 * 8 and batch.loss_weights.shape[1] % 64 == 0


def test_rows_show_frames_of_their_own_where_prompts_do_not_divide():
    """Six prompts on four devices, which would each encode all of them."""
    batch = largest(override(recipe("image"), ["rl.prompts_per_step=6"]))
    assert batch.streams_per_row == 4 and batch.tokens.shape[0] == 6 * 2
    assert batch.features.tokens.shape[0] == 6 * 2


def test_a_minibatch_is_what_is_compiled():
    """A share of the prompts, with the log-probabilities of the policy before the first step."""
    base = recipe("image")
    config = dataclasses.replace(base, rl=dataclasses.replace(base.rl, minibatches=4))
    batch = largest(config)
    assert batch.features.tokens.shape[0] == 4 and batch.loss_weights.shape[0] == 4 * 8
    assert batch.proximal_log_probs.shape == batch.loss_weights.shape
    bypass = override(config, ["objective.correction.proximal=sampler"])
    assert largest(bypass).proximal_log_probs is None
    assert setup.open_rl_step(config, setup.Parts(config).policy, optax.sgd(0.1)).micro_batches == 2


@pytest.mark.parametrize("credit", ["none", "share"])
def test_the_step_takes_the_abstract_batch(credit):
    sampled = ["agent.subagent_sampling.temperature=1", f"rl.subagent_credit={credit}"]
    config = override(recipe("image"), sampled)
    policy = setup.Parts(config).policy
    optimizer = make_optimizer(config.optimizer, config.steps, policy.table)
    params = initialise(policy.table, jax.random.key(0), MESH)
    with jax.set_mesh(MESH):
        state = make_state(params, trainable_names(policy.table, config.model), MESH, optimizer)
        batch = largest(config)
        after, metrics = jax.eval_shape(setup.open_rl_step(config, policy, optimizer), state, batch)
    assert metrics["loss"].shape == ()
    if credit == "share":
        # Four crops in the one round of each of 128 rollouts, of 16 frames of one token.
        assert batch.subagents.features.tokens.shape == (4 * 128, 16, 128)
    shapes = {name: value.shape for name, value in after.trainable.items()}
    assert shapes == {name: value.shape for name, value in state.trainable.items()}


def test_a_replayed_record_is_part_of_the_batch():
    """A byte for each of the two experts of the one sparse layer."""
    config = override(recipe("image"), ["rl.routing_replay=true"])
    own = config.rl, config.agent, config.data, Qwen3VLPolicy(EXPERTS)
    batch = LargestBatch(*own, config.model.compute_dtype).abstract(MESH)
    assert batch.routing.shape == (*batch.tokens.shape, 2) and batch.routing.dtype == "int8"
    assert largest(config).routing is None
