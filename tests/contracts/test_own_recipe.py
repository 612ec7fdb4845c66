"""A recipe from a user's own file."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT, run
from train.recipes import check_name, get_recipe

MINE = '''
import dataclasses

from train.recipes import get_recipe


def short():
    """Two steps of the demo."""
    return dataclasses.replace(get_recipe("needle_rl"), steps=2)


def nothing():
    return None
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_it_says_what_differs_and_bears_its_own_name(file: Path):
    config = get_recipe(f"{file}:short")
    assert config == dataclasses.replace(
        get_recipe("needle_rl"), steps=2, recipe=f"{file.resolve()}:short"
    )


def test_what_is_no_recipe_is_refused(file: Path):
    with pytest.raises(ValueError, match="nothing returned NoneType, not a Config"):
        get_recipe(f"{file}:nothing")
    with pytest.raises(ValueError, match="has nothing called absent"):
        get_recipe(f"{file}:absent")
    with pytest.raises(ValueError, match=r"path/to/file\.py:name"):
        check_name("neddle_rl")


@pytest.mark.slow
def test_the_command_takes_it_from_another_folder(file: Path):
    command = [sys.executable, ROOT / "train/main.py", "--recipe", "mine.py:short", "--dry-run"]
    done = run(command, file.parent)
    assert done.returncode == 0, done.stderr
    text = done.stdout[done.stdout.index("{") :]
    config, _ = json.JSONDecoder().raw_decode(text)
    assert (config["recipe"], config["steps"]) == (f"{file.resolve()}:short", 2)
