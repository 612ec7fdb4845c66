"""Questions that a run does not train on, put to its agent in three ways."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console

from paravt_jax.interfaces import Params
from paravt_jax.records import RolloutGroup, Row
from pipelines.loader import prompt_list
from rollout.agent import Item
from rollout.engine.engine import Engine
from rollout.limits import AgentConfig
from train.agent import AgentMaker
from train.data.questions import prompt_contents
from train.evaluation.intervals import Accuracy, accuracies, accuracies_of
from train.evaluation.settings import EvaluationSettings
from train.evaluation.tables import TABLE, as_metrics
from train.hosts.cluster import on_all_hosts, require_same
from train.hosts.interrupt import SIGNALS_OF_RUN
from train.hosts.share import by_share, own_places
from train.report.progress import ProgressBar
from train.rl.scoring import Scorer, rollout_metrics

MetricsByMode = dict[str, dict[str, float]]
"""Metrics of each way to put the questions to the agent."""

MODES = SAMPLED, GREEDY, NO_CROPS = "sampled", "greedy", "no crops"
"""Ways to put the questions to the agent."""
SEED = 20_260_520
"""The same random numbers before and after, and in every run."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Metrics of held-out questions: sampled as in training, greedy, and greedy without crops."""

    settings: EvaluationSettings
    rows: Sequence[Row]
    agents: AgentMaker
    scorer: Scorer
    max_bad_rows: float
    """Largest share of the rows whose videos may turn out to be unreadable."""
    strata: Callable[[], Mapping[str, str]]
    """What tells questions apart besides their types, by row id."""
    console: Console

    def __call__(self, params: Params) -> MetricsByMode:
        """Evaluate these weights."""
        engine, rules = self._engine, self.agents.rules
        with_tools, without = self._prompts(rules.offers_tools), self._prompts(tools=False)
        modes = {
            SAMPLED: (rules, with_tools),
            GREEDY: (greedy(rules), with_tools),
            NO_CROPS: (dataclasses.replace(greedy(rules), max_tool_rounds=0), without),
        }
        bar = ProgressBar(self.console, "evaluating", len(modes) * len(with_tools))
        with SIGNALS_OF_RUN.deferred("the next pause in the evaluation"), bar as ended:
            metrics: MetricsByMode = {}
            for mode, (agent_rules, prompts) in modes.items():
                agent = self.agents.agent(engine, agent_rules)
                agent.on_episode_end = ended
                groups: list[RolloutGroup] = []
                for start in range(0, len(prompts), self.settings.batch):
                    batch = prompts[start : start + self.settings.batch]
                    groups += self.scorer(agent.run(params, batch, 1, SEED))
                metrics[mode] = self._metrics(groups)
        return metrics

    @functools.cached_property
    def _engine(self) -> Engine:
        """Room for a batch of questions, one rollout each."""
        prompts = min(self.settings.batch, len(self.rows))
        budget = self.settings.frame_budget
        return self.agents.engine(self.agents.pools(self.rows, budget, prompts=prompts, copies=1))

    def _prompts(self, tools: bool) -> Sequence[Item]:
        budget, bad, agents = self.settings.frame_budget, self.max_bad_rows, self.agents
        count = len(own_places(len(self.rows)))
        with ProgressBar(self.console, "reading held-out videos", count) as made:
            prompts = on_all_hosts(
                lambda: prompt_list(
                    self.rows, agents.reader, agents.renderer, budget, tools, bad, made, by_share
                )
            )
        require_same(prompt_contents(prompts), "the held-out prompts")
        return prompts

    def _metrics(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Accuracies with their intervals, and how the tool was used."""
        metrics = rollout_metrics(groups)
        shown = {name: metrics[name] for name in TABLE if name in metrics}
        return as_metrics(accuracies(groups, self._strata)) | shown

    @property
    def names(self) -> list[str]:
        """The names of all metrics, MODE/NAME as in `by_name`, before anything is asked."""
        counted = {name for row in self.rows for name in accuracies_of(row, self._strata)}
        parts = as_metrics(dict.fromkeys(sorted(counted), Accuracy.of([0.0], 1)))
        names = [*parts, *(name for name in TABLE if not name.startswith("accuracy"))]
        return list(by_name({mode: dict.fromkeys(names, 0.0) for mode in MODES}))

    @functools.cached_property
    def _strata(self) -> Mapping[str, str]:
        return self.strata()


def by_name(by_mode: MetricsByMode) -> dict[str, float]:
    """The metrics of all modes, each as MODE/NAME."""
    return {
        f"{mode.replace(' ', '_')}/{name}": value
        for mode, metrics in by_mode.items()
        for name, value in metrics.items()
    }


def greedy(rules: AgentConfig) -> AgentConfig:
    """The same agent at temperature 0."""
    main, subagent = (
        dataclasses.replace(sampling, temperature=0.0)
        for sampling in (rules.sampling, rules.subagent_sampling)
    )
    return dataclasses.replace(rules, sampling=main, subagent_sampling=subagent)
