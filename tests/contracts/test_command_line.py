"""The command line is a public contract: its flags, its one-line errors, its exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOOR = ROOT / "train" / "main.py"
FLAGS = {
    "--help", "--recipe", "--mesh", "--workdir", "--model", "--data", "--steps", "--seed",
    "--resume", "--set", "--dry-run", "--compile-only",
}  # fmt: skip


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(DOOR), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_flags_are_frozen():
    sys.path.insert(0, str(ROOT))
    from train.main import make_parser

    found = {s for action in make_parser()._actions for s in action.option_strings}
    assert found - {"-h"} == FLAGS


def test_dry_run_from_a_foreign_directory(tmp_path):
    done = command("--dry-run", "--mesh=data:2,fsdp:2,tensor:2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"recipe": "needle_rl"' in done.stdout
    assert "data:2,fsdp:2,tensor:2" in done.stdout
    assert "parameters" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run must not write anything"


ERRORS = [
    (["--frobnicate"], 2, "--frobnicate"),
    (["--recipe", "needel_rl"], 2, "needle_rl"),
    (["--mesh", "pipeline:2"], 2, "pipeline"),
    (["--mesh", "data:3"], 2, "--mesh"),
    (["--model", "no/such/folder"], 2, "no/such/folder"),
    (["--data", "no/such/data.csv"], 2, "no/such/data.csv"),
    (["--set", "optimizer.lr=1"], 2, "learning_rate"),
    (["--set", "rl.group_size=1"], 2, "rl.group_size"),
    (["--steps", "0"], 2, "--steps"),
    (["--resume", "must", "--workdir", "empty"], 1, "--workdir"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "named"), ERRORS, ids=[" ".join(e[0]) for e in ERRORS]
)
def test_bad_input_is_one_line_with_the_remedy(arguments, code, named, tmp_path):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert named in lines[0]
