"""ParaVT-Parquet through the real command: parquet -> ArrayRecord -> worker -> optimiser steps."""

import json

import numpy as np
import pytest

from tests.support import paravt_parquet as fixture
from tests.support.command import metrics, start
from train.data.questions import open_rows, read_questions
from train.recipes import get_recipe
from train.settings.override import override

SETTINGS = [
    "evaluation.rows=0",
    "output.export_hf=false",
    "data.max_rejected=0.5",
    "data.frame_budgets=4,8",
    "data.question_types=oe,tvg,mcq",
    "data.workers=1",
    "agent.turn_tokens=32",
    "agent.max_tool_rounds=1",
]


def configure(tmp_path, *settings):
    base = ["data.train_videos=3", "data.held_out_videos=2", "data.question_types=oe,tvg,mcq"]
    return override(get_recipe("needle_rl"), [*base, f"data.cache_dir={tmp_path}", *settings])


@pytest.mark.slow
def test_two_rl_steps(paravt_folder, tmp_path):
    workdir = tmp_path / "run"
    command = ("--data", paravt_folder, "--steps", "2")
    done = start(workdir, tmp_path, *command, settings=SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "3 of 7 rows cannot be used" in done.stdout
    first, second = metrics(workdir)
    assert all(np.isfinite(value) for value in (*first.values(), *second.values()))
    assert max(first["logprob/gap_max"], second["logprob/gap_max"]) < 1e-4
    assert {first["frames/budget_mean"], second["frames/budget_mean"]} <= {4.0, 6.0, 8.0}
    texts = [path.read_text() for path in sorted((workdir / "rollouts").iterdir())]
    shown = {json.loads(line)["row_id"] for text in texts for line in text.splitlines()}
    assert shown == {f"rl/nested.parquet:{n}" for n in range(3)} | {"rl/strings.parquet:0"}


def test_too_many_unusable_rows_stop_a_run(paravt_folder, tmp_path):
    config = configure(tmp_path, f"data.path={paravt_folder}")
    with pytest.raises(ValueError, match=r"3 of 7 rows .* data\.max_rejected=0\.05 allows"):
        read_questions(config.data, config.evaluation)


def test_rows_of_more_videos_than_frames_are_rejected(paravt_folder, tmp_path):
    some = ("data.max_rejected=0.9", f"data.path={paravt_folder}", "data.frame_budgets=1")
    config = configure(tmp_path, *some, "evaluation.rows=0")
    (found,) = read_questions(config.data, config.evaluation)
    assert [len(row.videos) for row in found.rows] == [1, 1, 1]
    reasons = [rejected.reason for rejected in found.rejected]
    assert any("2 videos are more than the least frame budget" in reason for reason in reasons)


def test_data_sets_mix_and_hold_out_no_video_twice(paravt_folder, tmp_path):
    """The needle world, its questions once more as a file, and ParaVT-Parquet."""
    config = configure(tmp_path, "evaluation.rows=2")
    _, held_out = open_rows(config.data, config.evaluation)
    own = tmp_path / "own.csv"
    lines = [f"{row.video.path},{n}?,red,oe" for n, row in enumerate(held_out)]
    lines.append(f"{paravt_folder}/{fixture.VIDEOS[0]},Other?,red,oe")
    own.write_text("\n".join(["video,question,answer,question_type", *lines]))
    mixture = f"data.mixture={own},{paravt_folder}"
    config = configure(tmp_path, mixture, "data.max_rejected=0.9", "evaluation.rows=2")
    reports: list[str] = []
    mixed, same = open_rows(config.data, config.evaluation, reports.append)
    assert same == held_out and len(held_out) == 2
    needle, second, third = mixed.sources
    assert [row.question for row in second] == ["Other?"] and len(third) == 4
    assert mixed.weights == (len(needle), 1, 4)
    assert [row.row_id for row in third][:1] == ["1/rl/nested.parquet:0"]
    assert any("museg: 1 of 3 files missing" in line for line in reports)
    config = override(config, ["data.weights=2,1,1"])
    weighted, _ = open_rows(config.data, config.evaluation)
    assert weighted.weights == (2.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("data.weights=1,2", "data.weights"),
        ("data.video_root=/", "data.video_root"),
        ("data.max_rejected=2", "data.max_rejected"),
        ("data.workers=-1", "data.workers"),
    ],
)
def test_settings_without_effect_are_refused(setting, named):
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        override(get_recipe("needle_rl"), [setting])
