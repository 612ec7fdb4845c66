"""Evaluations in the midst of a run: curves, and the best weights kept."""

import json

import pytest

from tests.support.command import metrics, start

pytestmark = pytest.mark.slow
FIGURE = "sampled/accuracy"
EVALUATED = ("evaluation.every=1", f"evaluation.best={FIGURE}", "rl.sight_every=2")


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """Two RL steps, each evaluated."""
    workdir = tmp_path_factory.mktemp("run")
    done = start(workdir, cache, "--steps", "2", settings=EVALUATED)
    assert done.returncode == 0, done.stderr
    return workdir


def test_every_step_has_its_figures(run):
    first, second = metrics(run)
    told = json.loads((run / "evaluation.json").read_text())["after"]
    for mode in ("sampled", "greedy", "no crops"):
        name = mode.replace(" ", "_")
        assert 0 <= first[f"evaluation/{name}/accuracy"] <= 1
        assert second[f"evaluation/{name}/accuracy"] == told[mode]["accuracy"]
        assert second[f"evaluation/{name}/accuracy/low"] == told[mode]["accuracy/low"]
    assert first["time/evaluate"] > 0


def test_the_best_weights_are_kept(run):
    best = json.loads((run / "best.json").read_text())
    figures = [record[f"evaluation/{FIGURE}"] for record in metrics(run)]
    assert best["figure"] == FIGURE and best["value"] == max(figures)
    assert best["step"] == 1 + figures.index(max(figures)), "the first of the best"
    weights = (run / "best" / "model.safetensors").read_bytes()
    assert (weights == (run / "hf" / "model.safetensors").read_bytes()) == (best["step"] == 2)
    assert (run / "best" / "tokenizer.json").is_file()


@pytest.mark.study
def test_a_figure_that_there_is_not_is_named(cache, tmp_path):
    settings = ("evaluation.every=1", "evaluation.best=greedy/wit")
    done = start(tmp_path / "run", cache, "--steps", "1", settings=settings)
    assert done.returncode == 1
    assert "evaluation.best=greedy/wit" in done.stderr and "greedy/accuracy" in done.stderr


def test_sight_is_measured_when_it_is_due(run):
    first, second = metrics(run)
    kinds = {f"sight/{what}{how}" for what in ("answer", "report") for how in ("", "_blind")}
    assert kinds <= set(first) and all(first[name] < 0 for name in kinds)
    assert not kinds & set(second)
