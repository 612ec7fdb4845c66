"""Whatever fails, a user reads one line: what, where, and how to see more."""

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from evaluate import main as evaluate_main
from models import convert
from paravt_jax.failures import ROOT, complain, explain
from paravt_jax.mesh import parse_mesh
from paravt_jax.plugins import load
from pipelines import describe
from train import main, run
from train.checks import memory_remedies
from train.recipes import get_recipe
from train.settings.override import override


def too_large():
    """A real refusal of the allocator: 8 petabytes."""
    jnp.zeros((1 << 51,), jnp.float32).block_until_ready()


def deep():
    deep()


FOREIGN = {
    "KeyError": lambda: {}["answer"],
    "ZeroDivisionError": lambda: 1 // 0,
    "RecursionError": deep,
    "JSONDecodeError": lambda: json.loads("{"),
    "ValueError": lambda: np.zeros(2) + np.zeros(3),
    "Error": lambda: next(csv.reader(['"a"b'], strict=True)),
    "StopIteration": lambda: next(iter(())),
    "jax": lambda: jnp.zeros(3).at[0].set(jnp.zeros(4)),
}


def failure(action) -> Exception:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


@pytest.mark.parametrize("action", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_ours_is_named_and_located(action):
    line = explain(failure(action))
    assert "\n" not in line and "PARAVT_TRACEBACK=1" in line
    assert "tests/unit/test_failures.py:" in line


def test_our_refusals_stand_as_they_are():
    error = failure(lambda: parse_mesh("data:3", 4))
    assert explain(error) == " ".join(str(error).split())
    missing = failure(Path("no/such/file").read_text)
    assert explain(missing) == str(missing)


def test_a_device_without_memory_says_which_settings_help():
    line = explain(failure(too_large), memory_remedies(get_recipe("needle_rl")))
    assert "out of memory" in line and "rl.micro_groups than 2" in line and "\n" not in line
    assert "model.remat=true" in line and "PARAVT_TRACEBACK=1" in line


def test_an_evaluation_out_of_memory_names_its_own_flags(monkeypatch, capsys):
    monkeypatch.setattr(evaluate_main, "evaluate", lambda _: too_large())
    assert evaluate_main.main(["--benchmarks", "videomme"]) == 1
    assert "out of memory" in (line := capsys.readouterr().err) and "lower --batch=16" in line


def test_what_fails_in_a_users_file_is_told_with_its_place(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(attempt):\n    return {}['accuracy']\n")
    line = explain(failure(lambda: load(f"{file}:reward")(None)))
    assert line.startswith("KeyError: 'accuracy'") and f"at {file}:2 in reward" in line


def test_remedies_are_those_that_are_not_taken():
    (line,) = memory_remedies(get_recipe("paravt_sft"))
    assert "sft.micro_rows" in line and "rl." not in line and "agent." not in line


def test_a_micro_batch_with_a_row_for_each_device_gets_no_smaller():
    config = override(get_recipe("paravt_rl"), ["rl.group_size=8", "rl.micro_groups=4"])
    told = {ways: memory_remedies(config, ways)[0] for ways in (1, 8, 32)}
    assert "rl.micro_groups than 4" in told[1] and "rl.micro_groups than 4" in told[8]
    assert "rl.micro_groups" not in told[32] and "--rollout-mesh" in told[32]


@pytest.mark.parametrize("action", [deep, too_large, FOREIGN["KeyError"]])
def test_no_run_ends_in_a_traceback(action, monkeypatch, capsys):
    monkeypatch.setattr(run, "train", lambda *_: action())
    monkeypatch.delenv("PARAVT_TRACEBACK", raising=False)
    assert main.main(["--workdir", "unused"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")


def test_a_traceback_can_be_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(run, "train", lambda *_: FOREIGN["KeyError"]())
    monkeypatch.setenv("PARAVT_TRACEBACK", "1")
    assert main.main(["--workdir", "unused"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: KeyError")


def test_an_interruption_at_any_time_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "resolve", interrupt)
    assert main.main([]) == 130
    assert capsys.readouterr().err.strip() == "error: interrupted"


@pytest.mark.parametrize("door", [describe, convert], ids=["describe", "convert"])
@pytest.mark.parametrize("action", [deep, FOREIGN["KeyError"], FOREIGN["jax"]])
def test_the_other_commands_end_in_one_line_too(door, action, monkeypatch, capsys):
    """Whatever fails within them, and wherever."""
    monkeypatch.setattr(describe, "report", lambda _: action())
    monkeypatch.setattr(convert, "from_hf", lambda *_: action())
    monkeypatch.delenv("PARAVT_TRACEBACK", raising=False)
    arguments = ["from-hf", "a", "b"] if door is convert else []
    assert door.main(arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(("error: ", "models/convert.py: ")) and "PARAVT_TRACEBACK=1" in line
    monkeypatch.setenv("PARAVT_TRACEBACK", "1")
    assert door.main(arguments) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_the_other_commands_are_interrupted_in_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "from_hf", interrupt)
    assert convert.main(["from-hf", "a", "b"]) == 130
    assert capsys.readouterr().err == "models/convert.py: interrupted\n"


def test_a_reader_who_has_seen_enough_is_no_failure():
    """As `head` is."""
    code = f"""
import sys
sys.path[0] = {str(ROOT)!r}
from paravt_jax.failures import attempt
sys.exit(attempt(lambda: [print("x" * 999) for _ in range(999)]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as talker:
        assert talker.stdout is not None and talker.stderr is not None
        talker.stdout.read(1)
        talker.stdout.close()
        assert talker.stderr.read() == b"" and talker.wait(timeout=60) == 1


def test_a_failed_run_says_how_to_go_on_with_what_it_saved(tmp_path, capsys):
    assert main._way_on(tmp_path, None) == ""
    (tmp_path / "config.json").touch()
    again = main._way_on(tmp_path, None)
    assert again == f"nothing was saved yet; --workdir {tmp_path} begins again"
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    way = main._way_on(tmp_path, None)
    complain(ValueError("the judge is gone"), way_on=way)
    complain(ValueError("continue with --workdir x"), way_on=way)
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: the judge is gone; what was saved goes on with --workdir {tmp_path}"
    assert second == "error: continue with --workdir x"


@pytest.mark.parametrize(
    ("steps", "write", "said"),
    [
        (0, lambda workdir: 1 / 0, ""),
        (1, lambda workdir: workdir / "report", "the page of the run: {}/report"),
        (1, lambda workdir: 1 / 0, "note: the page of the run could not be written: division"),
        (1, lambda workdir: time.sleep(60), "could not be written: took longer than 0.1 seconds"),
    ],
)
def test_a_failed_run_leaves_its_page_and_nothing_in_the_way(
    tmp_path, monkeypatch, capsys, steps, write, said
):
    monkeypatch.setattr(run, "PAGE_SECONDS", 0.1)
    monkeypatch.setattr(run, "write_page", write)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' * steps)
    failed = object.__new__(run.Run)
    failed.workdir, failed.config = tmp_path, get_recipe("needle_rl")
    failed.log = types.SimpleNamespace(console=Console(soft_wrap=True))
    began = time.monotonic()
    failed.leave_page()
    assert time.monotonic() - began < 30
    told = capsys.readouterr().out
    assert said.format(tmp_path) in told and bool(told) == bool(said)


def test_a_terminal_that_is_gone_does_not_hide_the_line(monkeypatch):
    """Which other hosts are told."""
    reading, writing = os.pipe()
    os.close(reading)
    nobody = os.fdopen(writing, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", nobody)
    assert complain("the disk is gone") == "error: the disk is gone"
    with contextlib.suppress(BrokenPipeError):
        nobody.close()
