"""RL steps of the needle model on random batches, on any mesh."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.params import initialise
from paravt_jax.records import LearnerBatch
from tests.support.tiny_models import NEEDLE_MODEL
from train.batch import to_mesh
from train.config import OptimizerSettings
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.state import make_state, trainable_names
from train.step import RlStep

POLICY = Qwen3VLPolicy(Qwen3VLConfig.from_dict(NEEDLE_MODEL))

ROWS, TOKENS, FRAMES, GROUP = 16, 24, 2, 4


def random_batch(seed: int = 0) -> LearnerBatch:
    """Rows in groups of GROUP with vision, ragged lengths, and noisy sampler log-probs."""
    rng = np.random.default_rng(seed)
    index = np.full((ROWS, TOKENS), -1, np.int32)
    index[:, 1 : 1 + FRAMES] = np.arange(FRAMES)
    lengths = rng.integers(TOKENS // 2, TOKENS, ROWS).astype(np.int32)
    places = np.arange(TOKENS)[None]
    weights = ((places >= 8) & (places < lengths[:, None])).astype(np.float32)
    positions = np.broadcast_to(places[..., None], (ROWS, TOKENS, 3)).astype(np.int32)
    normal = rng.normal(size=(3, ROWS, TOKENS)).astype(np.float32) * weights
    patches = rng.normal(size=(ROWS // GROUP, FRAMES, 4, 1536)).astype(np.float32)
    return LearnerBatch(
        tokens=rng.integers(20, 500, (ROWS, TOKENS)).astype(np.int32),
        positions=positions,
        vision_index=index,
        lengths=lengths,
        loss_weights=weights,
        behaviour_log_probs=normal[0] * 0.1 - 6.2 * weights,
        reference_log_probs=normal[1] * 0.1 - 6.2 * weights,
        advantages=normal[2],
        structural=rng.random((ROWS, TOKENS)) < 0.2,
        patches=patches,
        grids=np.full((ROWS // GROUP, FRAMES, 2), 2, np.int32),
        features=None,
    )


@functools.cache
def run_steps(
    mesh_text: str, micro_batches: int, steps: int, objective=None, policy=POLICY, balance=0.0
):
    """Losses and gradient norms of `steps` RL steps on a mesh, and the final state; the same runs
    are run once."""
    count = 1 if mesh_text == "data:1" else 8
    mesh = make_mesh(parse_mesh(mesh_text, count), jax.devices()[:count])
    config = get_recipe("needle_rl")
    model = dataclasses.replace(config.model, lora=policy.lora)
    config = dataclasses.replace(config, model=model)
    optimizer = make_optimizer(OptimizerSettings(learning_rate=1e-3), steps, policy.table)
    with jax.set_mesh(mesh):
        params = initialise(policy.table, jax.random.key(0), mesh)
        state = make_state(params, trainable_names(policy.table, config.model), mesh, optimizer)
        step = jax.jit(
            RlStep(
                policy=policy,
                optimizer=optimizer,
                objective=objective or ObjectiveConfig(kl_weight=0.1),
                temperature=0.8,
                micro_batches=micro_batches,
                budget=TOKENS,
                router_balance=balance,
            ),
            donate_argnums=0,
        )
        figures = []
        for seed in range(steps):
            state, metrics = step(state, to_mesh(random_batch(seed), mesh))
            figures.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(figures), state
