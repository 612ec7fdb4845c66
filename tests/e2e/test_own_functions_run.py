"""A reward, a surrogate, an anchor and tools from files outside of the package, through the real
command from the user's own folder; and the resume of such a run."""

import json
import shutil

import numpy as np
import pytest

from tests.support.command import ROOT, metrics, start, untimed

pytestmark = pytest.mark.slow
MINE = '''
from paravt_jax.records import Frames
from rollout.tools import ToolContext

def crop_video(start_time: float, end_time: float, context: ToolContext) -> Frames:
    """Watch one part of the video closely and get a description of it.

    Args:
        start_time: Start of the part, in seconds.
        end_time: End of the part, in seconds.
    """
    with open("calls.txt", "a") as file:
        print(start_time, end_time, file=file)
    return context.clip(start_time, end_time).frames
'''
EXAMPLES = ("cispo", "closing_tags", "brevity", "zoom_image")
SETTINGS = [
    "evaluation.rows=0",
    "output.export_hf=false",
    "data.question_types=oe",
    "rl.minibatches=2",
    "objective.surrogate=mine/cispo.py:cispo",
    "objective.anchor=mine/closing_tags.py:closing_tags",
    "objective.anchor_weight=0.5",
    "rewards.scheme=mine/brevity.py:brief",
    "agent.tools=mine/watch.py:crop_video,mine/zoom_image.py:zoom_image",
]


def steps(workdir, cache, count, *arguments, settings=SETTINGS):
    return start(workdir, cache, "--steps", str(count), *arguments, settings=settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder, and what a step with its functions left there, in `run`."""
    folder = tmp_path_factory.mktemp("users")
    mine = folder / "mine"
    mine.mkdir()
    for name in EXAMPLES:
        shutil.copy(ROOT / "examples" / f"{name}.py", mine)
    (mine / "watch.py").write_text(MINE)
    done = steps(folder / "run", folder, 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_functions_of_a_users_folder_train(folder):
    check_records(metrics(folder / "run"))
    assert (folder / "calls.txt").read_text(), "the cold start calls it as it calls ours"
    kept = json.loads((folder / "run" / "config.json").read_text())
    check_names(kept, (folder / "mine").resolve())


@pytest.mark.study
def test_a_resume_finds_functions_again(folder, tmp_path):
    whole = steps(tmp_path / "whole", folder, 2)
    assert whole.returncode == 0, whole.stderr[-3000:]
    shutil.copytree(folder / "run", tmp_path / "cut")
    again = steps(tmp_path / "cut", folder, 2, "--resume", "must")
    assert again.returncode == 0, again.stderr[-3000:]
    cut, whole = (metrics(tmp_path / name) for name in ("cut", "whole"))
    check_records(whole)
    assert [*map(untimed, cut)] == [*map(untimed, whole)]


def check_records(records):
    for record in records:
        assert all(np.isfinite(value) for value in record.values())
        terms = ("reward/accuracy", "reward/format", "reward/brevity")
        assert -0.2 <= record["reward/brevity"] < 0
        assert np.isclose(record["reward/total"], sum(record[term] for term in terms))
        assert record["tool/success_rate"] > 0


def check_names(kept, mine):
    """`config.json` holds functions by file and name, wherever a resume is started."""
    assert kept["rewards"]["scheme"] == f"{mine}/brevity.py:brief"
    assert kept["objective"]["surrogate"] == f"{mine}/cispo.py:cispo"
    assert kept["agent"]["tools"] == [
        f"{mine}/watch.py:crop_video",
        f"{mine}/zoom_image.py:zoom_image",
    ]


def test_a_resume_with_other_functions_or_without_one_is_refused(folder, tmp_path):
    shutil.copytree(folder / "run", cut := tmp_path / "cut")
    shutil.copy(folder / "mine" / "cispo.py", folder / "mine" / "other.py")
    for other, named in (
        ("objective.surrogate=mine/other.py:cispo", ("objective.surrogate=", "cispo.py:cispo")),
        ("agent.tools=crop_video,mine/zoom_image.py:zoom_image", ("agent.tools",)),
    ):
        refused = steps(cut, folder, 2, "--resume", "must", settings=[*SETTINGS, other])
        assert refused.returncode != 0
        assert all(name in refused.stderr for name in named), refused.stderr
    shutil.move(folder / "mine" / "brevity.py", tmp_path)
    lost = steps(cut, folder, 2, "--resume", "must")
    shutil.move(tmp_path / "brevity.py", folder / "mine")
    assert lost.returncode == 2
    assert "cannot be continued" in lost.stderr and "brevity.py: no such file" in lost.stderr


def test_a_recipe_that_holds_functions_runs_from_another_folder(tmp_path):
    workdir, recipe = tmp_path / "run", f"{ROOT}/examples/zooming.py:zooming"
    # That functions train is held above; here none needs to be called.
    settings = ["evaluation.rows=0", "output.export_hf=false", "agent.turn_tokens=32"]
    done = start(workdir, tmp_path, "--recipe", recipe, "--steps", "1", settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads((workdir / "config.json").read_text())
    assert kept["recipe"] == recipe
    assert kept["agent"]["tools"][1] == f"{ROOT}/examples/zoom_image.py:zoom_image"
    (record,) = metrics(workdir)
    assert np.isfinite(record["reward/brevity"]) and record["logprob/gap_max"] < 1e-3
