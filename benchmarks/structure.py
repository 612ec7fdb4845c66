"""What finding and pairing structural tags costs, against the learner step that needs it.

    python benchmarks/structure.py [--repeats 7]

Both sides on the same batch of the default run's size (16 prompts of 8 rollouts, needle model),
made of the needle world's oracle traces, in one process and in turns. Median and spread (smallest
to largest) of the ratios of neighbouring runs. The other side is the optimiser step alone, so the
share of all that learning takes is smaller still.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from paravt_jax.params import initialise
from paravt_jax.structure import anchor_tags
from train import setup
from train.batch import learner_batch, streams_of_examples, to_mesh
from train.config import Config
from train.optimizer import make_optimizer
from train.recipes import get_recipe
from train.rl.anchor import find_tags
from train.settings.override import override
from train.state import make_state, trainable_names

LENGTH = 384


def main() -> None:
    """Parse the command line and print one row."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as cache:
        small = [f"data.cache_dir={cache}", "data.train_videos=32", "data.held_out_videos=2"]
        find, step, shape = sides(override(get_recipe("needle_rl"), small))
    times = [(seconds(find), seconds(step)) for _ in range(repeats + 1)][1:]
    ratios = [100 * first / second for first, second in times]
    found, stepped = (1000 * statistics.median(side) for side in zip(*times, strict=True))
    print(f"batch {shape}, {os.cpu_count()} cores: tags {found:.1f} ms, step {stepped:.0f} ms")
    print(f"{statistics.median(ratios):.2f} % ({min(ratios):.2f} to {max(ratios):.2f})")


def sides(config: Config) -> tuple[Callable[[], object], Callable[[], object], tuple[int, ...]]:
    """Finding the tags of a batch, one optimiser step on it, and the batch's shape."""
    mesh, model = setup.open_mesh(config), setup.Parts(config)
    batch = to_mesh(traces(config, model.renderer), mesh)
    table, anchors = model.tags, anchor_tags(config.agent.call_syntax)
    find = jax.jit(find_tags, static_argnames=("anchors", "only_paired"))
    spoken = batch.loss_weights > 0
    optimizer = make_optimizer(config.optimizer, config.steps, model.policy.table)
    step = jax.jit(setup.open_rl_step(config, model.policy, optimizer))
    with jax.set_mesh(mesh):
        params = initialise(model.policy.table, jax.random.key(0), mesh)
        state = make_state(
            params, trainable_names(model.policy.table, config.model), mesh, optimizer
        )
        features = jax.jit(model.policy.encode)(params, batch.patches, batch.grids)
    batch = dataclasses.replace(batch, features=features, patches=None, grids=None)

    def run_step() -> object:
        with jax.set_mesh(mesh):
            return step(state, batch)

    return (
        lambda: find(batch.tokens, spoken, spoken, table, anchors=anchors, only_paired=True),
        run_step,
        batch.tokens.shape,
    )


def traces(config: Config, renderer):
    """A batch of oracle traces, each as often as a prompt has rollouts."""
    lessons = override(
        get_recipe("needle_sft"),
        [
            f"data.{name}={getattr(config.data, name)}"
            for name in ("cache_dir", "train_videos", "held_out_videos")
        ],
    )
    source = setup.Parts(lessons).sources()["trace"]
    examples = [source[number] for number in range(config.rl.prompts_per_step)]
    copies = [example for example in examples for _ in range(config.rl.group_size)]
    batch = learner_batch(
        streams_of_examples(copies),
        length=LENGTH,
        pad_id=renderer.pad_id,
        group_size=config.rl.group_size,
        frames=max(config.data.frame_budgets),
    )
    noise = np.random.default_rng(0).normal(size=batch.loss_weights.shape).astype(np.float32)
    return dataclasses.replace(batch, advantages=noise * batch.loss_weights)


def seconds(run: Callable[[], object]) -> float:
    """Of one run, to its end."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
