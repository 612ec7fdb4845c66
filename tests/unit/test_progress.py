"""A run is heard of from the beginning, and a log does not fill with it."""

import dataclasses
import io
import os
import subprocess
import sys
import time

import jax
import pytest
from rich.console import Console

from paravt_jax.mesh import make_mesh, parse_mesh
from tests.support.command import ROOT
from train import setup
from train.compile.cache import keep_compiled
from train.optimizer import OptimizerSettings
from train.recipes import get_recipe
from train.report import progress, steps
from train.report.log import RunLog
from train.report.progress import ProgressBar, introduction
from train.report.steps import Clock, StepReport, learning_rates


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_instead_of_a_bar_come_ever_more_rarely(clock):
    said = io.StringIO()
    with ProgressBar(Console(file=said), "evaluating", 400) as bar:
        for _ in range(400):
            clock[0] += 1
            bar()
    lines = said.getvalue().splitlines()
    assert lines == [f"evaluating {n} of 400" for n in (10, 20, 40, 80, 160, 320)]


def test_short_work_is_not_worth_a_line(clock):
    said = io.StringIO()
    with ProgressBar(Console(file=said), "evaluating", 3) as bar:
        for _ in range(3):
            bar()
    assert said.getvalue() == ""


def test_a_terminal_gets_a_bar():
    said = io.StringIO()
    with ProgressBar(Console(file=said, force_terminal=True), "compiling rollouts", 57) as bar:
        for _ in range(12):
            bar()
    assert "compiling rollouts" in said.getvalue() and "12/57" in said.getvalue()


def test_other_hosts_are_silent(clock):
    said = io.StringIO()
    with ProgressBar(Console(file=said, quiet=True), "evaluating", 100) as bar:
        for _ in range(99):
            clock[0] += 60
            bar()
    assert said.getvalue() == ""


def introduced(config, workdir, mesh, compiled):
    weights, data = setup.weights_named(config), setup.data_named(config.data)
    return introduction(workdir, mesh, weights, data, compiled)


def test_the_introduction_names_what_is_used(tmp_path):
    mesh = make_mesh(parse_mesh("data:2,fsdp:4", 8))
    text = "\n".join(introduced(get_recipe("needle_rl"), tmp_path, mesh, "/kept"))
    for named in (str(tmp_path), "8 x cpu", "fsdp:4", "needle_sft", "needle_world", "/kept"):
        assert named in text
    own = get_recipe("paravt_sft")
    own = dataclasses.replace(own, data=dataclasses.replace(own.data, path="chats.jsonl"))
    assert "chats.jsonl" in "\n".join(introduced(own, tmp_path, mesh, None))


@pytest.mark.slow
def test_the_first_line_comes_before_the_imports(tmp_path):
    door = [sys.executable, str(ROOT / "train" / "main.py"), "--workdir", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    began = time.monotonic()
    with subprocess.Popen(door, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        line = run.stdout.readline().decode()
        seconds = time.monotonic() - began
        run.kill()
    assert "importing" in line and seconds < 3


@pytest.fixture
def no_cache():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_programs_are_kept_in_a_folder_that_is_named(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = keep_compiled(get_recipe("needle_rl").output.compile_cache)
    assert kept == str(tmp_path / ".cache" / "paravt_jax" / "compiled")
    assert jax.config.jax_compilation_cache_dir == kept
    assert keep_compiled("elsewhere") == kept, "what is set already comes first"


def test_nothing_is_kept_if_so_asked(no_cache):
    assert keep_compiled(None) is None and jax.config.jax_compilation_cache_dir is None


def test_rate_and_memory_are_those_of_the_last_update():
    settings = get_recipe("needle_rl").optimizer
    rates = learning_rates(settings, 40)
    assert (
        len(rates) == 40 and rates[0] == pytest.approx(3e-5) and rates[-1] == pytest.approx(1.5e-4)
    )
    log = KeptLog()
    report = StepReport(log, Clock(), settings, steps=20, updates=2)
    report(0, {"loss": 1.0, "grad_norm": 2.0}, tokens=8)
    (record,) = log.records
    assert record["optimizer/learning_rate"] == rates[1] and record["loss"] == 1.0
    assert record["tokens_per_second"] == 8 / record["time/step"]
    assert 0.05 < record["memory/process_peak"] < 64


def test_a_run_stops_where_its_numbers_end():
    log = KeptLog()
    report = StepReport(log, Clock(), OptimizerSettings(learning_rate=0.5), steps=9)
    with pytest.raises(ValueError, match=r"step 3: .* --set optimizer.learning_rate=0.25"):
        report(3, {"loss": 1.0, "grad_norm": float("nan")})
    assert len(log.records) == 1


def test_seconds_within_a_part_of_a_step_count_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(steps.time, "perf_counter", lambda: now[0])
    clock = Clock()
    with clock.time("time/rollout"):
        for _ in range(2):
            with clock.time("time/data"):
                now[0] += 3
            now[0] += 4
    now[0] += 1
    with clock.time("time/learn"):
        now[0] += 5
    parts = {"time/rollout": 8, "time/data": 6, "time/learn": 5}
    assert clock.metrics() == parts | {"time/step": 20, "data/wait": 0.3}
    clock.start()
    now[0] += 2
    assert clock.metrics() == {"time/step": 2, "data/wait": 0}


class KeptLog(RunLog):
    """Keeps what it is told."""

    def __init__(self):
        self.records = []

    def step(self, step, metrics):
        self.records.append(metrics)
