"""One optimiser step of the learner: prompts once for each group, against a copy for each rollout.

    python benchmarks/learner.py step [--size 5M|240M] [--prompt 832] [--own 208] [--group 8]
                                      [--torch] [--clock cpu]
    python benchmarks/learner.py padding   slots of rows, over drawn lengths

`step` runs both sides in one process, in turns, on the same weights and tokens, with AdamW; median
and spread (smallest to largest) of `--repeats` runs, and the losses, which must agree. The token
ideal is by how many times sharing makes the tokens fewer. `--torch` adds transformers with gradient
checkpointing on the copied rows; `--clock cpu` takes processor time, where others run beside.
`padding` counts slots as the learner pads them.
"""

import os.path
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.rollout import compare, config_dict, ratio
from models.qwen3_vl import Qwen3VLConfig, Qwen3VLPolicy
from paravt_jax.blocks import text_block
from paravt_jax.objectives import ObjectiveConfig
from paravt_jax.params import initialise
from paravt_jax.records import LearnerBatch
from paravt_jax.shapes import bucket
from paravt_jax.shared_rows import TILE, Bounds
from pipelines.preprocess import SPECS
from train.batch import LearnerStream, learner_batch, shared_batch
from train.rl.batches import LENGTH_UNIT, BatchShapes
from train.state import TrainState
from train.step import RlStep

RATE = 1e-4
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    """Parse the command line and print rows."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("step", "padding"))
    parser.add_argument("--size", choices=("5M", "240M"), default="5M")
    parser.add_argument("--prompt", type=int, default=832)
    parser.add_argument("--own", type=int, default=208)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    told = parser.parse_args()
    if told.what == "padding":
        for unit in (1, TILE):
            print(f"streams at multiples of {unit} slots:")
            padding(told.group, unit)
    else:
        step(told)


def step(told: argparse.Namespace) -> None:
    """Both layouts, and torch."""
    policy = Qwen3VLPolicy(Qwen3VLConfig.from_dict(config_dict(told.size)))
    params = initialise(policy.table, jax.random.key(0))
    streams = drawn_streams(told.prompt, told.own, told.group)
    both = {
        "shared": shared_batch(
            streams,
            slots=told.prompt + told.group * told.own,
            bounds=Bounds(told.prompt, told.own),
            pad_id=0,
            group_size=told.group,
            per_row=told.group,
        ),
        "copied": learner_batch(
            streams, length=told.prompt + told.own, pad_id=0, group_size=told.group
        ),
    }
    losses: dict[str, float] = {}
    runs: dict[str, Callable[[], object]] = {
        name: ours(policy, params, batch, told.own, functools.partial(losses.__setitem__, name))
        for name, batch in both.items()
    }
    if told.torch:
        runs["torch"] = theirs(policy, params, streams, losses)
    seconds = compare(runs, told.repeats, CLOCKS[told.clock])
    ideal = told.group * (told.prompt + told.own) / (told.prompt + told.group * told.own)
    print(f"losses of the last run: {losses}; token ideal {ideal:.2f}")
    for name in [*both][1:] + ["torch"] * told.torch:
        ratio(seconds, name, "shared")
    if told.torch:
        ratio(seconds, "torch", "copied")


def drawn_streams(prompt: int, own: int, group: int) -> list[LearnerStream]:
    """Rollouts of one prompt, all tokens random and theirs learned."""
    rng = np.random.default_rng(0)
    shown = text_block(rng.integers(200, 4000, prompt))
    weights, log_probs = np.ones(own, np.float32), np.full(own, -8.0, np.float32)
    return [
        LearnerStream(shown, rng.integers(200, 4000, own).astype(np.int32), weights, log_probs)
        for _ in range(group)
    ]


def ours(
    policy: Qwen3VLPolicy,
    params: dict[str, jax.Array],
    batch: LearnerBatch,
    own: int,
    tell: Callable[[float], None],
) -> Callable[[], None]:
    """Steps from fresh weights on; the loss is the mean negative log-probability of what is
    learned, as torch's."""
    rl = RlStep(
        policy=policy,
        optimizer=optax.adamw(RATE),
        objective=ObjectiveConfig(anchor="logprob", anchor_weight=1.0, behaviour_cap=None),
        temperature=1.0,
        micro_batches=1,
        budget=own,
    )
    # The vision tower does not train, and these rows show nothing.
    own_params = {name: x.copy() for name, x in params.items()}  # a step donates its state
    language = {name: x for name, x in own_params.items() if not name.startswith("vision.")}
    frozen = {name: x for name, x in own_params.items() if name not in language}
    moments = rl.optimizer.init(language)
    held = [TrainState(language, frozen, moments, jnp.zeros((), jnp.int32))]
    batch = dataclasses.replace(batch, structural=np.asarray(batch.loss_weights) > 0)
    batch = jax.tree.map(jnp.asarray, batch)
    # Once: what a step returns is committed to its device, and for that jit would compile anew.
    compiled = jax.jit(rl, donate_argnums=0).lower(held[0], batch).compile()

    def run() -> None:
        held[0], metrics = compiled(held[0], batch)
        tell(float(metrics["loss"]))

    return run


def theirs(
    policy: Qwen3VLPolicy,
    params: dict[str, jax.Array],
    streams: list[LearnerStream],
    losses: dict[str, float],
) -> Callable[[], None]:
    """The same step by transformers: the same weights, tokens and loss."""
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        policy.save_folder(params, folder)
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.train()
    model.gradient_checkpointing_enable()
    for parameter in model.model.visual.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=1e-4)
    own = len(streams[0].tokens)
    rows = np.stack([np.concatenate([s.prompt.tokens, s.tokens]) for s in streams])
    ids = torch.tensor(rows, dtype=torch.long)

    def run() -> None:
        # Logits of what is learned alone, as here: the head on prompts would be wasted.
        logits = model(input_ids=ids, logits_to_keep=own + 1).logits[:, :-1]
        targets = ids[:, -own:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses["torch"] = loss.item()

    return run


def padding(group: int, unit: int, prompts: int = 8, steps: int = 400) -> None:
    """Slots of a step by the release's frame budgets, with 64 vision tokens and 8 of text to a
    frame and 400 of text besides. Rollouts take two or four turns of at most 2,048 tokens, 240 in
    the mean, and tool responses of 200. Copies stand in rows of one of few lengths from a quarter
    of the longest on, as they did before prompts were shared."""
    rng, budgets = np.random.default_rng(0), np.array([4, 8, 16, 32, 64])
    per_frame, text, turn, response = 72, 400, 2048, 512
    most_prompt, most_own = 64 * per_frame + text, 4 * turn + 3 * response
    least, most = -(-(most_prompt + most_own) // 4), -(-(most_prompt + most_own) // LENGTH_UNIT)
    shapes = BatchShapes(SPECS["image"](16, 2, 2), 0, 0, 0, most_prompt, most_own)
    totals = {"tokens of copies": 0, "tokens shared": 0, "slots of copies": 0, "slots shared": 0}
    for _ in range(steps):
        seen = rng.choice(budgets, prompts) * per_frame + text
        turns = rng.choice([2, 4], (prompts, group))
        own = turns * np.minimum(rng.gamma(2.0, 120, (prompts, group)), turn) + (turns - 1) * 200
        own = own.astype(int)
        longest = (seen[:, None] + own).max()
        length = bucket(max(longest, least), LENGTH_UNIT, most * LENGTH_UNIT)
        layout = shapes.layout_of(list(seen), list(own.ravel()), unit)
        totals["tokens of copies"] += int((seen[:, None] + own).sum())
        totals["tokens shared"] += int(seen.sum() + own.sum())
        totals["slots of copies"] += prompts * group * length
        totals["slots shared"] += prompts * layout.slots
    for name, count in totals.items():
        print(f"{name:<20} {count / steps:12,.0f} per step")
    print(f"ratio of slots {totals['slots of copies'] / totals['slots shared']:.2f}")


if __name__ == "__main__":
    main()
