"""The `rl` stage, top to bottom as PARA-GRPO goes. Each step:

1. draws a frame budget K for each prompt, and shows K frames of its video;
2. rolls out each prompt G times, sub-agents looking side by side at what is cropped;
3. scores answer, format and use of the tool;
4. turns rewards into advantages within each group, the format's at structural tokens;
5. updates the policy.

The first three are here, the others are `train.rl.learner.Learner.step`. What other papers add
stands around one of the two (`train.methods`), and nothing here knows of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console

from paravt_jax.records import RolloutGroup
from pipelines.loader import PromptItem, PromptStream
from rollout.agent import Agent
from train.data.questions import prompt_contents
from train.hosts.cluster import on_all_hosts, require_same
from train.report.progress import ProgressBar
from train.report.rollouts import RolloutLog
from train.report.steps import Clock, StepReport
from train.rl.scoring import Scorer, rollout_metrics
from train.rl.sight import Sight
from train.rl.token_values import TokenValues
from train.state import FlatParams, TrainState
from train.workdir.saving import Saver


def reinforce(run: RlRun, state: TrainState, first_step: int) -> TrainState:
    """Run the RL steps from `first_step` on. The order of operations matters; keep it."""
    clock = run.report.clock
    for step in range(first_step, run.steps):
        run.saver.between_steps(step, run.saved(step, state), run.get_state())
        clock.start()
        with clock.time("time/rollout"):
            batch = run.rollouts.draw(state.params, step)
        sight = run.sight(step, state.params, batch.groups) if run.sight is not None else {}
        run.saver.begin_update()
        with clock.time("time/learn"):
            state, learned = run.learner.step(state, batch.groups)
        learned = {**learned, **sight}
        if run.evaluate is not None:
            with clock.time("time/evaluate"):
                learned = {**learned, **run.evaluate(step + 1, state.params)}
        report(run, step, batch, learned)
    return state


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Prompts of a step, rolled out and scored."""

    prompts: PromptStream
    """Endless steps of prompts: a frame budget K drawn for each, K frames decoded."""
    sample: RolloutSampler
    group_size: int
    """Rollouts of each prompt (G)."""
    seed: int
    clock: Clock

    def draw(self, params: FlatParams, step: int, number: int = 0) -> RolloutBatch:
        """See `RolloutSource`."""
        with self.clock.time("time/data"):
            prompts = on_all_hosts(lambda: next(self.prompts))
            require_same(prompt_contents(prompts), f"the prompts of step {step}")
        seed = rollout_seed(self.seed, step, number)
        groups = self.sample(params, prompts, self.group_size, seed, step)
        return RolloutBatch(groups, groups)


@dataclasses.dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts by the agent of the run, with rewards by its rules."""

    agent: Agent
    scorer: Scorer
    steps: int
    """Of the whole run."""
    console: Console
    staleness: int = 0
    """By how many steps the weights may be behind, see `version_of`."""

    def __call__(
        self, params: FlatParams, prompts: Sequence[PromptItem], copies: int, seed: int, step: int
    ) -> list[RolloutGroup]:
        """See `Sample`."""
        title, total = f"rollouts of step {step + 1}", len(prompts) * copies
        with ProgressBar(self.console, title, total) as self.agent.on_episode_end:
            version = version_of(step, self.staleness)
            groups = self.agent.run(params, prompts, copies, seed, policy_version=version)
        return self.scorer(groups, progress=step / self.steps)


def report(run: RlRun, step: int, batch: RolloutBatch, learned: Mapping[str, float]) -> None:
    """Write the rollouts of a step and its metrics."""
    if run.rollout_log is not None:
        tokens = run.of_tokens()
        values = None if tokens is None else functools.partial(tokens.of_rollouts, batch.groups)
        run.rollout_log(step, batch.drawn, values)
    record = rollout_metrics(batch.drawn) | batch.metrics()
    for source in run.metrics:
        record |= source()
    run.report(step, {**record, **learned}, tokens_generated(batch.drawn))


def version_of(step: int, staleness: int) -> int:
    """The version of the weights, counted in steps, that draws the rollouts of a step."""
    return max(0, step - staleness)


def rollout_seed(seed: int, step: int, number: int = 0) -> int:
    """A seed of its own for each batch of prompts of each step, the same after a resume."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1)[0])


def tokens_generated(groups: Sequence[RolloutGroup]) -> int:
    """Generated tokens of main agents and sub-agents; once of those that several calls share."""
    rollouts = [t for group in groups for t in group.trajectories]
    everyone = {id(t): t for t in [*rollouts, *(sub for t in rollouts for sub in t.subagents)]}
    return int(sum(t.generated.sum() for t in everyone.values()))


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Scored rollouts of one step."""

    groups: Sequence[RolloutGroup]
    """Those to learn from: as many as a step has prompts."""
    drawn: Sequence[RolloutGroup]
    """All that were rolled out, those to learn from included: what the policy does."""

    def metrics(self) -> dict[str, float]:
        """How much was drawn beyond what is learned from."""
        drawn, kept = len(self.drawn), len(self.groups)
        return {"group/redraws": drawn / kept - 1, "group/kept": kept / drawn}


@runtime_checkable
class RolloutSampler(Protocol):
    """Prompts to groups of scored rollouts."""

    def __call__(
        self, params: FlatParams, prompts: Sequence[PromptItem], copies: int, seed: int, step: int
    ) -> list[RolloutGroup]:
        """`copies` rollouts of each prompt; all that is drawn follows from `seed`."""
        ...


@runtime_checkable
class RolloutSource(Protocol):
    """Where the rollouts of a step come from."""

    def draw(self, params: FlatParams, step: int, number: int = 0) -> RolloutBatch:
        """The `number`-th batch of prompts of a step, rolled out and scored."""
        ...


@runtime_checkable
class RolloutLearner(Protocol):
    """What learns from them."""

    def step(
        self, state: TrainState, groups: Sequence[RolloutGroup]
    ) -> tuple[TrainState, dict[str, float]]:
        """The state after all optimiser steps, and metrics; `state` is donated."""
        ...


Evaluate = Callable[[int, FlatParams], Mapping[str, float]]
"""Metrics of the weights after so many steps; none where they are not evaluated then."""
MetricsSource = Callable[[], Mapping[str, float]]
"""Gives the metrics of a part of the run for the last step."""


@runtime_checkable
class Resumable(Protocol):
    """A part of a run that a checkpoint holds besides the `TrainState`."""

    def get_state(self) -> Any:
        """What it must remember, as JSON values."""
        ...

    def set_state(self, state: Any) -> None:
        """Go on from what was remembered."""
        ...


@dataclasses.dataclass(frozen=True)
class RlRun:
    """What the loop works with; `train.run` puts it together."""

    steps: int
    rollouts: RolloutSource
    learner: RolloutLearner
    resumable: Mapping[str, Resumable]
    """By their names in a checkpoint."""
    metrics: Sequence[MetricsSource]
    saver: Saver
    report: StepReport
    rollout_log: RolloutLog | None
    """Writes rollouts, if they are to be written."""
    of_tokens: Callable[[], TokenValues | None] = lambda: None
    """What the last step made of every token, if that is kept."""
    evaluate: Evaluate | None = None
    """Evaluates in the midst of the run, if it is to be."""
    sight: Sight | None = None
    """Measures whether the policy sees, if it is to be."""
    older: Callable[[int], dict[str, FlatParams]] = lambda step: {}
    """Weights of earlier steps that a checkpoint of this step needs, see `TrainState.older`."""
    end: Callable[[], None] = lambda: None
    """Ends what goes on beside the loop."""

    def close(self) -> None:
        """End what goes on beside the loop, also after a failure."""
        self.end()

    def saved(self, step: int, state: TrainState) -> TrainState:
        """The state after so many steps, as a checkpoint holds it."""
        return dataclasses.replace(state, older=self.older(step))

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the `TrainState`."""
        return {name: part.get_state() for name, part in self.resumable.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. One of an earlier version may lack a part."""
        for name, part in self.resumable.items():
            if name in state:
                part.set_state(state[name])
