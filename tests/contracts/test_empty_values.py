"""An unset shell variable is refused by every flag and setting that names something."""

import dataclasses

import pytest

from models import convert
from paravt_jax.marks import Mark
from paravt_jax.settings import marked
from pipelines import describe
from train import main
from train.recipes import get_recipe
from train.settings.override import leaves, override

CONFIG = get_recipe("needle_rl")
FLAGS = [
    "--recipe",
    "--mesh",
    "--rollout-mesh",
    "--workdir",
    "--model",
    "--data",
    "--compile-only",
    "--programs",
    "--set",
]


ALL = {
    name: value
    for name, value in leaves(CONFIG)
    if name not in ("recipe", "needs", "stage", "sft.phases", "sft.tasks")
}
TEXTS = [
    name
    for name, value in ALL.items()
    if (isinstance(value, str | None) or name == "data.mixture")
    and not marked(type(CONFIG), name, Mark.MAY_BE_EMPTY)
    and not name.endswith(".constrain")  # empty is one of its choices
]


def complaint(door, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as refusal:
        door(arguments)
    assert refusal.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(("error: ", "models/convert.py")) and "empty" in line
    return line


@pytest.mark.parametrize("value", ["", " "])
@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_a_run(flag, value, capsys):
    assert flag in complaint(main.main, [flag, value, "--dry-run"], capsys)


@pytest.mark.parametrize("flag", ["--root", "--model", "--budgets", "--pixels", "--cache"])
def test_flags_of_a_description(flag, capsys):
    assert flag in complaint(describe.main, ["own.csv", flag, ""], capsys)


def test_a_description_of_nothing(capsys):
    assert "path" in complaint(describe.main, [""], capsys)


@pytest.mark.parametrize(
    "arguments",
    [["to-hf", "", "out"], ["to-hf", "run", ""], ["to-hf", "run", "out", "--base", ""],
     ["from-hf", "", "out"], ["from-hf", "folder", ""]],
)  # fmt: skip
def test_arguments_of_a_conversion(arguments, capsys):
    complaint(convert.main, arguments, capsys)


@pytest.mark.parametrize("name", TEXTS)
def test_settings(name, capsys):
    assert main.main(["--set", f"{name}=", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--set {name}:" in line and "empty" in line


def test_the_list_of_settings_is_not_short():
    assert len(TEXTS) > 30 and {"data.path", "data.cache_dir", "model.adapter"} < set(TEXTS)


@pytest.mark.parametrize("text", ["data.mixture=a.csv,", "data.mixture=,a.csv", "data.mixture= "])
def test_a_list_of_names_with_a_gap(text):
    with pytest.raises(ValueError, match=r"data\.mixture.*empty"):
        override(CONFIG, [text])


@pytest.mark.parametrize("name", ["path", "video_root", "cache_dir", "mixture"])
def test_recipes(name):
    value = ("",) if name == "mixture" else ""
    with pytest.raises(ValueError, match=rf"DataSettings\.{name} is empty"):
        dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **{name: value}))


def test_what_may_be_empty_and_how_a_list_is_emptied():
    config = override(
        CONFIG,
        ["agent.think_prefix=", "agent.sampling.constrain=", "data.mixture=none", "mesh=none"],
    )
    assert config.agent.think_prefix == "" and config.data.mixture == () and config.mesh is None
    lines = override(CONFIG, ["agent.sampling.stop=\n\n,</answer>"]).agent.sampling
    assert lines.stop == ("\n\n", "</answer>")
    with pytest.raises(ValueError, match=r"agent\.sampling\.stop.*empty"):
        override(CONFIG, ["agent.sampling.stop=a,"])
