"""Accuracies with their intervals, told apart by type of question and by part of the world."""

import io
import os

import numpy as np
import pytest
from rich.console import Console

from paravt_jax.records import RolloutGroup, Row, VideoRef
from pipelines.needle.world import draw_events
from tests.support.trajectories import rewarded
from train.data.needle import needle_world
from train.data.questions import all_rows, open_rows, strata
from train.evaluation.intervals import Accuracy, accuracies
from train.evaluation.tables import INTERVALS, as_metrics, interval_table
from train.recipes import get_recipe
from train.settings.override import override


def test_wilsons_interval_by_hand():
    """Wilson (1927) for 8 of 10: 0.4902 to 0.9433."""
    accuracy = Accuracy.of([1.0] * 8 + [0.0] * 2, videos=10)
    assert accuracy == pytest.approx((0.8, 0.4902, 0.9433, 10), abs=1e-4)
    assert Accuracy.of([1.0] * 20, videos=20) == pytest.approx((1, 0.8389, 1, 20), abs=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for truth in (0.5, 0.9):
        drawn = (rng.random((2000, 80)) < truth).astype(float)
        spans = [Accuracy.of(list(values), 80) for values in drawn]
        assert 0.93 < np.mean([s.low <= truth <= s.high for s in spans]) < 0.97


def group(row_id, kind, video, accuracy):
    row = Row(row_id, VideoRef(video, 64.0), "What?", "red", kind)
    return RolloutGroup(row, 4, (rewarded(1.0, accuracy),))


def test_questions_are_told_apart_and_one_video_counts_once():
    groups = [
        group("a", "oe", "1.mp4", 1.0),
        group("b", "oe", "1.mp4", 0.0),
        group("c", "oe", "2.mp4", 1.0),
        group("d", "tvg", "2.mp4", 0.25),
    ]
    found = accuracies(groups, {"a": "1 event", "b": "1 event", "c": "2 events"})
    assert {name: (a.mean, a.videos) for name, a in found.items()} == {
        "accuracy": (0.5625, 2),
        "accuracy/oe": (pytest.approx(2 / 3), 2),
        "accuracy/oe/1 event": (0.5, 1),
        "accuracy/oe/2 events": (1.0, 1),
        "accuracy/tvg": (0.25, 1),
    }


def test_the_table_fits_80_columns_and_shows_parts():
    names = [
        f"accuracy/{kind}/{part}" for kind in ("oe", "tvg") for part in ("1 event", "2 events")
    ]
    figures = as_metrics({name: Accuracy.of([1.0] * 128, 128) for name in ["accuracy", *names]})
    out = io.StringIO()
    rows = {f"{mode}, before": figures for mode in ("sampled", "greedy", "no crops")}
    Console(file=out, width=80).print(interval_table(INTERVALS, rows))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("100.0 97-100" in line for line in lines) == 3
    assert any(line.count("2 events") == 2 for line in lines)
    assert sum("before" in line for line in lines) == 3 and "n=128" in out.getvalue()


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """The demo on a small world, one configuration per split."""
    cache = tmp_path_factory.mktemp("cache")
    small = [f"data.cache_dir={cache}", "data.train_videos=2", "data.held_out_videos=6"]
    return {
        split: override(get_recipe("needle_rl"), [*small, f"evaluation.split={split}"])
        for split in ("held_out", "test")
    }


def test_the_test_split_shares_no_video_with_the_others(configs):
    shown = {}
    for split, config in configs.items():
        training, held_out = open_rows(config.data, config.evaluation)
        shown["train"] = {row.video.path for row in all_rows(training)}
        shown[split] = {row.video.path for row in held_out}
        assert len(held_out) == 6 == len(shown[split])
    assert len(set.union(*shown.values())) == sum(map(len, shown.values()))
    assert get_recipe("needle_rl").evaluation.split == "test"


def test_questions_of_the_needle_world_are_told_apart_by_events(configs):
    _, held_out = open_rows(configs["test"].data, configs["test"].evaluation)
    parts = strata(configs["test"].data, "test")
    world = needle_world(configs["test"].data)
    for row in held_out:
        index = int(os.path.basename(row.video.path).removesuffix(".mp4"))
        count = len(draw_events(world, "test", index))
        assert parts[row.row_id] == ("1 event" if count == 1 else "2 events")
