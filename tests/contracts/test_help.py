"""`--help-settings` explains every setting, and `--list-recipes` every recipe, fast."""

import subprocess
import sys
from pathlib import Path

import pytest

from train import main
from train.config import Config
from train.recipes import RECIPES, get_recipe
from train.settings.help import entries, help_settings
from train.workdir.config_file import flat_settings

ROOT = Path(__file__).resolve().parents[2]


def said(capsys, *arguments: str) -> str:
    assert main.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_every_setting_is_explained():
    config = get_recipe("needle_rl")
    explained = {entry.name: entry.text for entry in entries(config)}
    assert set(flat_settings(config)) <= set(explained)
    assert not [name for name, text in explained.items() if len(text) < 8]
    assert explained == {entry.name: entry.text for entry in entries(Config)}


def test_defaults_are_those_of_the_classes_or_of_a_recipe(capsys):
    plain = said(capsys, "--help-settings", "rl.mini")
    assert plain.startswith("rl.minibatches=1 (int")
    own = said(capsys, "--help-settings", "rl.mini", "--recipe", "needle_longvt")
    assert own.startswith("rl.minibatches=2 (int")
    assert own.splitlines()[1:] == plain.splitlines()[1:]


def test_lines_keep_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = said(capsys, "--help-settings")
    names = {entry.name for entry in entries(Config)}
    assert max(map(len, text.splitlines())) <= 80
    assert all(any(line.startswith(name) for line in text.splitlines()) for name in names)


@pytest.mark.parametrize(
    "title",
    [
        "optimizer.learning_rate=2e-06 (float, above 0)",
        "data.frame_budgets=4,8,16,32,64 (int,..., at least 1)",
        "optimizer.clip_norm=1 (float, above 0, or none)",
        "model.train_vision=false (true or false)",
        "model.folder=none (text, or none)",
        r"agent.think_prefix='<think>\n' (text)",
        "stage (sft or rl)",
        "needs=none (in a recipe only)",
        "sft.phases=none (in a recipe only)",
        "teacher.judge.max_tokens=512 (int",
    ],
)
def test_types_and_ranges(title, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert title in help_settings(Config)


def test_a_prefix_that_no_setting_has_is_refused(capsys):
    assert main.main(["--help-settings", "optimiser"]) == 2
    assert "optimizer" in capsys.readouterr().err
    assert main.main(["--help-settings", "--recipe", "mine"]) == 2
    assert "needle_rl" in capsys.readouterr().err


def test_recipes_are_listed_without_importing_jax():
    program = (
        "import sys; sys.path.insert(0, 'train'); import main; main.main(['--list-recipes']); "
        "assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in RECIPES)


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} train/main.py --help-settings | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("recipe") and not done.stderr
