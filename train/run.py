"""A whole run: evaluate, train, evaluate, export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.common.adapter import ADAPTER, save_adapter
from paravt_jax.checkpoint import MODEL_FILES
from paravt_jax.deadlines import within_seconds
from paravt_jax.mesh import on_device, on_host
from paravt_jax.params import abstract_params
from paravt_jax.records import Row
from pipelines.loader import PromptStream
from rollout.engine.engine import Engine
from train import checks, setup
from train.agent import AgentMaker
from train.compile.cache import Compilations, keep_compiled
from train.compile.footprint import prepared_sets
from train.compile.input_sizes import agent_input_sizes
from train.compile.layout import open_layout
from train.compile.rehearsal import rehearse_run
from train.config import Config, Stage
from train.data.questions import Questions, all_rows, identities, open_rows, strata
from train.evaluation.before_after import BeforeAfter
from train.evaluation.held_out import HeldOut
from train.evaluation.mid_run import MidRun
from train.hosts.cluster import is_first, max_over_hosts, on_all_hosts, require_same
from train.hosts.interrupt import SIGNALS_OF_RUN
from train.methods.teacher import TaughtLearner
from train.optimizer import make_optimizer
from train.report.log import METRICS, RunLog
from train.report.page.write import write_page
from train.report.progress import SignsOfLife, introduction
from train.report.steps import Clock, StepReport
from train.rl.learner import Learner
from train.rl.loop import MetricsSource, Resumable, RlRun, RolloutSource, reinforce
from train.rl.scoring import Scorer
from train.rl.staleness import RolloutsAhead, Stop
from train.rl.versions import Schedule, Versions
from train.sft.batches import SftData
from train.sft.loop import SftRun, supervise
from train.state import FlatParams, TrainState, abstract_state, make_state, trainable_names
from train.step import SftStep
from train.workdir.checkpoints import Checkpoints
from train.workdir.config_file import FILE, as_file, evaluated_settings
from train.workdir.files import write_atomically
from train.workdir.lock import WorkdirLock
from train.workdir.mirror import Mirror
from train.workdir.retention import Retention
from train.workdir.saving import Saver


def name_workdir(config: Config, workdir: str | None) -> Path:
    """Where the run writes: `--workdir`, or a new folder below `runs/`.

    Raises:
      ValueError: several hosts, which could not agree on a name.
    """
    if workdir is None and jax.process_count() > 1:
        raise ValueError("--workdir is needed on several hosts: name one folder that all can see")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    recipe = config.recipe.rpartition(":")[2]  # of a recipe from a file, its function
    return Path(workdir or f"runs/{recipe}-{stamp}").absolute()


PAGE_SECONDS = 15.0
"""Most for the page of a run that has failed or was told to end: who sends SIGTERM waits half a
minute, of which a checkpoint may have taken some."""


def train(config: Config, workdir: Path, resume: str, mirror: Mirror | None = None) -> None:
    """Run the stage of the configuration and leave everything in `workdir`, or in the bucket that
    it stands for.

    Raises:
      ValueError: unreadable data or a resume that does not fit the workdir.
    """
    if mirror is None:
        return _train(config, workdir, resume)
    if jax.process_count() > 1:
        mirror.share()
    with contextlib.ExitStack() as stack:
        on_all_hosts(lambda: stack.enter_context(mirror.claimed()) if is_first() else None)
        _train(config, workdir, resume, mirror)


def _train(config: Config, workdir: Path, resume: str, mirror: Mirror | None = None) -> None:
    shown, checkpoints = first_prints, None
    if mirror is not None:
        shown = lambda line: first_prints(mirror.named(line))  # noqa: E731
        checkpoints = mirror.checkpoints
    on_all_hosts(lambda: checks.tell_changes(config, workdir, resume, shown, checkpoints))
    SIGNALS_OF_RUN.sync_by(lambda number: max_over_hosts([number])[0])
    compilations = Compilations()
    SIGNALS_OF_RUN.details = compilations.__str__
    mesh, output = setup.open_mesh(config), config.output
    compiled = keep_compiled(output.compile_cache, output.compile_cache_gb)
    weights, data = setup.weights_named(config), setup.data_named(config.data)
    for line in introduction(mirror.url if mirror else workdir, mesh, weights, data, compiled):
        first_prints(line)
    with SignsOfLife(first_prints, compilations.__str__), jax.set_mesh(mesh):
        run = Run(config, workdir, mesh, compilations, mirror)
        for note in checks.whole_notes(run.parts.policy, mesh):
            first_prints(f"note: {note}")
        try:
            (run.reinforce if config.stage is Stage.RL else run.supervise)()
        except BaseException:
            run.leave_page()
            run.close(failed=True)
            raise
        run.close()


def first_prints(line: str) -> None:
    """Print a line on the first host."""
    if is_first():
        print(line, flush=True)


class Run:
    """The parts of a run that both stages share, and the order in which they are used."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        mesh: Mesh,
        compilations: Compilations,
        mirror: Mirror | None = None,
    ):
        self._place = mirror.url if mirror else workdir
        self.config, self.workdir = config, workdir
        self.mesh, self.compilations = mesh, compilations
        self.parts, self.scorer = setup.Parts(config), Scorer(config.rewards)
        self.rows, self.held_out, self.conversations = [], [], None
        # Either is read before weights are, for it may be refused.
        if config.packs_conversations:
            self.conversations = on_all_hosts(self.parts.conversations)
        else:
            self.rows, self.held_out = self._questions()
        # All hosts have agreed on the questions; from here on there is something to write.
        self.lock = on_all_hosts(lambda: WorkdirLock(workdir) if is_first() else None)
        self.optimizer = make_optimizer(
            config.optimizer, config.optimizer_steps, self.parts.policy.table
        )
        self.checkpoints = self._open_checkpoints(mirror)
        start = self.parts.params(mesh)
        restored, self.first_step, self.data_state = self._first_state(start)
        # The weights of earlier steps belong to the rollouts: see `_ahead`.
        self.state, self.older = dataclasses.replace(restored, older={}), restored.older
        self.reference = {name: start[name] for name in self.state.trainable}
        if config.rl.reference_memory == "host":
            self.reference = on_host(self.reference)
        self._prepare_workdir()
        older = {str(age): self.state.trainable for age in range(1, config.rl.staleness + 1)}
        self.checkpoints.precompile(dataclasses.replace(self.state, older=older))
        self.log = RunLog(workdir, config.steps, self.first_step, silent=not is_first())
        updates = config.optimizer_steps // config.steps
        self.report = StepReport(self.log, Clock(), config.optimizer, config.steps, updates)
        self.agents = self._open_agents((self.state, self.reference, older))
        self.evaluation, self.mid_run = self._evaluations()
        figure = (self.mid_run.figure,) if self.mid_run else ()
        self.saver = Saver(
            self.checkpoints, config.output, SIGNALS_OF_RUN, self.lock, self.first_step, *figure
        )

    def _questions(self) -> tuple[Questions, list[Row]]:
        """Questions to train on and held-out ones; the first process tells what is missing."""
        data, evaluation, check = self.config.data, self.config.evaluation, self.parts.check
        rows, held_out = on_all_hosts(lambda: open_rows(data, evaluation, first_prints, check))
        require_same(identities(itertools.chain(all_rows(rows), held_out)), "the questions")
        return rows, held_out

    def _open_checkpoints(self, mirror: Mirror | None) -> Checkpoints:
        """The checkpoints of the workdir, or of the bucket that it stands for."""
        folder = mirror.checkpoints if mirror else self.workdir / "checkpoints"
        output, sender = self.config.output, mirror if is_first() else None
        keep = Retention(output.keep_checkpoints, output.keep_minutes, output.keep_best)
        return Checkpoints(folder, keep, self.parts.policy.table, self.config.rl.staleness, sender)

    def _first_state(self, start: FlatParams) -> tuple[TrainState, int, Any]:
        """The last checkpoint of the workdir, or a new state; its step and data position.

        Raises:
          ValueError: the checkpoint is beyond the last step asked for.
        """
        config, mesh, taught = self.config, self.mesh, self.config.teacher.strength > 0
        trained = trainable_names(self.parts.policy.table, config.model)
        latest = self.checkpoints.latest
        if latest is None:
            # A step donates its state; what trains stays as it was, as the reference.
            fresh = {name: x.copy() if name in trained else x for name, x in start.items()}
            return make_state(fresh, trained, mesh, self.optimizer, taught), 0, None
        if latest > config.steps:
            raise ValueError(
                f"--steps {config.steps}: {self.workdir} is already at step {latest}; ask for more"
            )
        params = abstract_params(self.parts.policy.table, mesh)
        like = abstract_state(params, trained, mesh, self.optimizer, taught)
        return self.checkpoints.restore(like, first_prints)

    def _prepare_workdir(self) -> None:
        """`config.json` of the run, and the model folder without weights for conversion."""
        if is_first():
            write_atomically(self.workdir / FILE, as_file(self.config))
        if is_first() or self._place != self.workdir:  # of a bucket each host has its own folder
            self.parts.describe_checkpoints(self.workdir / MODEL_FILES)

    def _open_agents(self, copies: Any) -> AgentMaker:
        """Opens agents, and engines beside all copies of the weights that the learner keeps."""
        config, policy, tell = self.config, self.parts.policy, self.log.console.print
        mesh, dtype = config.rollout_mesh, config.model.compute_dtype
        apart = setup.open_rollout_devices(config)
        sets = prepared_sets(config.rl.staleness)
        layout = open_layout(policy, self.mesh, mesh, dtype, copies, apart, sets)
        return dataclasses.replace(self.parts.agents, layout=layout, tell=tell)

    def _evaluations(self) -> tuple[BeforeAfter | None, MidRun | None]:
        """Evaluation on held-out questions: before and after the run, and in its midst."""
        settings, data, console = self.config.evaluation, self.config.data, self.log.console
        if not self.held_out:
            return None, None
        by_events, bad = functools.partial(strata, data, settings.split), data.max_bad_rows
        ask = HeldOut(settings, self.held_out, self.agents, self.scorer, bad, by_events, console)
        part = "test" if settings.split == "test" and not data.path else "held-out"
        title = f"{len(self.held_out)} {part} questions, K={settings.frame_budget}"
        both = BeforeAfter(ask, evaluated_settings(self.config), self.workdir, title, console)
        if not settings.every:
            return both, None
        return both, MidRun(ask, settings, self.workdir, self._write_folder)

    def reinforce(self) -> None:
        """The `rl` stage, with the same evaluation before and after."""
        config = self.config
        if self.evaluation is not None:
            self.evaluation.before({**self.state.frozen, **on_device(self.reference)})
        engine = self.agents.engine(
            self.parts.pools(all_rows(self.rows)), routing=config.rl.routing_replay
        )
        learner, prompts = self._learner(engine), self.parts.prompts(self.rows)
        run = self._rl_run(engine, learner, prompts)
        if self.data_state is not None:
            run.set_state(self.data_state)
        if config.rl.warm_up:
            parts, console = self.parts, self.log.console
            sizes = agent_input_sizes(
                config.agent, config.data, parts.renderer, all_rows(self.rows), parts.hints
            )
            self.state = rehearse_run(engine, learner, sizes, self.state, console)
        with contextlib.closing(run), self.saver.guard():
            self.state = reinforce(run, self.state, self.first_step)
            last = run.saved(config.steps, self.state)
            self.saver.finish(config.steps, last, run.get_state())
        prompts.close()
        self._finish()

    def _learner(self, engine: Engine) -> Learner:
        """Learns from what the engine rolls out."""
        table = engine.automata.table if engine.automata.constrains else None
        if table is not None and engine.mesh is not None:
            table = jax.device_put(table, NamedSharding(self.mesh, PartitionSpec()))
        return setup.open_learner(
            self.config,
            self.parts.policy,
            self.optimizer,
            self.mesh,
            self.parts.tags,
            setup.engine_shapes(self.config, self.agents, engine),
            self.reference,
            table=table,
        )

    def _rl_run(self, engine: Engine, learner: Learner, prompts: PromptStream) -> RlRun:
        """What the RL loop works with; with a teacher where the configuration asks for one."""
        config, stop, beside = self.config, Stop(), {}
        self.compilations.metrics()  # what was compiled so far belongs to no step
        clock = Clock() if config.rl.staleness else self.report.clock
        rl = config.rl
        schedule = Schedule(rl.staleness, rl.in_flight_updates, rl.in_flight_calls)
        # On several hosts one thread alone may use the learner's devices: what it prepares is drawn
        # from by the other.
        prepare = (engine.prepare_ahead,) if jax.process_count() > 1 else ()
        versions = Versions(schedule, stop.check_here, *prepare)
        newest = versions if rl.in_flight_updates else None
        agent = self.agents.agent(engine, before_step=stop.check, newest=newest)
        rollouts, resumable, metrics = setup.open_rollouts(
            config, prompts, self.agents, agent, self.scorer, self.log.console, clock
        )
        metrics.append(engine.metrics)
        if config.rl.staleness:
            ahead = self._ahead(rollouts, resumable, metrics, versions, clock, stop)
            rollouts, resumable, metrics = ahead, ahead.resumable, [ahead.metrics]
            beside = {"older": ahead.older, "end": ahead.close}
        taught, renderer, tools = None, self.agents.renderer, config.agent.offers_tools
        if config.teacher.strength:
            taught = TaughtLearner(learner, config.teacher, renderer, tools)
        return RlRun(
            steps=config.steps,
            rollouts=rollouts,
            learner=taught or learner,
            resumable={**resumable, "learner": learner},
            metrics=[*metrics, self.compilations.metrics, self.saver.metrics],
            saver=self.saver,
            report=self.report,
            rollout_log=setup.open_rollout_log(config, self.parts, self.workdir),
            of_tokens=lambda: learner.of_tokens,
            evaluate=self.mid_run,
            sight=setup.open_sight(config, learner.batches, self.parts.policy, self.mesh),
            **beside,
        )

    def _ahead(
        self,
        source: RolloutSource,
        parts: dict[str, Resumable],
        metrics: list[MetricsSource],
        versions: Versions,
        clock: Clock,
        stop: Stop,
    ) -> RolloutsAhead:
        """Draws from a source while the learner learns, from where the last checkpoint left it."""
        ahead = RolloutsAhead(
            source,
            parts,
            metrics,
            steps=self.config.steps,
            versions=versions,
            trained=set(self.state.trainable),
            mesh=self.mesh,
            clock=clock,
            stop=stop,
        )
        ahead.go_on(self.first_step, self.older)
        self.older = {}
        if self.mid_run is not None:
            # Two engines at once would need the memory of both.
            self.mid_run.before = ahead.idle
        return ahead

    def supervise(self) -> None:
        """The `sft` stage, evaluated at its end."""
        config, data = self.config, self._sft_data()
        update = SftStep(
            policy=self.parts.policy,
            optimizer=self.optimizer,
            micro_rows=config.sft.micro_rows,
            budgets=data.budgets,
            router_balance=config.model.router_balance,
        )
        shared = self.saver, self.report, self.mid_run
        run = SftRun(data, update, self.mesh, config.steps, *shared)
        with self.saver.guard():
            self.state, position = supervise(run, self.state, self.first_step, self.data_state)
            self.saver.finish(config.steps, self.state, position)
        self._finish()

    def _sft_data(self) -> SftData:
        """Tasks of the needle world, or conversations of `--data` from where the last checkpoint
        left them."""
        if self.conversations is None:
            return self.parts.task_data()
        data, notes = self.parts.packed_data(self.conversations)
        for line in notes:
            self.log.console.print(line)
        if self.data_state is not None:
            data.stream.set_state(self.data_state)
        return data

    def _finish(self) -> None:
        """Evaluation, table and export."""
        if self.evaluation is not None:
            last, metrics = self.mid_run.last if self.mid_run else (-1, {})
            final = metrics if last == self.config.steps else None
            self.evaluation.after(self.state.params, final)
        if self.config.output.export_hf:
            self._export()
        if self.lock is not None:
            self.lock.check()
        self._write_page()
        self.log.console.print(f"everything is in {self._place}")

    def _export(self) -> None:
        """`hf/`, and for a LoRA run, whose `hf/` is merged, `adapter/` for peft."""
        policy, params = self.parts.policy, self.state.params
        self._write_folder(params, self.workdir / "hf")
        if policy.lora.rank:
            folder, origin = self.workdir / ADAPTER, self.parts.base.absolute()
            save_adapter(params, policy.table, policy.lora, folder, origin)

    def _write_page(self, within: float = threading.TIMEOUT_MAX) -> None:
        """`report/`. What is learned is safe by now: a page that fails costs the page alone."""
        if not self.config.output.report or not is_first():
            return
        try:
            page = within_seconds(lambda: write_page(self.workdir), within)
        except Exception as error:
            self.log.console.print(f"note: the page of the run could not be written: {error}")
            return
        self.log.console.print(f"the page of the run: {page}", soft_wrap=True)

    def leave_page(self) -> None:
        """The page of a run that has failed or was told to end, if it has finished a step. Nothing
        here keeps what ended it from being told, for long or at all."""
        with contextlib.suppress(Exception), SIGNALS_OF_RUN.deferred("the page of the run"):
            if (self.workdir / METRICS).exists() and (self.workdir / METRICS).stat().st_size:
                self._write_page(PAGE_SECONDS)

    def _write_folder(self, params: FlatParams, folder: Path) -> None:
        """Weights as a model folder, adapters merged."""
        policy = self.parts.policy
        policy.save_folder(policy.merge(params), folder, base=self.workdir / MODEL_FILES)

    def close(self, failed: bool = False) -> None:
        """Finish what is being written and let others write into the workdir; if the run failed,
        why is told already."""
        writing = SIGNALS_OF_RUN.deferred("the checkpoint that is being written")
        with writing, contextlib.suppress(*[OSError] * failed):
            self.checkpoints.close()
        self.log.close()
        if self.lock is not None:
            self.lock.release()
