"""VISD and DeepVideo-R1 on the needle world, three steps each through the real command."""

import json
import shutil

import numpy as np
import pytest

from tests.support.command import metrics, start, untimed

pytestmark = pytest.mark.study

SETTINGS = (
    # Without tools, as in both papers, which halves what has to be compiled.
    "agent.max_tool_rounds=0",
    "agent.turn_tokens=40",
    "agent.answer_tokens=8",
    "data.train_videos=4",
    "evaluation.rows=0",
    "output.export_hf=false",
)
OWN = {
    "needle_visd": (),
    # Whatever falls behind at all is given half of a solution, so that three steps show hints.
    "needle_deepvideo_r1": ("difficulty.traces=2", "difficulty.scale=0.01"),
}


def run(recipe, workdir, cache, *arguments):
    done = start(
        workdir,
        cache,
        *("--recipe", recipe, "--steps", "3", *arguments),
        settings=(*SETTINGS, *OWN[recipe]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


@pytest.fixture(scope="module")
def visd(cache, tmp_path_factory):
    return run("needle_visd", tmp_path_factory.mktemp("visd") / "run", cache)


@pytest.fixture(scope="module")
def deepvideo(cache, tmp_path_factory):
    return run("needle_deepvideo_r1", tmp_path_factory.mktemp("deepvideo") / "run", cache)


def test_visd_reweights_by_a_teacher_that_loses_its_say(visd):
    records = metrics(visd)
    shares = [record["teacher/strength"] for record in records]
    np.testing.assert_allclose(shares, [0.5 * (1 - step / 40) for step in range(3)])
    assert all(record["teacher/gap_size"] > 1e-3 for record in records)
    assert max(record["logprob/gap_max"] for record in records) < 1e-4


def test_deepvideo_hints_and_disturbs_what_the_learner_gets(deepvideo):
    records = metrics(deepvideo)
    assert records[0]["difficulty/helped"] == records[0]["difficulty/disturbed"] == 0
    changed = [r["difficulty/helped"] + r["difficulty/disturbed"] for r in records[1:]]
    assert max(changed) > 0, "no group differed from the window"
    # Learner and sampler agree on prompts with hints and noise too.
    assert max(record["logprob/gap_max"] for record in records) < 1e-4
    assert all(np.isfinite(record["loss"]) for record in records)
    config = json.loads((deepvideo / "config.json").read_text())
    assert config["objective"]["surrogate"] == "regression" and config["rl"]["epochs"] == 2


# `test_needle_run` resumes a run in every test run, unit tests bring back teacher and window.
@pytest.mark.parametrize("recipe", OWN)
def test_a_resumed_run_is_the_uninterrupted_one(recipe, request, cache, tmp_path):
    """Teacher, or the window of rewards, come back with the weights."""
    whole = request.getfixturevalue(recipe.split("_")[1])
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "3")
    run(recipe, cut, cache, "--resume", "must")
    assert [untimed(r) for r in metrics(cut)] == [untimed(r) for r in metrics(whole)]
