"""A whole run: check, describe, train, evaluate, export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from evaluate.held_out import Item, Mode, evaluate
from models.qwen3_vl import read_config, save_folder
from paravt_jax.mesh import AXES
from paravt_jax.params import format_table
from paravt_jax.records import RolloutGroup
from pipelines.loader import PromptStream, prompt_list, prompt_stream
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from rollout.agent import Agent
from rollout.engine import Engine
from train import setup
from train.checkpoint import Checkpoints, check_resume
from train.cluster import is_first
from train.cold_start import Lessons, cold_start
from train.config import Config, Stage, to_dict
from train.learner import Learner
from train.loop import Parts, reinforce
from train.output import TABLE, RunLog, comparison_table
from train.scoring import accuracy_by_type, rollout_metrics, score_groups
from train.state import FlatParams, make_optimizer, make_state

Evaluation = dict[str, dict[str, float]]
"""Figures of each evaluation mode."""

EVALUATION_SEED = 20_260_520
"""The same random numbers before and after, and in every run."""


def check(config: Config) -> None:
    """Refuse what cannot run on this machine, before anything is allocated.

    Raises:
      ValueError: mesh, model folder or data path that does not fit.
    """
    setup.open_mesh(config)
    if config.model.folder:
        read_config(config.model.folder)
    if config.data.path and not Path(config.data.path).exists():
        raise ValueError(f"--data {config.data.path}: no such file or folder; check the path")


def describe(config: Config) -> None:
    """Print the resolved configuration, the mesh and the parameter table; allocate nothing."""
    print(json.dumps(to_dict(config), indent=2))
    mesh = setup.open_mesh(config)
    print("mesh " + ",".join(f"{axis}:{mesh.shape[axis]}" for axis in AXES))
    print(format_table(setup.abstract_policy(config).table, mesh))


def train(config: Config, workdir: Path, resume: str) -> None:
    """Run the stage of the configuration and leave everything in `workdir`.

    Raises:
      ValueError: unreadable data or a resume that does not fit the workdir.
    """
    if check_resume(workdir / "checkpoints", resume):
        check_same_run(config, workdir / "config.json")
    mesh = setup.open_mesh(config)
    with jax.set_mesh(mesh):
        run = Run(config, workdir, mesh)
        (run.reinforce if config.stage is Stage.RL else run.cold_start)()


MAY_CHANGE = ("steps", "mesh", "output", "evaluation")
"""Settings that a resumed run may give anew."""


def check_same_run(config: Config, path: Path) -> None:
    """Refuse to continue a run under another configuration than it began with.

    Raises:
      ValueError: naming the first setting that differs.
    """
    if not path.exists():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(to_dict(config)))
    for key in now:
        if key not in MAY_CHANGE and before.get(key) != now[key]:
            raise ValueError(
                f"{path.parent} holds a run with {key}={before.get(key)!r}, not {now[key]!r}; "
                "choose another --workdir, or give the settings that it began with"
            )


class Run:
    """The parts of a run that both stages share, and the order in which they are used."""

    def __init__(self, config: Config, workdir: Path, mesh: Mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.model = setup.Model.open(config)
        self.renderer: ChatRenderer = self.model.renderer(config)
        self.reader: VideoReader = setup.open_reader(config, self.renderer.spec)
        self.rows, self.held_out = setup.open_rows(config)
        self.optimizer = make_optimizer(config.optimizer, config.steps, self.model.policy.table)
        self.start = self.model.params(config, mesh)
        state = make_state(self.start, config, mesh, self.optimizer)
        self._prepare_workdir()
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", config.output.checkpoint_every, config.output.keep_checkpoints
        )
        self.state, self.first_step, self.data_state = state, 0, None
        if self.checkpoints.latest is not None:
            self.state, self.first_step, self.data_state = self.checkpoints.restore(state)
        self.log = RunLog(workdir, config.steps, self.first_step, silent=not is_first())
        self.engine = Engine(
            self.model.policy, eos_ids=self.renderer.eos_ids, pad_id=self.renderer.pad_id
        )

    def _prepare_workdir(self) -> None:
        """`config.json` of the run, and the model folder without weights for conversion."""
        if not is_first():
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(to_dict(self.config), indent=2)
        (self.workdir / "config.json").write_text(text + "\n", encoding="utf-8")
        setup.copy_base(self.model.base, self.workdir / "model")

    def reinforce(self) -> None:
        """The `rl` stage, with the same evaluation before and after."""
        config = self.config
        before = self.evaluate(self.start)
        stream = self._prompts()
        learner = Learner(
            self.model.policy,
            self.optimizer,
            config,
            self.mesh,
            self.model.tags(self.renderer),
            self.renderer.pad_id,
        )
        parts = Parts(
            config=config,
            prompts=stream,
            agent=self.agent(),
            learner=learner,
            # The step donates its state, so the reference needs buffers of its own.
            reference=jax.tree.map(lambda x: x.copy(), self.start),
            checkpoints=self.checkpoints,
            log=self.log,
            workdir=self.workdir,
        )
        self.state = reinforce(parts, self.state, self.first_step)
        position = stream.get_state()
        stream.close()
        self._finish(before, position)

    def cold_start(self) -> None:
        """The `sft` stage, evaluated at its end."""
        lessons = Lessons(
            config=self.config,
            sources=setup.needle_sources(self.config, self.renderer, self.reader),
            policy=self.model.policy,
            optimizer=self.optimizer,
            mesh=self.mesh,
            pad_id=self.renderer.pad_id,
            checkpoints=self.checkpoints,
            log=self.log,
        )
        self.state = cold_start(lessons, self.state, self.first_step)
        self._finish({}, None)

    def _prompts(self) -> PromptStream:
        config = self.config
        stream = prompt_stream(
            self.rows,
            self.reader,
            self.renderer,
            config.data.frame_budgets,
            config.rl.prompts_per_step,
            config.seed,
        )
        if self.data_state is not None:
            stream.set_state(self.data_state)
        return stream

    def agent(self, temperature: float | None = None, crops: bool = True) -> Agent:
        """The agent of the configuration; other temperature, or forbidden to crop, on request."""
        agent = self.config.agent
        if temperature is not None:
            agent = dataclasses.replace(
                agent,
                sampling=dataclasses.replace(agent.sampling, temperature=temperature),
                subagent_sampling=dataclasses.replace(
                    agent.subagent_sampling, temperature=temperature
                ),
            )
        if not crops:
            agent = dataclasses.replace(agent, max_tool_rounds=0)
        return Agent(self.engine, self.renderer, self.reader, config=agent)

    def evaluate(self, params: FlatParams) -> Evaluation:
        """Held-out figures: sampled as in training, greedy, and greedy without crops."""
        if not self.held_out:
            return {}
        with_tools = self._items(tools=True)
        modes = [
            Mode("sampled", self._runner(self.agent()), with_tools),
            Mode("greedy", self._runner(self.agent(0.0)), with_tools),
            Mode("no crops", self._runner(self.agent(0.0, crops=False)), self._items(tools=False)),
        ]
        return evaluate(
            params, modes, _figures, batch=self.config.evaluation.batch, seed=EVALUATION_SEED
        )

    def _items(self, tools: bool) -> Sequence[Item]:
        budget = self.config.evaluation.frame_budget
        return prompt_list(self.held_out, self.reader, self.renderer, budget, tools)

    def _runner(self, agent: Agent):
        def run(params: FlatParams, items: Sequence[Item], seed: int) -> list[RolloutGroup]:
            return score_groups(agent.run(params, items, 1, seed), self.config.rewards)

        return run

    def _finish(self, before: Evaluation, data_state: Any) -> None:
        """Last checkpoint, evaluation, table and export."""
        self.checkpoints.save(self.config.steps, self.state, data_state)
        after = self.evaluate(self.state.params)
        if after:
            self._report(before, after)
        if self.config.output.export_hf:
            save_folder(
                self.state.params,
                self.model.policy.config,
                self.workdir / "hf",
                base=self.model.base,
            )
        self.log.console.print(f"everything is in {self.workdir}")
        self.checkpoints.close()
        self.log.close()

    def _report(self, before: Evaluation, after: Evaluation) -> None:
        """The table, on the console and as `evaluation.json`."""
        rows = {}
        for mode, figures in after.items():
            if mode in before:
                rows[f"{mode}, before"] = before[mode]
            rows[f"{mode}, after"] = figures
        title = f"{len(self.held_out)} held-out videos, K={self.config.evaluation.frame_budget}"
        self.log.console.print(comparison_table(title, rows))
        if is_first():
            summary = json.dumps({"before": before, "after": after}, indent=2)
            (self.workdir / "evaluation.json").write_text(summary + "\n", encoding="utf-8")


def _figures(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    figures = rollout_metrics(groups)
    shown = {name: figures[name] for name in TABLE if name in figures}
    return {"accuracy": figures["reward/accuracy"], **accuracy_by_type(groups), **shown}
