"""What routing replay (`rl.routing_replay`) takes from the gap between sampler and learner.

    python benchmarks/routing_replay.py [--rollouts 64] [--tokens 96] [--seed 0]
    python benchmarks/routing_replay.py --cost      what noting the choices costs rollouts

A mixture with random weights (6 layers, 4 of 32 experts each) answers random prompts in two turns,
with something given in between. The learner takes the same rollouts twice: its routers choose, and
the sampler's choices are replayed. Sampler and learner differ by the order of their sums (float32),
by their rounding (bfloat16), by an int8 cache, or by weights that moved by so much of their size.
`kl` is that of a learner that replays from a reference with its own weights that does not.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy, TextConfig, VisionConfig
from models.qwen3_vl.config import ExpertsConfig
from paravt_jax.blocks import text_block
from paravt_jax.params import Params, initialise
from paravt_jax.records import LearnerBatch
from paravt_jax.routing import Routing
from paravt_jax.shared_rows import Bounds
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine, SlotPool
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.engine.slots import StreamId
from train.batch import LearnerStream, shared_batch
from train.step import batch_log_probs

VOCAB, PROMPT, GIVEN, COPIES, REPEATS = 512, 64, 8, 4, 5
POLICY = Qwen3VLPolicy(
    Qwen3VLConfig(
        text=TextConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            mrope_section=(4, 2, 2),
            initializer_range=0.1,
            experts=ExpertsConfig(32, 4, 64),
        ),
        vision=VisionConfig(
            depth=1,
            hidden_size=16,
            num_heads=2,
            intermediate_size=16,
            out_hidden_size=128,
            patch_size=4,
            num_position_embeddings=4,
            deepstack_visual_indexes=(),
        ),
    )
)
CASES = {
    "float32": ({}, 0.0),
    "bfloat16": ({"compute_dtype": "bfloat16"}, 0.0),
    "bfloat16, int8 cache": ({"compute_dtype": "bfloat16", "cache_dtype": "int8"}, 0.0),
    "float32, weights moved by 0.001": ({}, 1e-3),
    "float32, weights moved by 0.01": ({}, 1e-2),
}
"""Settings of the policy, and by how much of its size a weight has moved since the rollouts."""


def open_engine(policy: Qwen3VLPolicy, rollouts: int, tokens: int, routing: bool) -> Engine:
    """With slots for so many rollouts."""
    pool = SlotPool(rollouts // COPIES, COPIES, PROMPT, tokens + GIVEN)
    automata = TokenAutomata([b"x"] * VOCAB, [0])
    return Engine(policy, {"main": pool}, automata=automata, pad_id=0, routing=routing)


def roll_out(engine: Engine, params: Params, seed: int) -> dict[StreamId, list[Any]]:
    """Two turns of each of the rollouts that there is room for, `COPIES` for a prompt: the prompt,
    then what was given before each turn, and the turn."""
    dice, pool = np.random.default_rng(seed), engine.pools["main"]
    session, parts = Session(engine, params), {}
    for number in range(pool.prompts):
        prompt = text_block(dice.integers(1, VOCAB, dice.integers(PROMPT // 2, PROMPT)).tolist())
        seeds = [seed + COPIES * number + copy for copy in range(COPIES)]
        parts |= {stream: [prompt] for stream in session.open("main", prompt, seeds)}
    for given in ([], dice.integers(1, VOCAB, GIVEN).tolist()):
        for stream in parts:
            session.generate(stream, given, SamplingConfig(), (pool.suffix - GIVEN) // 2)
        while session.generating:
            for stream, turn in session.step():
                parts[stream] += [(np.asarray(given, np.int32), turn)]
    return parts


def stream_of(prompt, turns) -> LearnerStream:
    """A rollout as the learner takes it."""
    columns = [(given, np.zeros(len(given)), turn.tokens, turn.log_probs) for given, turn in turns]
    weights = [np.repeat([0.0, 1.0], [len(given), len(own)]) for given, _, own, _ in columns]
    return LearnerStream(
        prompt,
        np.concatenate([x for given, _, own, _ in columns for x in (given, own)]).astype(np.int32),
        np.concatenate(weights).astype(np.float32),
        np.concatenate([x for _, zeros, _, own in columns for x in (zeros, own)]).astype(
            np.float32
        ),
        routing=Routing.joined([turn.routing for _, turn in turns]),
    )


def moved(params: Params, share: float, seed: int) -> Params:
    """Weights that each moved by so much of their matrix's standard deviation."""
    keys = jax.random.split(jax.random.key(seed), len(params))
    return {
        name: x + share * jnp.std(x) * jax.random.normal(key, x.shape)
        for key, (name, x) in zip(keys, params.items(), strict=True)
    }


def measured(policy: Qwen3VLPolicy, params: Params, batch: LearnerBatch) -> dict[str, float]:
    """What the learner says of rollouts, its routers choosing and replayed."""
    learn = jax.jit(
        lambda params, batch: batch_log_probs(
            policy, params, batch, temperature=1.0, budget=batch.loss_weights.shape[1]
        )
    )
    replayed, _, routers = learn(params, batch)
    own, *_ = learn(params, dataclasses.replace(batch, routing=None))
    learned = np.asarray(batch.loss_weights) > 0
    sampled = np.asarray(batch.behaviour_log_probs)
    assert routers.gap is not None
    found = {name: float(value) for name, value in routers.gap.means().items()}
    for name, values in (("own", own), ("replayed", replayed)):
        gap = np.abs(np.asarray(values) - sampled)[learned]
        found |= {f"{name} mean": gap.mean(), f"{name} max": gap.max()}
    apart = np.asarray(own - replayed)[learned]
    return found | {"kl": float(np.mean(np.exp(apart) - apart - 1))}


def cost(params: Params, rollouts: int, tokens: int, seed: int) -> list[tuple[float, float]]:
    """Seconds of the same rollouts without and with a record of routing, in turns."""
    engines = [open_engine(POLICY, rollouts, tokens, routing) for routing in (False, True)]
    seconds: list[list[float]] = []
    for _ in range(REPEATS + 1):
        seconds.append([])
        for engine in engines:
            began = time.perf_counter()
            roll_out(engine, params, seed)
            seconds[-1].append(time.perf_counter() - began)
    return [(plain, noted) for plain, noted in seconds[1:]]  # the first compiles


def main() -> None:
    """Print a row of each case."""
    parser = argparse.ArgumentParser(description="The gap with routing replay and without.")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cost", action="store_true", help="time rollouts instead")
    flags = parser.parse_args()
    params = initialise(POLICY.table, jax.random.key(flags.seed))
    if flags.cost:
        seconds = cost(params, flags.rollouts, flags.tokens, flags.seed)
        ratios = [noted / plain for plain, noted in seconds]
        print(f"seconds of rollouts, plain and noted: {seconds}")
        print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        return
    for name, (settings, share) in CASES.items():
        policy = dataclasses.replace(POLICY, **settings)
        engine = open_engine(policy, flags.rollouts, flags.tokens, routing=True)
        parts = roll_out(engine, params, flags.seed).values()
        streams = [stream_of(prompt, turns) for prompt, *turns in parts]
        own = max(len(stream.tokens) for stream in streams)
        sizes = {"slots": PROMPT + COPIES * own, "bounds": Bounds(PROMPT, own), "per_row": COPIES}
        batch = shared_batch(streams, pad_id=0, group_size=COPIES, routing=policy.routing, **sizes)
        learner = moved(params, share, flags.seed) if share else params
        batch = dataclasses.replace(batch, floors=None, grammar=None)
        told = measured(policy, learner, jax.tree.map(jnp.asarray, batch))
        print(f"{name}: " + ", ".join(f"{key} {value:.2g}" for key, value in told.items()))


if __name__ == "__main__":
    main()
