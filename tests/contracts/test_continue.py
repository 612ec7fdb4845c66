"""`--workdir X` continues X: from its own settings, and what differs is named or refused."""

import dataclasses
import json
import os
import sys

import pytest

from evaluate.model import LEARNING, settings_of
from paravt_jax.marks import Mark
from paravt_jax.settings import marked
from tests.support.command import ROOT
from train import checks, main
from train.config import Config
from train.recipes import RECIPES, get_recipe
from train.settings.override import override
from train.workdir.config_file import as_file, check_same_run, evaluated_settings, read_settings
from train.workdir.files import write_atomically


def resolve(*arguments):
    return main.resolve(main.make_parser().parse_args(list(map(str, arguments))))


def hold(workdir, config, step=None):
    """A workdir with the configuration of a run, and perhaps a checkpoint."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", as_file(config))
    if step is not None:
        (workdir / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_comes_back_from_its_file(name, tmp_path):
    hold(tmp_path, get_recipe(name))
    assert read_settings(tmp_path, Config) == get_recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_an_evaluation_reads_every_run_without_what_only_learning_takes(name, tmp_path):
    hold(tmp_path, get_recipe(name))
    found = read_settings(tmp_path, Config, LEARNING)
    assert found is not None and found.agent == get_recipe(name).agent


def test_a_run_is_evaluated_without_the_file_of_its_reward(tmp_path):
    mine, workdir = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text((ROOT / "examples/brevity.py").read_text())
    own = [f"rewards.scheme={mine}:brief", "objective.anchor=sequence"]
    hold(workdir, override(get_recipe("needle_rl"), own))
    (workdir / "hf").mkdir()
    (workdir / "hf" / "config.json").write_text("{}")
    mine.unlink()
    with pytest.raises(ValueError, match=r"mine\.py: no such file"):
        read_settings(workdir, Config)
    for model in (workdir, workdir / "hf"):
        assert settings_of(str(model)).recipe == "needle_rl"


def test_a_file_of_ones_own_that_changed_is_named(tmp_path):
    mine, workdir, lines = tmp_path / "mine.py", tmp_path / "run", []
    mine.write_text((ROOT / "examples/brevity.py").read_text())

    def continued() -> list[str]:
        """What a process says that resumes the run."""
        for module in [m for m in sys.modules.values() if getattr(m, "__file__", "") == str(mine)]:
            del sys.modules[module.__name__]
        own = [f"rewards.scheme={mine}:brief", "objective.anchor=sequence"]
        config = override(get_recipe("needle_rl"), own)
        lines.clear()
        checks.tell_changes(config, workdir, "auto", lines.append)
        hold(workdir, config, step=2)
        return list(lines)

    assert continued() == [] and continued() == []
    mine.write_text(mine.read_text() + "# another thought\n")
    assert continued() == [f"{workdir}: changed since the run was last started: {mine}"]
    assert continued() == []


def test_a_workdir_alone_is_continued_from_its_own_settings(tmp_path):
    own = override(get_recipe("needle_sft"), ["seed=3", "optimizer.decay=constant", "steps=7"])
    hold(tmp_path, own, step=2)
    again = resolve("--workdir", tmp_path)
    assert again.recipe == "needle_sft" and check_same_run(own, again, tmp_path) == {}
    more = resolve("--workdir", tmp_path, "--steps", 9)
    assert check_same_run(own, more, tmp_path) == {"steps": (7, 9)}
    assert resolve("--workdir", tmp_path / "new").recipe == "needle_rl"


def test_a_named_recipe_is_the_whole_of_it_and_is_compared(tmp_path):
    hold(tmp_path, override(get_recipe("needle_sft"), ["seed=3"]), step=2)
    told = resolve("--workdir", tmp_path, "--recipe", "needle_rl")
    with pytest.raises(ValueError, match=r"recipe='needle_sft', not 'needle_rl'.*seed=3, not 0"):
        checks.tell_changes(told, tmp_path, "auto", print)


@pytest.mark.parametrize(
    "setting",
    [
        "model.remat=false",
        "rl.micro_groups=2",
        "rl.warm_up=false",
        "data.workers=2",
        "data.cache_dir=elsewhere",
        "output.checkpoint_every=9",
        "optimizer.learning_rate=1e-6",
        "agent.subagent_batch=4",
    ],
)
def test_what_changes_no_number_may_change_and_is_named(setting, tmp_path):
    hold(tmp_path, get_recipe("paravt_rl"), step=2)
    lines = []
    checks.tell_changes(
        resolve("--workdir", tmp_path, "--set", setting), tmp_path, "auto", lines.append
    )
    assert len(lines) == 1 and setting.split("=")[0] in lines[0] and " was " in lines[0]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mesh", True),
        ("output.rollouts", True),  # a whole section
        ("rewards.judge.url", True),
        ("teacher.judge.url", True),
        ("rewards.judge.model", False),
        ("sft.tasks.caption.length", False),
        ("a.setting.of.another.version", False),
    ],
)
def test_what_changes_no_number_is_found_by_its_whole_name(name, found):
    assert marked(Config, name, Mark.SAME_RESULTS) is found


def test_an_evaluation_depends_on_what_it_asks_and_not_on_how_fast():
    found = evaluated_settings(get_recipe("needle_rl"))
    assert {"model.folder", "agent.evidence", "rewards.judge.model"} < set(found)
    assert not {"seed", "model.remat", "data.workers", "rewards.judge.url"} & set(found)


def test_relative_and_absolute_paths_are_the_same_files(tmp_path, monkeypatch):
    data = dataclasses.replace(get_recipe("paravt_rl").data, path="own/questions.csv")
    hold(tmp_path / "run", dataclasses.replace(get_recipe("paravt_rl"), data=data), step=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    os.symlink(tmp_path / "own", tmp_path / "linked")
    for name in ("own", tmp_path / "own", "linked"):
        told = resolve("--workdir", "run", "--data", f"{name}/questions.csv")
        assert os.path.isabs(told.data.path)
        checks.tell_changes(told, tmp_path / "run", "auto", print)
    other = resolve("--workdir", "run", "--data", "other/questions.csv")
    with pytest.raises(ValueError, match=r"data\.path"):
        checks.tell_changes(other, tmp_path / "run", "auto", print)


def test_settings_that_are_younger_than_the_file_take_their_defaults_and_are_named(tmp_path):
    hold(tmp_path, get_recipe("needle_rl"), step=1)
    held = json.loads((tmp_path / "config.json").read_text())
    del held["output"]["rollouts"]
    (tmp_path / "config.json").write_text(json.dumps(held))
    lines = []
    checks.tell_changes(resolve("--workdir", tmp_path), tmp_path, "auto", lines.append)
    assert len(lines) == 1 and "output.rollouts" in lines[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda held: held | {"gravity": 9.81}, "knows no setting gravity"),
        (lambda held: held | {"rl": held["rl"] | {"grip": 1}}, "knows no setting rl.grip"),
        (lambda held: held | {"steps": "many"}, "steps='many' is no int"),
        (lambda held: held | {"rl": 3}, "rl is no section"),
        (lambda held: held | {"stage": "dream"}, "dream"),
        (lambda held: [held], "no section"),
        (lambda held: {key: held[key] for key in ("recipe", "stage")}, "steps"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(change, named, tmp_path, capsys):
    hold(tmp_path, get_recipe("needle_rl"))
    held = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(change(held)))
    assert main.main(["--workdir", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(tmp_path / "config.json") in line and named in line and "--workdir" in line


def test_a_cut_file_is_one_line(tmp_path, capsys):
    hold(tmp_path, get_recipe("needle_rl"))
    path = tmp_path / "config.json"
    path.write_text(path.read_text()[:-200])
    assert main.main(["--workdir", str(tmp_path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_no_checkpoint_would_stay(capsys):
    assert main.main(["--set", "output.keep_checkpoints=0"]) == 2
    assert "output.keep_checkpoints" in capsys.readouterr().err
