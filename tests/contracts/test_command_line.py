"""The command line is a public contract: its flags, its one-line errors, its exit codes."""

import sys

import pytest

from tests.support.command import ROOT, run, run_anew
from train import main

DOOR = [sys.executable, str(ROOT / "train" / "main.py")]
FLAGS = {
    "--help", "--recipe", "--mesh", "--rollout-mesh", "--rollout-devices", "--workdir", "--model",
    "--data", "--steps", "--seed", "--resume", "--set", "--dry-run", "--compile-only", "--programs",
    "--help-settings", "--list-recipes",
}  # fmt: skip


def test_flags_are_frozen():
    found = {s for action in main.make_parser()._actions for s in action.option_strings}
    assert found - {"-h"} == FLAGS


@pytest.mark.slow
def test_dry_run_from_a_foreign_directory(tmp_path):
    mesh = "data:2,fsdp:2,tensor:2"
    done = run_anew([*DOOR, "--dry-run", f"--mesh={mesh}"], tmp_path, devices=8)
    assert done.returncode == 0, done.stderr
    assert '"recipe": "needle_rl"' in done.stdout
    assert mesh in done.stdout
    assert "parameters" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run must not write anything"


BY_COMMAND = [
    (["--frobnicate"], 2, "--frobnicate"),
    (["--recipe", "needel_rl"], 2, "needle_rl"),
    (["--mesh", "pipeline:2"], 2, "pipeline"),
    (["--mesh", "data:3"], 2, "--mesh"),
    (["--model", "no/such/folder"], 2, "no/such/folder"),
    (["--resume", "must", "--workdir", "empty"], 1, "--workdir"),
]
IN_PROCESS = [
    (["--data", "no/such/data.csv"], 2, "no/such/data.csv"),
    (["--set", "optimizer.lr=1"], 2, "learning_rate"),
    (["--set", "rl.group_size=1"], 2, "rl.group_size"),
    (["--steps", "0"], 2, "--steps"),
    (["--seed", "-1"], 2, "--seed"),
    (["--recipe", "paravt_rl"], 2, "--model and --data"),
    (["--recipe", "needle_sft", "--data", "x.csv"], 2, "--data"),
    (["--set", "objective.clip_low=0.1"], 2, "objective.clip_low"),
    (["--set", "agent.sampling.temperature=0"], 2, "temperature"),
    (["--mesh", "data:-1", "--set", "rl.micro_groups=1", "--set", "rl.group_size=3"], 2, "--mesh"),
    (["--recipe", "needle_sft", "--compile-only", "v9:2x2"], 1, "v9:2x2"),
]


def names(cases):
    return [" ".join(arguments) for arguments, _, _ in cases]


def assert_one_line(errors: str, named: str):
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    assert named in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code", "named"), BY_COMMAND, ids=names(BY_COMMAND))
def test_bad_input_is_one_line_with_the_remedy(arguments, code, named, tmp_path):
    done = run([*DOOR, *arguments], tmp_path, devices=8)
    assert done.returncode == code, done.stderr
    assert_one_line(done.stderr, named)


@pytest.mark.parametrize(("arguments", "code", "named"), IN_PROCESS, ids=names(IN_PROCESS))
def test_bad_settings_are_refused_at_the_door(arguments, code, named, capsys):
    assert main.main(arguments) == code
    assert_one_line(capsys.readouterr().err, named)
