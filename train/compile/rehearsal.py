"""What a run compiles before its first step, so that it does not stop for it later.

`rl.warm_up` rehearses rollouts of every static size that the questions can bring about, and an
update of every length that they can have. Not foreseen are updates on rows that saw frames in tool
responses, on rows of sub-agents, and what a teacher reads: their shapes depend on what was done.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterable

import numpy as np

from paravt_jax.blocks import text_block
from paravt_jax.records import (
    LearnerBatch,
    Patches,
    Prompt,
    RolloutGroup,
    Row,
    Trajectory,
    VideoRef,
)
from pipelines.render import ChatRenderer
from rollout.engine.engine import Engine
from rollout.engine.rehearsal import warm_up
from train.compile.prompts import agent_reads
from train.config import generated_budget
from train.report.progress import Bar
from train.rl.learner import Learner
from train.rl.loop import Parts
from train.state import TrainState

BELOW = 1 << 30
"""More steps than any run has."""


def warm_up_run(
    parts: Parts,
    engine: Engine,
    renderer: ChatRenderer,
    rows: Iterable[Row],
    state: TrainState,
    hints: int = 0,
) -> TrainState:
    """Compile all that steps on the questions can need, prompts being longer by a hint of at most
    `hints` tokens; returns the state, unchanged (its memory is handed on)."""
    began, config = time.perf_counter(), parts.config
    reads = agent_reads(config, renderer, rows, config.data.frame_budgets, hints)
    console, lengths = parts.log.console, parts.learner.lengths
    rollouts = functools.partial(Bar, console, "compiling rollouts")
    count = warm_up(engine, state.params, reads, renderer.spec.patch_values, rollouts)
    with Bar(console, "compiling updates", len(lengths)) as done:
        for length in lengths:
            state = _rehearse_update(parts, state, _blank_groups(parts, renderer, length))
            done()
    console.print(
        f"warm-up: {count} shapes of rollouts, {len(lengths)} lengths of updates "
        f"compiled in {time.perf_counter() - began:.0f} s"
    )
    return state


def _rehearse_update(parts: Parts, state: TrainState, groups: list[RolloutGroup]) -> TrainState:
    learner = parts.learner
    batch = learner.batch(state.params, groups)
    batch = learner.with_reference({**state.frozen, **parts.reference}, batch)
    batch = learner.with_advantages(groups, batch)
    return update_without_effect(learner, state, batch)


def update_without_effect(learner: Learner, state: TrainState, batch: LearnerBatch) -> TrainState:
    """The state unchanged, after all that an update computes: as a rehearsal, whose steps count
    below 0 (see `apply_gradients`). `state` is donated."""
    after, learned = learner.update(dataclasses.replace(state, step=state.step - BELOW), batch)
    return dataclasses.replace(after, step=after.step + (BELOW - len(learned)))


def _blank_groups(parts: Parts, renderer: ChatRenderer, length: int) -> list[RolloutGroup]:
    """A batch of groups whose streams have this length and mean nothing."""
    spec, rl = renderer.spec, parts.config.rl
    spoken = min(generated_budget(parts.config), length - 1)
    blank = text_block([renderer.pad_id] * (length - spoken))
    blank.vision_index[0] = 0
    frame = np.zeros((1, spec.max_patches, spec.patch_values), np.float32)
    patches = Patches(frame, np.full((1, 2), spec.merge_size, np.int32))
    rollout = _blank_rollout(dataclasses.replace(blank, patches=patches), spoken, renderer.pad_id)
    row = Row("warm-up", VideoRef("", 0.0), "", "")
    return [RolloutGroup(row, 1, (rollout,) * rl.group_size)] * rl.prompts_per_step


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
