"""The `rl` stage. Reads from top to bottom as the algorithm does in the paper."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paravt_jax.records import RolloutGroup
from pipelines.loader import PromptStream
from pipelines.video import VideoReader
from rollout.agent import Agent, Item
from train.compile.cache import Compilations
from train.config import Config
from train.hosts.cluster import everywhere, is_first, require_same
from train.methods.difficulty import Difficulty
from train.methods.teacher import Teacher
from train.report.log import RunLog, write_rollouts
from train.report.progress import Bar
from train.report.standing import standing
from train.rl.dynamic_sampling import draw_groups, with_length_penalty
from train.rl.learner import Learner, figures
from train.rl.scoring import Scorer, rollout_metrics
from train.state import FlatParams, TrainState
from train.workdir.saving import Saver


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with; `train.run` puts it together."""

    config: Config
    prompts: PromptStream
    """Endless steps of prompts: a frame budget K drawn per prompt, K frames decoded."""
    reader: VideoReader
    """Decodes the frames of prompts and crops."""
    agent: Agent
    scorer: Scorer
    difficulty: Difficulty
    """Changes hard and easy prompts, where the configuration says so."""
    learner: Learner
    teacher: Teacher
    """Scales advantages token by token, where the configuration says so."""
    reference: FlatParams
    """The trainable weights at step 0, for the KL term; the frozen ones never change."""
    saver: Saver
    log: RunLog
    workdir: Path
    compilations: Compilations
    rates: np.ndarray
    """Learning rate of each optimiser step, see `train.report.standing`."""

    def figures(self) -> dict[str, float]:
        """What the parts say of the last step."""
        parts = self.prompts, self.agent, self.scorer, self.difficulty, self.learner, self.teacher
        parts += (self.compilations,)
        figures = {name: value for part in parts for name, value in part.figures.items()}
        return figures | self.reader.take_figures()

    def get_state(self) -> dict[str, Any]:
        """What the parts must remember besides the `TrainState`, as JSON values."""
        return {"prompts": self.prompts.get_state(), "difficulty": self.difficulty.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what was remembered."""
        self.prompts.set_state(state["prompts"])
        self.difficulty.set_state(state["difficulty"])


def reinforce(parts: Parts, state: TrainState, first_step: int) -> TrainState:
    """Run the RL steps from `first_step` on. The order of operations matters; keep it."""
    config = parts.config
    for step in range(first_step, config.steps):
        parts.saver.between(step, state, parts.get_state())
        clock = Clock()
        draw = functools.partial(roll_out, parts, state.params, step, clock)
        drawn = draw_groups(draw, config.rl)

        batch = parts.learner.batch(state.params, drawn.groups)
        batch = parts.learner.with_reference({**state.frozen, **parts.reference}, batch)
        batch = parts.learner.with_advantages(drawn.groups, batch)
        batch = parts.teacher.reweight(state, drawn.groups, batch, step)
        parts.saver.begin_update()
        state, learned = parts.learner.update(state, batch)
        state = parts.teacher.follow(state, step)
        metrics = figures(learned)
        clock.lap("time/learn")

        record = rollout_metrics(drawn.everything) | drawn.figures() | parts.figures()
        record |= metrics | clock.figures() | standing(parts.rates, step, config.rl.updates)
        record["tokens_per_second"] = tokens_generated(drawn.everything) / record["time/step"]
        parts.log.step(step, record)
        if config.output.rollouts and is_first():
            write_rollouts(parts.workdir / "rollouts", step, drawn.everything)
        stop_if_not_finite(record, step, config)
    return state


def roll_out(
    parts: Parts, params: FlatParams, step: int, clock: Clock, number: int
) -> Sequence[RolloutGroup]:
    """The `number`-th batch of prompts of a step, rolled out and scored."""
    config = parts.config
    items = everywhere(lambda: next(parts.prompts))
    require_same(contents(items), f"the prompts of step {step}")
    clock.lap("time/data")

    seed = rollout_seed(config.seed, step, number)
    size = config.rl.group_size
    with Bar(parts.log.console, f"rollouts of step {step + 1}", len(items) * size) as ended:
        parts.agent.ended = ended
        groups = parts.agent.run(params, items, size, seed, policy_version=step)
    groups = parts.scorer(groups, progress=step / config.steps)
    groups = parts.difficulty.revise(params, items, groups, seed, step)
    groups = with_length_penalty(groups, config.rl)
    clock.lap("time/rollout")
    return groups


def contents(items: Sequence[Item]) -> Iterator[bytes | memoryview]:
    """What every host must hold alike of a batch of prompts."""
    for row, budget, prompt in items:
        yield f"{row.row_id} {budget}".encode()
        yield prompt.tokens.tobytes()
        if prompt.patches is not None:
            yield np.ascontiguousarray(prompt.patches.values).data


class Clock:
    """Seconds of each stretch of a step."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """End the stretch that began at the last lap; stretches of one name are added up."""
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def figures(self) -> dict[str, float]:
        """All laps, their sum as `time/step`, and the share of it that data was waited for."""
        step = time.perf_counter() - self._began
        waited = self._laps.get("time/data", 0.0) / step
        return self._laps | {"time/step": step, "data/wait": waited}


def rollout_seed(seed: int, step: int, number: int = 0) -> int:
    """A seed of its own for each batch of prompts of each step, the same after a resume."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


def tokens_generated(groups: Sequence[RolloutGroup]) -> int:
    """Generated tokens of main agents and sub-agents."""
    rollouts = [t for group in groups for t in group.trajectories]
    everyone = rollouts + [sub for t in rollouts for sub in t.subagents]
    return int(sum(t.generated.sum() for t in everyone))


def stop_if_not_finite(record: dict[str, float], step: int, config: Config) -> None:
    """Stop the run at the step whose loss or gradient is no number.

    Raises:
      ValueError: naming the step and the remedy.
    """
    if not np.isfinite(record["loss"] + record["grad_norm"]):
        raise ValueError(
            f"step {step}: loss {record['loss']}, gradient norm {record['grad_norm']}; continue "
            "from the last checkpoint with the same --workdir and a lower rate, for instance "
            f"--set optimizer.learning_rate={config.optimizer.learning_rate / 2:g}"
        )
