"""What a run compiles before its first step, so that it does not stop for it later.

`rl.warm_up` rehearses rollouts of every static size that the questions can bring about, and an
update of every shape that they can have. Not foreseen are updates on rows that saw frames in tool
responses, on rows of sub-agents, and what a teacher reads: their shapes depend on what was done.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console

from paravt_jax.blocks import text_block
from paravt_jax.records import Patches, Prompt, RolloutGroup, Row, Trajectory, VideoRef
from rollout.engine.engine import Engine
from rollout.engine.precompile import InputSizes, precompile
from train.report.progress import ProgressBar
from train.rl.batches import BatchShapes
from train.rl.learner import Learner
from train.state import TrainState

STEP_OFFSET = 1 << 30
"""More steps than any run has."""


def rehearse_run(
    engine: Engine,
    learner: Learner,
    sizes: Mapping[str, InputSizes],
    state: TrainState,
    console: Console,
) -> TrainState:
    """Compile all that steps can need where the engine gets inputs of these sizes; returns the
    state, unchanged (its memory is handed on)."""
    began, shapes = time.perf_counter(), learner.batches.shapes
    rollouts = functools.partial(ProgressBar, console, "compiling rollouts")
    count = precompile(engine, state.params, sizes, shapes.spec.patch_values, rollouts)
    per_row = learner.batches.per_row(learner.settings.group_size)
    lengths = shapes.possible(per_row, learner.batches.unit).values()
    with ProgressBar(console, "compiling updates", len(lengths)) as done:
        for prompt, owns in lengths:
            state = rehearse_step(learner, state, blank_groups(learner, prompt, owns))
            done()
    console.print(
        f"warm-up: {count} shapes of rollouts, {len(lengths)} of updates "
        f"compiled in {time.perf_counter() - began:.0f} s"
    )
    return state


def rehearse_step(learner: Learner, state: TrainState, groups: list[RolloutGroup]) -> TrainState:
    """The state unchanged, after all that a step computes: as a rehearsal, whose steps count below
    0 (see `apply_gradients`). `state` is donated."""
    rehearsed = dataclasses.replace(state, step=state.step - STEP_OFFSET)
    after, _ = learner.step(rehearsed, groups)
    return dataclasses.replace(after, step=after.step + (STEP_OFFSET - learner.settings.updates))


def blank_groups(learner: Learner, prompt: int, owns: Sequence[int]) -> list[RolloutGroup]:
    """A batch of groups whose prompts and what follows them in each row have these lengths and mean
    nothing."""
    shapes, rl = learner.batches.shapes, learner.settings
    shown = _blank_prompt(shapes, prompt)
    rollouts = tuple(_blank_rollout(shown, own, shapes.pad_id) for own in owns)
    row = Row("rehearsal", VideoRef("", 0.0), "", "")
    group = RolloutGroup(row, 1, rollouts * (rl.group_size // len(owns)))
    return [group] * rl.prompts_per_step


def _blank_prompt(shapes: BatchShapes, length: int) -> Prompt:
    """A prompt of one frame."""
    spec, blank = shapes.spec, text_block([shapes.pad_id] * length)
    blank.vision_index[0] = 0
    frame = np.zeros((1, spec.max_patches, spec.patch_values), np.float32)
    patches = Patches(frame, np.full((1, 2), spec.merge_size, np.int32))
    return dataclasses.replace(blank, patches=patches)


def _blank_rollout(prompt: Prompt, spoken: int, pad_id: int) -> Trajectory:
    return Trajectory(
        prompt=prompt,
        tokens=np.full(spoken, pad_id, np.int32),
        generated=np.ones(spoken, bool),
        log_probs=np.zeros(spoken, np.float32),
        turns=(),
        scored_text="",
        full_text="",
        rewards={"total": 0.0, "task": 0.0, "anchor": 0.0},
    )
