"""Functions of users are found by name, in this process and in the next one."""

import subprocess
import sys
from pathlib import Path

import pytest

from paravt_jax.advantages import rollout_advantages
from paravt_jax.plugins import is_reference, load, named, reference

ROOT = Path(__file__).resolve().parents[2]
MINE = """
import dataclasses
from beside import FACTOR

@dataclasses.dataclass
class Terms:
    scale: "float" = FACTOR

def brevity(text):
    return Terms().scale / len(text)

brevity.again = lambda text: 0.0
"""


@pytest.fixture
def mine(tmp_path) -> str:
    (tmp_path / "beside.py").write_text("FACTOR = 3.0\n")
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def test_a_file_is_loaded_once_and_named_by_its_path(mine, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    brevity = load(f"{mine}:brevity")
    assert brevity("abc") == 1.0
    assert reference(brevity) == f"{mine}:brevity" and load(reference(brevity)) is brevity
    assert load(f"{mine}:Terms").__module__ == brevity.__module__
    monkeypatch.chdir(Path(mine).parent)
    assert load("mine.py:brevity") is brevity
    assert sys.path[-1] == str(Path(mine).parent), "behind ours"


def test_modules_of_packages_keep_their_name():
    name = "paravt_jax.advantages:rollout_advantages"
    assert reference(rollout_advantages) == name and load(name) is rollout_advantages


def test_another_process_finds_it_by_the_same_text(mine):
    name = f"{mine}:brevity"
    asked = f"from paravt_jax.plugins import load; print(load({name!r})('ab'))"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1.5"


def test_what_has_no_name_of_its_own_is_refused(mine):
    def inner():
        pass

    for thing in (inner, lambda: None, load(f"{mine}:brevity").again, 3, load(f"{mine}:Terms")()):
        with pytest.raises(ValueError, match="define it at the top of a module"):
            reference(thing)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mine.py", "path/to/file.py:name"),
        ("{folder}/none.py:brevity", "none.py: no such file"),
        ("{folder}/mine.py:longer", "has nothing called longer"),
        ("{folder}/broken.py:x", r"broken.py:2: ZeroDivisionError"),
        ("{folder}/unfinished.py:x", r"unfinished.py: SyntaxError.*line 1"),
        ("no_such_package.rewards:x", "no_such_package"),
    ],
)
def test_mistakes_are_named(mine, text, said):
    folder = Path(mine).parent
    (folder / "broken.py").write_text("x = 1\nx / 0\n")
    (folder / "unfinished.py").write_text("def x(\n")
    with pytest.raises(ValueError, match=said):
        load(text.format(folder=folder))


def test_references_are_told_from_names():
    assert is_reference("mine.py:zoom") and is_reference("a.b:c")
    assert not is_reference("crop_video") and not is_reference(":x") and not is_reference("a:b c")


def test_a_setting_keeps_our_choices_and_names_what_is_the_users(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("def reward(attempt):\n    return {}\n\n\nnameless = lambda: 1\n")
    monkeypatch.chdir(tmp_path)
    kept = named("mine.py:reward", "rewards.scheme")
    assert kept == f"{file.resolve()}:reward"
    monkeypatch.chdir("/")
    assert named(load(kept), "rewards.scheme") == kept
    assert named("clip", "objective.surrogate") == "clip"
    for text in ("nowhere.py:reward", f"{file}:", f"{file}:absent", f"{file}:nameless"):
        with pytest.raises(ValueError, match=r"^rewards\.scheme="):
            named(text, "rewards.scheme")
