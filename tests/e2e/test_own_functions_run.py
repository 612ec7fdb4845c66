"""A reward, a surrogate and an anchor from files outside of the package, through the real command
from another folder; and the resume of such a run."""

import json
import shutil

import numpy as np
import pytest

from tests.support.command import ROOT, metrics, start, untimed

pytestmark = pytest.mark.slow
SETTINGS = [
    "evaluation.rows=0",
    "output.export_hf=false",
    "rl.minibatches=2",
    "objective.surrogate=mine/cispo.py:cispo",
    "objective.anchor=mine/closing_tags.py:closing_tags",
    "objective.anchor_weight=0.5",
    "rewards.scheme=mine/brevity.py:brief",
]


def two_steps(workdir, cache, *arguments, settings=SETTINGS):
    return start(workdir, cache, "--steps", "2", *arguments, settings=settings)


def test_functions_of_a_users_folder_train_and_a_resume_finds_them_again(tmp_path):
    whole, cut, mine = tmp_path / "whole", tmp_path / "cut", tmp_path / "mine"
    mine.mkdir()
    for name in ("cispo", "closing_tags", "brevity"):
        shutil.copy(ROOT / "examples" / f"{name}.py", mine)
    done = two_steps(whole, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for record in metrics(whole):
        assert all(np.isfinite(value) for value in record.values())
        terms = ("reward/accuracy", "reward/format", "reward/brevity")
        assert -0.2 <= record["reward/brevity"] < 0
        assert np.isclose(record["reward/total"], sum(record[term] for term in terms))
    kept = json.loads((whole / "config.json").read_text())
    assert kept["rewards"]["scheme"] == f"{mine.resolve()}/brevity.py:brief"
    assert kept["objective"]["surrogate"] == f"{mine.resolve()}/cispo.py:cispo"

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "2")
    again = two_steps(cut, tmp_path, "--resume", "must")
    assert again.returncode == 0, again.stderr[-3000:]
    assert [untimed(record) for record in metrics(cut)] == [*map(untimed, metrics(whole))]

    shutil.copy(mine / "cispo.py", mine / "other.py")
    other = [*SETTINGS, "objective.surrogate=mine/other.py:cispo"]
    refused = two_steps(cut, tmp_path, "--resume", "must", settings=other)
    assert refused.returncode != 0
    assert "objective.surrogate=" in refused.stderr and "cispo.py:cispo" in refused.stderr
    (mine / "brevity.py").unlink()
    lost = two_steps(cut, tmp_path, "--resume", "must")
    assert lost.returncode == 2
    assert "cannot be continued" in lost.stderr and "brevity.py: no such file" in lost.stderr


def test_a_recipe_that_holds_functions_runs_from_another_folder(tmp_path):
    workdir, recipe = tmp_path / "run", f"{ROOT}/examples/zooming.py:zooming"
    settings = ["evaluation.rows=0", "output.export_hf=false"]
    done = start(workdir, tmp_path, "--recipe", recipe, "--steps", "1", settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads((workdir / "config.json").read_text())
    assert kept["recipe"] == recipe
    assert kept["agent"]["tools"][1] == f"{ROOT}/examples/zoom_image.py:zoom_image"
    (record,) = metrics(workdir)
    assert np.isfinite(record["reward/brevity"]) and record["logprob/gap_max"] < 1e-3
