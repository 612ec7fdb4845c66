"""A run is heard of from the beginning, and a log does not fill with it."""

import dataclasses
import io
import itertools
import os
import subprocess
import sys
import threading
import time

import jax
import pytest
from rich.console import Console

from paravt_jax.mesh import make_mesh, parse_mesh
from tests.support.command import ROOT
from train import setup
from train.compile.cache import Compilations, keep_compiled, prune
from train.optimizer import OptimizerSettings
from train.recipes import get_recipe
from train.report import progress, steps
from train.report.log import RunLog
from train.report.progress import ProgressBar, SignsOfLife, introduction
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


def test_what_compiles_is_told_ever_more_rarely():
    told, asked, done = [], [], threading.Event()

    def what():
        asked.append(len(asked))
        if len(asked) > 12:
            done.set()
        return "" if len(asked) == 9 else f"compiling, {len(asked)}"

    with SignsOfLife(told.append, what, first=0.001):
        assert done.wait(10)
    assert told[:6] == [f"compiling, {n}" for n in (1, 2, 4, 8, 10, 11)]


def test_the_line_of_a_step_says_how_long_is_left(tmp_path, capsys):
    log = RunLog(tmp_path, steps=40)
    for step, seconds in enumerate((90.0, 10.0, 11.0, 12.0)):
        log.step(step, {"loss": 0.0, "time/step": seconds})
    log.step(39, {"loss": 0.0, "time/step": 10.0})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[0] and lines[3].endswith("s 12.0  left 7 min")
    assert "left" not in lines[4]


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
    door = [
        sys.executable,
        "-X",
        "importtime",
        str(ROOT / "train" / "main.py"),
        "--workdir",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(door, cwd=tmp_path, env=environment, **pipes) as run:
        assert run.stdout is not None
        lines = list(itertools.takewhile(lambda line: "importing" not in line, run.stdout))
        run.kill()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    assert run.returncode < 0 and imported and not imported & {"jax", "numpy", "transformers"}


PROGRAM = """
import sys
sys.path[0] = {root!r}
from pathlib import Path
import jax
from train.compile.cache import Compilations, keep_compiled, prune, prune
folder = Path({folder!r})
held = lambda: len(list(folder.glob("*-cache")))
print(held())
if not held():
    keep_compiled(str(folder))
    double = jax.jit(lambda x: x + x)
    double(1.0)
    prune(folder, 0)
    print(held())
    jax.clear_caches()
    double(1.0)
    print(held())
"""


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


def kept_program(folder, name, used, size):
    """A compiled program of some bytes, last used so many seconds ago."""
    path = folder / f"jit_{name}-{'0' * 64}-cache"
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - used, time.time() - 1000))
    return path


def test_a_folder_of_compiled_programs_is_cut_down_to_what_was_used_last(tmp_path):
    old, older, used = (
        kept_program(tmp_path, n, s, 400) for n, s in (("a", 500), ("b", 900), ("c", 1))
    )
    foreign = tmp_path / "my-cache"
    foreign.write_bytes(b"y" * 4000)
    prune(tmp_path, 1200)
    assert old.exists() and older.exists() and used.exists()
    prune(tmp_path, 1199)
    assert old.exists() and not older.exists() and used.exists()
    prune(tmp_path, 1)
    assert [path for path in tmp_path.iterdir()] == [foreign], "what JAX did not write stays"


def test_a_run_cuts_down_its_own_folder_only(no_cache, tmp_path):
    path = kept_program(tmp_path, "a", 1, 2000)
    assert keep_compiled(str(tmp_path), 0.0) and path.exists(), "0 keeps all"
    assert keep_compiled(str(tmp_path), 1e-6) and path.exists(), "named by JAX's own setting now"
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_compiled(str(tmp_path), 1e-6) and not path.exists()
    assert get_recipe("needle_rl").output.compile_cache_gb > 0


@pytest.mark.slow
def test_what_is_pruned_is_compiled_again_and_kept(no_cache, tmp_path):
    """By JAX itself: names of its files are those that `prune` knows."""
    code = PROGRAM.format(root=str(ROOT), folder=str(tmp_path))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for _ in range(2)
    ]
    (before, pruned, after), (kept, *_) = said
    assert before == "0" and pruned == "0" and int(after) > 0 and kept == after


@pytest.fixture
def compiling():
    found = Compilations()
    yield found
    jax.monitoring.unregister_scalar_listener(found._begin)
    jax.monitoring.unregister_event_duration_listener(found._end)


def test_what_is_being_compiled_is_known(compiling):
    seen = []

    def double(x):
        return x + x

    def note(event, value, **_):
        if event.endswith("backend_compile_duration"):
            seen.append(str(compiling))

    jax.monitoring.register_scalar_listener(note)
    assert str(compiling) == ""
    jax.jit(double)(3.0)
    jax.monitoring.unregister_scalar_listener(note)
    assert any("compiling" in text and "double" in text and "0 s" in text for text in seen)
    assert str(compiling) == ""


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
