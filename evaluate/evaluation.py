"""A whole evaluation: what is asked, what has been answered, and the report when all has been."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from evaluate.benchmarks import report, results, schemas
from evaluate.benchmarks.protocol import OWN, Protocol, Rules
from evaluate.benchmarks.sample import OK, Kind, Sample, SampleResult
from evaluate.model import Opened
from evaluate.needle import NEEDLE_TASKS, load_needle
from evaluate.runner import Questions, SampleRunner, Waits
from paravt_jax.estimates import estimate
from paravt_jax.failures import ROOT
from paravt_jax.rewards.judge import Judge
from train.data.settings import DataSettings
from train.report.progress import ProgressBar
from train.workdir.files import write_atomically

SETTINGS = "evaluation.json"
"""What an evaluation is of; a folder holds one. Training runs have a file of this name, without a
protocol."""
PROTOCOL = "protocol"


@dataclasses.dataclass(frozen=True)
class Task:
    """The samples of a benchmark and the rules for each kind of them."""

    name: str
    loaded: schemas.Loaded
    rules: Mapping[Kind, Rules]


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation asks."""

    protocol: Protocol
    mode: str
    tasks: tuple[Task, ...]
    limit: int | None
    guarded: int = 0
    """Questions of each kind of a task of which it is measured whether the model sees."""
    judge: str = ""
    """Name of the model that judges; empty without one, or where no question needs one."""

    @property
    def samples(self) -> list[Sample]:
        """All samples, in the order of the tasks and rows."""
        return [sample for task in self.tasks for sample in task.loaded.samples]

    def judged_by(self, judge: str) -> EvaluationPlan:
        """The same with a judge of this name, if the protocol has anything judged."""
        rules = (rules for task in self.tasks for rules in task.rules.values())
        judged = any(each.scoring.judge for each in rules)
        return dataclasses.replace(self, judge=judge if judged else "")


def open_asked(
    protocol: Protocol,
    names: Sequence[str],
    mode: str,
    root: str,
    limit: int | None,
    needle: DataSettings,
    frames: int | None = None,
) -> EvaluationPlan:
    """Read the rows of all benchmarks.

    Args:
      names: of tasks, or files of one's own.
      root: folder of the local copies.
      limit: most rows of each.
      needle: which needle world.
      frames: how many are shown, instead of the protocol's.

    Raises:
      ValueError: a task that nobody knows, or none of whose rows can be used.
    """
    mode, tasks = mode or protocol.modes[0], []
    _check_twice([_task_name(name) for name in names])
    for name in names:
        is_file = name.endswith(schemas.ENDINGS)
        ruled = OWN if is_file else schemas.ALIASES.get(name, name)
        for kind in Kind:  # before rows are looked for: is there such a task and mode?
            protocol.rules(ruled, kind, mode)
        needles = ruled in NEEDLE_TASKS
        loaded = load_needle(ruled, needle) if needles else schemas.load(name, root)
        loaded = dataclasses.replace(loaded, samples=loaded.samples[:limit])
        if not loaded.samples:
            why = f"; the first fault: {loaded.faults[0]}" if loaded.faults else ""
            raise ValueError(f"--benchmarks {name}: no row can be used{why}")
        task, kinds = _task_name(name), dict.fromkeys(sample.kind for sample in loaded.samples)
        rules = {kind: _shown(protocol.rules(ruled, kind, mode), task, frames) for kind in kinds}
        tasks.append(Task(task, loaded, rules))
    if frames:
        protocol = dataclasses.replace(protocol, name=f"{protocol.name}+{frames}frames")
    return EvaluationPlan(protocol, mode, tuple(tasks), limit)


def _task_name(name: str) -> str:
    """Of a benchmark or a file in the report."""
    is_file = name.endswith(schemas.ENDINGS)
    return Path(name).stem if is_file else schemas.ALIASES.get(name, name)


def _check_twice(tasks: Sequence[str]) -> None:
    twice = next((task for task in tasks if tasks.count(task) > 1), None)
    if twice:
        raise ValueError(
            f"--benchmarks: {twice} twice; a report has one task of a name, rename a file, or name "
            "each once"
        )


def _shown(rules: Rules, task: str, frames: int | None) -> Rules:
    """The rules under the task's own name, perhaps with another number of frames."""
    video = dataclasses.replace(rules.video, frames=frames) if frames else rules.video
    return dataclasses.replace(rules, task=task, video=video)


class Evaluation:
    """An evaluation in a folder, or the part of it that one process does."""

    def __init__(
        self, plan: EvaluationPlan, model: Opened, workdir: Path, shard: tuple[int, int] = (1, 1)
    ):
        """`shard`: number from 1, and count; shard i answers samples i, i + count, ..."""
        self._plan, self._model, self._workdir, self._shard = plan, model, workdir, shard
        self.waits = Waits()
        workdir.mkdir(parents=True, exist_ok=True)
        config = model.config
        settings = settings_of(plan, config.model.folder or "", config.recipe)
        write_atomically(workdir / SETTINGS, json.dumps(settings, indent=2) + "\n")

    def answered(self) -> dict[tuple[str, str], SampleResult]:
        """What all processes have written so far; of a sample that ended in an error and was asked
        again, the answer."""
        planned = {(sample.task, sample.sample_id) for sample in self._plan.samples}
        files = sorted(self._workdir.glob("samples*.jsonl"))
        lines = [result for file in files for result in results.read(file)]
        lines.sort(key=lambda result: result.status == OK)
        written = {(r.task, r.sample_id): r for r in lines}
        return {key: result for key, result in written.items() if key in planned}

    def run(self, batch: int, judge: Judge | None, console: Console, again: bool = False) -> None:
        """Answer all samples of this shard that nobody has answered.

        Args:
          batch: samples under way at a time.
          again: ask those, too, that ended in an error.
        """
        number, count = self._shard
        done, samples = self.answered(), self._plan.samples[number - 1 :: count]
        if again:
            done = {key: result for key, result in done.items() if result.status == OK}
        missing = {(s.task, s.sample_id) for s in samples} - set(done)
        ours = [done[s.task, s.sample_id] for s in samples if (s.task, s.sample_id) in done]
        with ProgressBar(console, "evaluating", len(samples), len(ours)) as bar:
            for questions in self._kinds():
                key = questions.rules.task
                chosen = [s for s in questions.samples if (s.task, s.sample_id) in missing]
                if not chosen:
                    continue
                runner = SampleRunner(self._model, questions, batch, judge, self._plan.guarded)
                for came in runner(chosen):
                    result = dataclasses.replace(came, commit=self._commit)
                    results.append(self._workdir / self._file, [result])
                    ours.append(result)
                    bar(running(key, [r for r in ours if r.task == result.task]))
                self.waits.total += runner.waits.total
                self.waits.idle += runner.waits.idle

    def _kinds(self) -> Iterator[Questions]:
        for task in self._plan.tasks:
            for kind, rules in task.rules.items():
                yield Questions(rules, tuple(s for s in task.loaded.samples if s.kind == kind))

    @property
    def _file(self) -> str:
        number, count = self._shard
        return results.SAMPLES if count == 1 else f"samples-{number}-of-{count}.jsonl"

    @functools.cached_property
    def _commit(self) -> str:
        return commit()

    def report(self) -> tuple[report.Json | None, int]:
        """The report, once every sample has been answered, and how many have not."""
        done = self.answered()
        every = [(s.task, s.sample_id) for s in self._plan.samples]
        missing = sum(key not in done for key in every)
        if missing:
            return None, missing
        if self._shard[1] > 1:
            lines = "".join(results.line(done[key]) for key in every)
            write_atomically(self._workdir / results.SAMPLES, lines)
        runs = {task.name: _task_run(task, done) for task in self._plan.tasks}
        spec = self._model.agents.renderer.spec
        about = report.About(
            self._plan.protocol,
            self._plan.mode,
            self._model.name,
            # Of all that answered: a run may go on after a change of the code.
            ", ".join(dict.fromkeys(done[key].commit or self._commit for key in every)),
            self._plan.judge,
            getattr(spec, "marks", ""),
            self._plan.limit,
        )
        made = report.make(about, runs)
        report.write(self._workdir, made, runs)
        return made, 0

    def usage(self) -> dict[str, str]:
        """Of each task what its answers took."""
        done = self.answered()
        return {
            task.name: report.usage_line(_task_run(task, done).results) for task in self._plan.tasks
        }


def _task_run(task: Task, done: Mapping[tuple[str, str], SampleResult]) -> report.TaskRun:
    samples = task.loaded.samples
    answers = [done[sample.task, sample.sample_id] for sample in samples]
    return report.TaskRun(task.rules, samples, answers, task.loaded.faults)


def running(task: str, answers: Sequence[SampleResult]) -> str:
    """The figure so far, with its interval."""
    scored = [r for r in answers if r.score is not None]
    errors = sum(r.score is None for r in answers)
    note = f", {errors} errors" if errors else ""
    if not scored:
        return f"{task}{note}"
    mean = estimate([r.score or 0.0 for r in scored], [r.cluster for r in scored])
    return f"{task} {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}){note}"


def settings_of(plan: EvaluationPlan, folder: str, recipe: str) -> dict[str, object]:
    """What decides an evaluation's figures; `folder` is the model's."""
    return {
        "model": folder,
        "weights": _fingerprint(Path(folder)),
        "recipe": recipe,
        PROTOCOL: plan.protocol.name,
        "protocol_fingerprint": report.fingerprint(plan.protocol),
        "mode": plan.mode,
        "sight": plan.guarded,
        "judge": plan.judge,
        "rows": {task.name: len(task.loaded.samples) for task in plan.tasks},
        "rows_fingerprint": _fingerprint_of_rows(plan.samples),
        "limit": plan.limit,
    }


def _fingerprint_of_rows(samples: Sequence[Sample]) -> str:
    """Tells questions and truths from those that stood in the same files before."""
    value = 0
    for s in samples:
        fields = (s.task, s.sample_id, s.kind, s.question, s.options, s.gold)
        value = zlib.crc32(repr(fields).encode(), value)
    return f"{value:08x}"


def _fingerprint(folder: Path) -> str:
    """Tells weights of one folder from those that were there before, by the ends of their files."""
    value = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - (1 << 20), 0))
            value = zlib.crc32(file.read(), value)
    return f"{value:08x}"


def check_workdir(workdir: Path, plan: EvaluationPlan, folder: str, recipe: str) -> None:
    """Before weights are loaded: is this the folder of this evaluation, or of none?

    Raises:
      ValueError: it holds another one.
    """
    path, settings = workdir / SETTINGS, settings_of(plan, folder, recipe)
    if not path.exists():
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    if PROTOCOL not in stored:
        raise ValueError(f"{workdir} is the folder of a training run; choose another --workdir")
    differ = [  # what an earlier version did not write is not compared
        f"{name}={stored[name]!r}, not {value!r}"
        for name, value in settings.items()
        if stored.get(name, value) != value
    ]
    if differ:
        raise ValueError(
            f"{workdir} holds an evaluation with {'; '.join(differ)}: choose another --workdir"
        )


def commit() -> str:
    """Of this project, with `+` where files differ from it; empty without git."""
    command = [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=7",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
