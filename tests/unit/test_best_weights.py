"""The names of the figures that the best weights can be kept by, known before a run."""

import json
from types import MappingProxyType

import pytest
from rich.console import Console

from paravt_jax.records import RolloutGroup, Row, VideoRef
from paravt_jax.rewards import RewardRules
from tests.support.trajectories import rewarded
from train.evaluation.held_out import MODES, HeldOut, by_name
from train.evaluation.mid_run import MidRun
from train.evaluation.settings import EvaluationSettings
from train.recipes import get_recipe
from train.rl.scoring import Scorer
from train.setup import Parts

ROWS = [
    Row("a", VideoRef("1.mp4", 64.0), "What?", "red", "oe"),
    Row("b", VideoRef("2.mp4", 64.0), "When?", "1 to 2", "tvg"),
]


class Answered(HeldOut):
    """Every question answered rightly, in each mode."""

    def __call__(self, params):
        groups = [RolloutGroup(row, 4, (rewarded(1.0, 1.0),)) for row in self.rows]
        return {mode: self._metrics(groups) for mode in MODES}


def held_out() -> HeldOut:
    parts = MappingProxyType({"a": "1 event"})
    agents, scorer = Parts(get_recipe("needle_rl")).agents, Scorer(RewardRules())
    return Answered(EvaluationSettings(), ROWS, agents, scorer, 0.0, lambda: parts, Console())


def test_names_are_those_of_the_metrics():
    found = held_out()
    assert set(found.names) == set(by_name(found({})))
    assert {"greedy/accuracy", "no_crops/accuracy/oe/1 event/low"} <= set(found.names)


def test_a_figure_that_there_is_not_is_refused_before_the_run(tmp_path):
    settings = EvaluationSettings(rows=2, every=1, best="greedy/wit")
    with pytest.raises(ValueError, match=r"evaluation\.best=greedy/wit.*give .*greedy/accuracy"):
        MidRun(held_out(), settings, tmp_path, lambda params, folder: None)


def test_the_first_of_the_best_is_kept(tmp_path):
    kept = []
    settings = EvaluationSettings(rows=2, every=2, best="greedy/accuracy/tvg")
    run = MidRun(held_out(), settings, tmp_path, lambda params, folder: kept.append(folder))
    assert run(1, {}) == {} and run(2, {})["evaluation/greedy/accuracy"] == 1.0
    run(4, {})
    assert kept == [tmp_path / "best"]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
