"""A whole run: train, evaluate, export."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from evaluate.held_out import Mode, evaluate
from evaluate.intervals import accuracies
from models.common.adapter import ADAPTER, save_adapter
from paravt_jax.checkpoint import MODEL_FILES
from paravt_jax.params import abstract_params
from paravt_jax.records import RolloutGroup, Row
from pipelines.loader import PromptStream, prompt_list, prompt_stream
from pipelines.render import ChatRenderer
from pipelines.sizes import prompt_tokens
from pipelines.video import VideoReader
from rollout.agent import Agent, Item
from rollout.engine.engine import Engine
from rollout.limits import MAIN, subagent_budget
from train import setup
from train.agent import crop_tokens, open_agent, open_engine
from train.compile.cache import Compilations, Compiling, keep_compiled
from train.compile.prompts import agent_reads
from train.compile.rehearsal import rehearse_run
from train.config import Config, Stage, to_dict
from train.data.questions import (
    Questions,
    all_rows,
    identities,
    open_rows,
    prompt_contents,
    strata,
)
from train.hosts.cluster import everywhere, is_first, largest, require_same
from train.hosts.interrupt import SIGNALS_OF_RUN
from train.methods.difficulty import hint_room
from train.methods.teacher import TaughtLearner
from train.optimizer import make_optimizer
from train.report.log import INTERVALS, TABLE, RunLog, comparison_table, flat, interval_table
from train.report.progress import Bar, introduction
from train.report.steps import Clock, StepReport
from train.rl.learner import Learner
from train.rl.loop import RlRun, reinforce
from train.rl.scoring import Scorer, rollout_metrics
from train.rl.subagents import possible_rows
from train.sft.batches import PackedLessons, TaskLessons
from train.sft.conversations import open_conversations, packed_lessons, system_note
from train.sft.loop import School, cold_start
from train.sft.masking import TaskMasking
from train.state import (
    FlatParams,
    TrainState,
    abstract_state,
    is_trainable,
    make_state,
)
from train.workdir.checkpoints import Checkpoints, check_resume
from train.workdir.claim import Claim, write_whole
from train.workdir.config_file import (
    FILE,
    check_same_run,
    differences,
    read_config,
    younger_settings,
)
from train.workdir.evaluations import Evaluation, fingerprint, read_before, write_figures
from train.workdir.saving import Saver

EVALUATION_SEED = 20_260_520
"""The same random numbers before and after, and in every run."""


def name_workdir(config: Config, given: str | None) -> Path:
    """Where the run writes: `--workdir`, or a new folder below `runs/`.

    Raises:
      ValueError: several hosts, which could not agree on a name.
    """
    if given is None and jax.process_count() > 1:
        raise ValueError("--workdir is needed on several hosts: name one folder that all can see")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    recipe = config.recipe.rpartition(":")[2]  # of a recipe from a file, its function
    return Path(given or f"runs/{recipe}-{stamp}").absolute()


def train(config: Config, workdir: Path, resume: str) -> None:
    """Run the stage of the configuration and leave everything in `workdir`.

    Raises:
      ValueError: unreadable data or a resume that does not fit the workdir.
    """
    tell = functools.partial(print, flush=True) if is_first() else lambda line: None
    everywhere(lambda: tell_changes(config, workdir, resume, tell))
    SIGNALS_OF_RUN.agree_by(lambda number: largest([number])[0])
    SIGNALS_OF_RUN.details = Compiling().__str__
    mesh = setup.open_mesh(config)
    output = config.output
    compiled = keep_compiled(output.compile_cache, output.compile_cache_gb)
    weights, data = setup.weights_named(config), setup.data_named(config.data)
    for line in introduction(workdir, mesh, weights, data, compiled):
        tell(line)
    with jax.set_mesh(mesh):
        run = Run(config, workdir, mesh)
        try:
            (run.reinforce if config.stage is Stage.RL else run.cold_start)()
        except BaseException:
            run.close(failed=True)
            raise
        run.close()


def tell_changes(config: Config, workdir: Path, resume: str, tell: Callable[[str], None]) -> None:
    """Name what differs from the run that the workdir holds. Nothing is written yet.

    Raises:
      ValueError: the run cannot go on like that.
    """
    resumes, before = check_resume(workdir / "checkpoints", resume), read_config(workdir)
    if before is None:
        return
    if resumes:
        changes = check_same_run(before, config, workdir)
        younger = younger_settings(workdir, before)
        if younger:
            tell(f"{workdir} is older than these settings, which take their defaults: {younger}")
    else:
        changes = differences(before, config)
        tell(f"{workdir} holds a run without a checkpoint: it begins anew")
    for key, (old, new) in changes.items():
        tell(f"{workdir}: {key} was {old!r} and is {new!r} from now on")


class Run:
    """The parts of a run that both stages share, and the order in which they are used."""

    def __init__(self, config: Config, workdir: Path, mesh: Mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self._evaluation_of = ""
        self.model = setup.Model.open(config)
        self.scorer = Scorer(config.rewards)
        self.renderer: ChatRenderer = self.model.renderer(config)
        self.reader: VideoReader = setup.open_reader(config, self.renderer.spec)
        self.rows, self.held_out = ([], []) if config.packs_conversations else self._questions()
        # All hosts have agreed on the questions; from here on there is something to write.
        self.claim = everywhere(lambda: Claim(workdir) if is_first() else None)
        self.optimizer = make_optimizer(
            config.optimizer, config.optimizer_steps, self.model.policy.table
        )
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            config.output.keep_checkpoints,
            self.model.policy.table,
        )
        start = self.model.params(config, mesh)
        self.state, self.first_step, self.data_state = self._first_state(start)
        self.reference = {name: start[name] for name in self.state.trainable}
        self._prepare_workdir()
        self.checkpoints.rehearse(self.state)
        self.saver = Saver(
            self.checkpoints, config.output, SIGNALS_OF_RUN, self.claim, self.first_step
        )
        self.log = RunLog(workdir, config.steps, self.first_step, silent=not is_first())

    @property
    def _positions(self) -> int:
        """How long a stream of the model may be."""
        return self.model.policy.context_length

    def _questions(self) -> tuple[Questions, list[Row]]:
        """Questions to train on and held-out ones; the first process tells what is missing."""
        tell = print if is_first() else lambda line: None
        check = setup.question_check(self.config, self.renderer, self._positions)
        data, evaluation = self.config.data, self.config.evaluation
        rows, held_out = everywhere(lambda: open_rows(data, evaluation, tell, check))
        require_same(identities(itertools.chain(all_rows(rows), held_out)), "the questions")
        return rows, held_out

    def _first_state(self, start: FlatParams) -> tuple[TrainState, int, Any]:
        """The last checkpoint of the workdir, or a new state; its step and data position.

        Raises:
          ValueError: the checkpoint is beyond the last step asked for.
        """
        config, mesh = self.config, self.mesh
        latest = self.checkpoints.latest
        if latest is None:
            # A step donates its state; what trains stays as it was, as the reference.
            fresh = {n: x.copy() if is_trainable(n, config) else x for n, x in start.items()}
            return make_state(fresh, config, mesh, self.optimizer), 0, None
        if latest > config.steps:
            raise ValueError(
                f"--steps {config.steps}: {self.workdir} is already at step {latest}; ask for more"
            )
        params = abstract_params(self.model.policy.table, mesh)
        like = abstract_state(params, config, mesh, self.optimizer)
        return self.checkpoints.restore(like, print if is_first() else lambda line: None)

    def _prepare_workdir(self) -> None:
        """`config.json` of the run, and the model folder without weights for conversion."""
        if not is_first():
            return
        write_whole(self.workdir / FILE, json.dumps(to_dict(self.config), indent=2) + "\n")
        spec, folder = self.renderer.spec, self.workdir / MODEL_FILES
        setup.describe_checkpoints(self.model, self.config, spec, folder)

    def reinforce(self) -> None:
        """The `rl` stage, with the same evaluation before and after."""
        config = self.config
        before = self._evaluate_before({**self.state.frozen, **self.reference})
        engine = self._training_engine()
        learner, prompts = self._learner(engine), self._prompts()
        run = self._rl_run(engine, learner, prompts)
        if self.data_state is not None:
            run.set_state(self.data_state)
        if config.rl.warm_up:
            rows, hints = all_rows(self.rows), hint_room(config.difficulty, self.renderer)
            reads = agent_reads(config, self.renderer, rows, config.data.frame_budgets, hints)
            self.state = rehearse_run(engine, learner, reads, self.state, self.log.console)
        with self.saver.guard():
            self.state = reinforce(run, self.state, self.first_step)
            self.saver.finish(config.steps, self.state, run.get_state())
        prompts.close()
        self._finish(before)

    def _rl_run(self, engine: Engine, learner: Learner, prompts: PromptStream) -> RlRun:
        """What the loop works with."""
        config, renderer, reader = self.config, self.renderer, self.reader
        report = StepReport(
            self.log, Clock(), config.optimizer, config.steps, updates=config.rl.updates
        )
        rollouts, resumable, metrics = setup.open_rollouts(
            config, prompts, self.agent(engine), self.scorer, renderer, reader, report
        )
        compilations, taught = Compilations(), config.teacher.strength > 0
        tools = config.agent.offers_tools
        return RlRun(
            steps=config.steps,
            rollouts=rollouts,
            learner=TaughtLearner(learner, config.teacher, renderer, tools) if taught else learner,
            resumable=resumable,
            metrics=[*metrics, lambda: compilations.figures, reader.take_figures],
            saver=self.saver,
            report=report,
            rollouts_folder=self.workdir / "rollouts" if config.output.rollouts else None,
        )

    def _learner(self, engine: Engine) -> Learner:
        config, renderer, main = self.config, self.renderer, engine.pools[MAIN]
        shapes = setup.batch_shapes(
            config,
            renderer.spec,
            renderer.pad_id,
            longest=main.prompt_tokens + main.suffix,
            subagent_longest=self._subagent_length(),
        )
        return setup.open_learner(
            config,
            self.model.policy,
            self.optimizer,
            self.mesh,
            self.model.tags(config, renderer),
            shapes,
            self.reference,
            table=engine.automata.table if engine.automata.constrains else None,
        )

    def cold_start(self) -> None:
        """The `sft` stage, evaluated at its end."""
        packs = self.config.packs_conversations
        school = School(
            settings=self.config.sft,
            lessons=self._packed_lessons() if packs else self._task_lessons(),
            policy=self.model.policy,
            optimizer=self.optimizer,
            router_balance=self.config.model.router_balance,
            mesh=self.mesh,
            steps=self.config.steps,
            saver=self.saver,
            report=StepReport(self.log, Clock(), self.config.optimizer, self.config.steps),
        )
        with self.saver.guard():
            self.state, position = cold_start(school, self.state, self.first_step, self.data_state)
            self.saver.finish(self.config.steps, self.state, position)
        self._finish({})

    def _task_lessons(self) -> TaskLessons:
        """Tasks of the needle world."""
        sources = setup.needle_sources(self.config, self.renderer, self.reader)
        return TaskLessons(self.config.sft, sources, self.renderer.pad_id, self._masking())

    def _packed_lessons(self) -> PackedLessons:
        """Conversations of `--data`, from where the last checkpoint left them."""
        found = open_conversations(self.config, self.renderer)
        for line in [*found.report(), *system_note(self.config, found.rows)]:
            self.log.console.print(line)
        lessons = packed_lessons(
            self.config, found.rows, self.renderer, self.reader, self._positions
        )
        if self.data_state is not None:
            lessons.stream.set_state(self.data_state)
        return lessons

    def _masking(self) -> TaskMasking | None:
        """What hides tokens from supervised rows, if the run asks for it."""
        sft = self.config.sft
        if not sft.task_masks:
            return None
        tags = self.model.tags(self.config, self.renderer)
        return TaskMasking(sft.task_masks, self.config.seed, tags, sft.mask_predictor)

    def _subagent_length(self) -> int:
        """Most tokens of a sub-agent's stream; says for which shapes the learner compiles."""
        config = self.config
        if not config.rl.trains_subagents:
            return 0
        own = subagent_budget(config.agent, self.renderer)
        length = crop_tokens(config, self.renderer) + own
        calls = config.agent.rounds * config.agent.calls_run
        rows = possible_rows(calls, config.rl.group_size)
        self.log.console.print(f"learner: sub-agents of {length} tokens, {rows} rows per prompt")
        return length

    def _prompts(self) -> PromptStream:
        config = self.config
        return prompt_stream(
            self.rows,
            self.reader,
            self.renderer,
            config.data.frame_budgets,
            config.rl.prompts_per_step,
            config.seed,
            workers=config.data.workers,
            tools=config.agent.offers_tools,
            max_bad_rows=config.data.max_bad_rows,
        )

    def _training_engine(self) -> Engine:
        """Room for the rollouts of one step."""
        rows, frames = all_rows(self.rows), max(self.config.data.frame_budgets)
        hints = hint_room(self.config.difficulty, self.renderer)
        return self._engine(
            rows, frames, self.config.rl.prompts_per_step, self.config.rl.group_size, hints
        )

    @functools.cached_property
    def _evaluation_engine(self) -> Engine:
        """Room for a batch of held-out questions, one rollout each."""
        settings = self.config.evaluation
        prompts = min(settings.batch, len(self.held_out))
        return self._engine(self.held_out, settings.frame_budget, prompts, 1)

    def _engine(
        self, rows: Iterable[Row], frames: int, prompts: int, copies: int, hints: int = 0
    ) -> Engine:
        """An engine for any of the questions, with so many tokens of hints; says what its cache
        takes before it is allocated."""
        seen = self.config.data.overview_tokens
        longest = prompt_tokens(self.renderer, rows, frames, seen) + hints
        engine = open_engine(
            self.config,
            self.model.policy,
            self.renderer,
            prompts=prompts,
            copies=copies,
            prompt_tokens=longest,
        )
        size = engine.cache_bytes() / 2**20
        self.log.console.print(f"engine: {prompts} prompts x {copies}, cache {size:,.0f} MiB")
        return engine

    def agent(self, engine: Engine, temperature: float | None = None, crops: bool = True) -> Agent:
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
        return open_agent(self.config, engine, self.renderer, self.reader, agent)

    def _evaluate_before(self, params: FlatParams) -> Evaluation:
        """The figures that the run begins from; a resumed run reads them where they are kept."""
        if not self.held_out:
            return {}
        of = self._evaluation_of = fingerprint(self.config, self.held_out, params)
        before = read_before(self.workdir, of)
        if before is None:
            before = self.evaluate(params)
            write_figures(self.workdir, of, before)
        return before

    def evaluate(self, params: FlatParams) -> Evaluation:
        """Held-out figures: sampled as in training, greedy, and greedy without crops."""
        if not self.held_out:
            return {}
        engine, batch = self._evaluation_engine, self.config.evaluation.batch
        with_tools = self._items(tools=self.config.agent.offers_tools)
        without = self._items(tools=False)
        agents = {
            "sampled": (self.agent(engine), with_tools),
            "greedy": (self.agent(engine, 0.0), with_tools),
            "no crops": (self.agent(engine, 0.0, crops=False), without),
        }
        bar = Bar(self.log.console, "evaluating", 3 * len(with_tools))
        with SIGNALS_OF_RUN.deferred("the next pause in the evaluation"), bar as ended:
            modes = [
                Mode(name, self._runner(agent, ended), items)
                for name, (agent, items) in agents.items()
            ]
            return evaluate(params, modes, self._figures, batch=batch, seed=EVALUATION_SEED)

    def _items(self, tools: bool) -> Sequence[Item]:
        budget = self.config.evaluation.frame_budget
        bad = self.config.data.max_bad_rows
        with Bar(self.log.console, "reading held-out videos", len(self.held_out)) as made:
            items = everywhere(
                lambda: prompt_list(
                    self.held_out, self.reader, self.renderer, budget, tools, bad, made
                )
            )
        require_same(prompt_contents(items), "the held-out prompts")
        return items

    def _runner(self, agent: Agent, ended: Callable[[], object]):
        agent.on_episode_end = ended

        def run(params: FlatParams, items: Sequence[Item], seed: int) -> list[RolloutGroup]:
            return self.scorer(agent.run(params, items, 1, seed))

        return run

    def _figures(self, groups: Sequence[RolloutGroup]) -> dict[str, float]:
        """Accuracies with their intervals, and how the tool was used."""
        figures = rollout_metrics(groups)
        shown = {name: figures[name] for name in TABLE if name in figures}
        return flat(accuracies(groups, self._strata)) | shown

    @functools.cached_property
    def _strata(self) -> dict[str, str]:
        """What the table tells apart besides types of questions."""
        return strata(self.config.data, self.config.evaluation.split)

    def _finish(self, before: Evaluation) -> None:
        """Evaluation, table and export."""
        after = self.evaluate(self.state.params)
        if after:
            self._report(before, after)
        if self.config.output.export_hf:
            self._export()
        if self.claim is not None:
            self.claim.check()
        self.log.console.print(f"everything is in {self.workdir}")

    def close(self, failed: bool = False) -> None:
        """Finish what is being written and let others write into the workdir; if the run failed,
        why is told already."""
        writing = SIGNALS_OF_RUN.deferred("the checkpoint that is being written")
        with writing, contextlib.suppress(*[OSError] * failed):
            self.checkpoints.close()
        self.log.close()
        if self.claim is not None:
            self.claim.release()

    def _export(self) -> None:
        """`hf/`, and for a LoRA run, whose `hf/` is merged, `adapter/` for peft."""
        policy, params, base = self.model.policy, self.state.params, self.workdir / MODEL_FILES
        policy.save_folder(policy.merge(params), self.workdir / "hf", base=base)
        if policy.lora.rank:
            folder, origin = self.workdir / ADAPTER, self.model.base.absolute()
            save_adapter(params, policy.table, policy.lora, folder, origin)

    def _report(self, before: Evaluation, after: Evaluation) -> None:
        """The table, on the console and as `evaluation.json`."""
        rows = {}
        for mode, figures in after.items():
            if mode in before:
                rows[f"{mode}, before"] = before[mode]
            rows[f"{mode}, after"] = figures
        own = self.config.evaluation
        test = own.split == "test" and not self.config.data.path
        part = "test" if test else "held-out"
        title = f"{len(self.held_out)} {part} questions, K={own.frame_budget}"
        self.log.console.print(comparison_table(title, rows))
        self.log.console.print(interval_table(INTERVALS, rows))
        write_figures(self.workdir, self._evaluation_of, before, after)
