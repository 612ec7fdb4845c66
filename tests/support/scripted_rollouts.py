"""Rollouts that say what a test wants, and the learner that trains a toy policy on them.

Each character of the toy tokenizer is a token, so every tag is several tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.records import RolloutGroup, Row, StopReason, Trajectory, Turn, VideoRef
from paravt_jax.structure import tag_table
from pipelines.preprocess import ImageSpec
from rollout.record import TrajectoryBuilder
from tests.support.rollout_fakes import PAD, VOCAB, ToyPolicy, ToyRenderer, image_prompt
from tests.support.rollout_law import Learnable
from train.config import Config
from train.recipes import get_recipe
from train.rl.learner import Learner
from train.settings.override import override
from train.setup import batch_shapes, open_learner
from train.state import FlatParams, TrainState

RENDERER = ToyRenderer()
SPEC = ImageSpec().limited(32 * 32, 32 * 32)
"""Four patches to a frame, as the toy prompts have them."""
ROW = Row("0", VideoRef("/v.mp4", 64.0), "What colour?", "red", "oe")
TAGS = tag_table([bytes([index]) if index < 128 else b"" for index in range(VOCAB)])


def rollout(
    *turns: str,
    prefix: str = "",
    responses: tuple[str, ...] = (),
    subagents: tuple[str, ...] = (),
    seed: int = 0,
    frames: int = 2,
) -> Trajectory:
    """One turn per text, each but the last answered with a response; random log-probs. Sub-agents
    look at three frames and say one text each."""
    dice = np.random.default_rng(seed)
    record = TrajectoryBuilder(image_prompt("q", frames, 4, seed=0))
    for number, text in enumerate(subagents, start=100 * seed + 1):
        record.subagents.append(rollout(text, seed=number, frames=3))
    head = RENDERER.encode(prefix)
    for number, text in enumerate(turns):
        tokens = np.array(RENDERER.encode(text), np.int32)
        record.add_given(head)
        log_probs = -dice.gamma(2.0, 1.0, len(tokens)).astype(np.float32)
        said = Turn(np.array(head, np.int32), tokens, log_probs, StopReason.END, prefix + text)
        record.add_turn(said)
        if number < len(responses):
            record.add_given(RENDERER.tool_turn([responses[number]]))
    return record.finish(RENDERER, 0)


def group(*rollouts: Trajectory, row: Row = ROW) -> RolloutGroup:
    return RolloutGroup(row, 2, rollouts)


def configured(*settings: str) -> Config:
    """The needle recipe at toy size."""
    small = ["data.frame_budgets=2", "rl.group_size=2", "rl.prompts_per_step=1"]
    return override(get_recipe("needle_rl"), [*small, "rl.micro_groups=1", *settings])


def learner(
    config: Config,
    policy: ToyPolicy | None = None,
    mesh: str = "data:1",
    reference: FlatParams | None = None,
) -> Learner:
    """A learner on as many devices as the mesh has."""
    count = 1 if mesh == "data:1" else 8
    devices = make_mesh(parse_mesh(mesh, count), jax.devices()[:count])
    policy = policy or Learnable()
    reference = policy.init() if reference is None else reference
    shapes = batch_shapes(config, SPEC, PAD)
    return open_learner(config, policy, optax.sgd(0.1), devices, TAGS, shapes, reference)


def as_state(params: FlatParams, frozen: FlatParams | None = None) -> TrainState:
    """Weights of which some are frozen, before the first step."""
    return TrainState(params, frozen or {}, optax.sgd(0.1).init(params), jnp.zeros((), jnp.int32))
