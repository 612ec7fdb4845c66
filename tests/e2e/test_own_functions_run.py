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


def two_steps(workdir, cache, *arguments, settings=SETTINGS):
    return start(workdir, cache, "--steps", "2", *arguments, settings=settings)


def test_functions_of_a_users_folder_train_and_a_resume_finds_them_again(tmp_path):
    whole, cut, mine = tmp_path / "whole", tmp_path / "cut", tmp_path / "mine"
    mine.mkdir()
    for name in EXAMPLES:
        shutil.copy(ROOT / "examples" / f"{name}.py", mine)
    (mine / "watch.py").write_text(MINE)
    done = two_steps(whole, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    check_records(metrics(whole))
    assert (tmp_path / "calls.txt").read_text(), "the cold start calls it as it calls ours"
    check_names(json.loads((whole / "config.json").read_text()), mine.resolve())

    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "2")
    again = two_steps(cut, tmp_path, "--resume", "must")
    assert again.returncode == 0, again.stderr[-3000:]
    assert [untimed(record) for record in metrics(cut)] == [*map(untimed, metrics(whole))]
    check_refusals(cut, tmp_path)


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


def check_refusals(workdir, cache):
    """A resume with other functions, or without one of them."""
    shutil.copy(cache / "mine" / "cispo.py", cache / "mine" / "other.py")
    for other, named in (
        ("objective.surrogate=mine/other.py:cispo", ("objective.surrogate=", "cispo.py:cispo")),
        ("agent.tools=crop_video,mine/zoom_image.py:zoom_image", ("agent.tools",)),
    ):
        refused = two_steps(workdir, cache, "--resume", "must", settings=[*SETTINGS, other])
        assert refused.returncode != 0
        assert all(name in refused.stderr for name in named), refused.stderr
    (cache / "mine" / "brevity.py").unlink()
    lost = two_steps(workdir, cache, "--resume", "must")
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
