"""Laws of the design that no single room can hold, on the real needle world."""

import dataclasses

import jax
import numpy as np
import pytest

from paravt_jax.params import initialise
from pipelines.budget import frame_budget
from pipelines.loader import prompt_stream
from train import setup
from train.batch import learner_batch, streams_of_examples
from train.data.questions import open_rows
from train.recipes import get_recipe
from train.settings.override import override
from train.step import batch_log_probs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    config = override(
        get_recipe("needle_sft"),
        [
            f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
            "data.train_videos=8",
            "data.held_out_videos=2",
        ],
    )
    return setup.Parts(config)


@pytest.mark.slow
def test_log_probs_change_with_the_pixels(world):
    """Law 2: a trainer that is blind to the video fails here."""
    examples = world.sources()
    streams = streams_of_examples([examples["trace"][i] for i in range(2)])
    batch = learner_batch(streams, length=384, pad_id=world.renderer.pad_id)
    policy = world.policy
    params = initialise(policy.table, jax.random.key(0))
    log_probs = jax.jit(
        lambda batch: batch_log_probs(policy, params, batch, temperature=1.0, budget=160)[0]
    )
    seen = log_probs(batch)
    other = log_probs(dataclasses.replace(batch, patches=batch.patches[:, ::-1] + 0.5))
    learned = batch.loss_weights > 0
    assert np.abs(seen - other)[learned].min() > 0
    assert not np.abs(seen - other)[~learned].any()


def test_gating_gates(world):
    """Law 8: K frames reach the model, K as drawn for the row, one K per group."""
    config, renderer, reader = world.config, world.renderer, world.reader
    rows, _ = open_rows(config.data, config.evaluation)
    budgets = (4, 8, 16)
    stream = prompt_stream(rows, reader, renderer, budgets, groups_per_step=24, seed=3)
    items = next(stream)
    stream.close()
    assert {item.frame_budget for item in items} == set(budgets)
    image_pad = renderer.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for item in items:
        assert item.frame_budget == frame_budget(3, 0, item.row.row_id, budgets)
        assert len(item.prompt.patches.grids) == item.frame_budget
        assert (item.prompt.tokens == image_pad).sum() == item.frame_budget
        assert (item.prompt.vision_index >= 0).sum() == item.frame_budget
