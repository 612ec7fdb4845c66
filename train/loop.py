"""The `rl` stage. Reads from top to bottom as the algorithm does in the paper."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from paravt_jax.records import RolloutGroup
from pipelines.loader import PromptStream
from rollout.agent import Agent
from train.checkpoint import Checkpoints
from train.cluster import is_first
from train.config import Config
from train.learner import Learner, figures
from train.output import RunLog, write_rollouts
from train.scoring import Scorer, rollout_metrics
from train.state import FlatParams, TrainState


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with; `train.run` puts it together."""

    config: Config
    prompts: PromptStream
    """Endless steps of prompts: a frame budget K drawn per prompt, K frames decoded."""
    agent: Agent
    scorer: Scorer
    learner: Learner
    reference: FlatParams
    """The trainable weights at step 0, for the KL term; the frozen ones never change."""
    checkpoints: Checkpoints
    log: RunLog
    workdir: Path


def reinforce(parts: Parts, state: TrainState, first_step: int) -> TrainState:
    """Run the RL steps from `first_step` on. The order of operations matters; keep it."""
    config = parts.config
    for step in range(first_step, config.steps):
        clock = Clock()
        items = next(parts.prompts)
        clock.lap("time/data")

        seed = rollout_seed(config.seed, step)
        groups = parts.agent.run(
            state.params, items, config.rl.group_size, seed, policy_version=step
        )
        groups = parts.scorer(groups, progress=step / config.steps)
        clock.lap("time/rollout")

        batch = parts.learner.batch(state.params, groups)
        batch = parts.learner.with_reference({**state.frozen, **parts.reference}, batch)
        state, learned = parts.learner.step(state, batch)
        metrics = figures(learned)
        clock.lap("time/learn")

        record = rollout_metrics(groups) | parts.agent.figures | parts.learner.figures
        record |= parts.scorer.figures
        record |= metrics | clock.figures()
        record["tokens_per_second"] = tokens_generated(groups) / record["time/step"]
        parts.log.step(step, record)
        stop_if_not_finite(record, step)
        if config.output.rollouts and is_first():
            write_rollouts(parts.workdir / "rollouts", step, groups)
        parts.checkpoints.maybe_save(step + 1, state, parts.prompts.get_state())
    return state


class Clock:
    """Seconds of each stretch of a step."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the stretch that began at the last lap."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now

    def figures(self) -> dict[str, float]:
        """All laps, and their sum as `time/step`."""
        return self._laps | {"time/step": time.perf_counter() - self._began}


def rollout_seed(seed: int, step: int) -> int:
    """A seed of its own for the rollouts of each step, the same after a resume."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def tokens_generated(groups: Sequence[RolloutGroup]) -> int:
    """Generated tokens of main agents and sub-agents."""
    rollouts = [t for group in groups for t in group.trajectories]
    everyone = rollouts + [sub for t in rollouts for sub in t.subagents]
    return int(sum(t.generated.sum() for t in everyone))


def stop_if_not_finite(record: dict[str, float], step: int) -> None:
    """Stop the run at the step whose loss or gradient is no number.

    Raises:
      ValueError: naming the step and the remedy.
    """
    if not np.isfinite(record["loss"] + record["grad_norm"]):
        raise ValueError(
            f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}; resume "
            "from the last checkpoint with a lower optimizer.learning_rate"
        )
