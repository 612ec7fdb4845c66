"""The real command with several optimiser steps per batch, dynamic sampling, over-long shaping and
the release's advantages; and its resume."""

import shutil

import numpy as np
import pytest

from tests.support.command import metrics, start, untimed

pytestmark = pytest.mark.study
SETTINGS = [
    "evaluation.rows=0",
    "output.export_hf=false",
    # Without tools, which halves what has to be compiled.
    "agent.max_tool_rounds=0",
    "agent.turn_tokens=64",
    "rl.epochs=2",
    "rl.minibatches=2",
    "objective.clip_low=0.001",
    "objective.clip_high=0.002",
    "objective.dual_clip=3",
    "optimizer.learning_rate=1e-3",
    "optimizer.decay=cosine",
    "rl.filter_groups=total",
    "rl.filter_redraws=1",
    "rl.overlong_limit=40",
    "rl.overlong_margin=36",
    "advantages.kl_weight=0.01",
    "advantages.whiten_tokens=true",
    "advantages.difficulty_weighted=true",
]


def two_steps(workdir, cache, *arguments):
    done = start(workdir, cache, "--steps", "2", *arguments, settings=SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where two steps left their files."""
    folder = tmp_path_factory.mktemp("updates")
    two_steps(folder / "whole", folder)
    return folder / "whole"


def test_clips_act_and_groups_are_filtered(whole):
    first, second = metrics(whole)
    for record in (first, second):
        assert all(np.isfinite(value) for value in record.values())
        assert 0 < record["clip_fraction"] < 1, "the policy moves within a batch"
        assert record["logprob/gap_max"] < 1e-4, "behaviour is the policy before the first step"
        assert record["group/kept"] == 1 / (1 + record["group/redraws"])
        assert (record["group/redraws"] > 0) == (record["group/zero_std"] > 0)
    assert first["reward/length"] + second["reward/length"] < 0


def test_a_resume_goes_on_exactly(whole, tmp_path):
    """As that of one optimiser step per batch does, in `test_needle_run.py`."""
    shutil.copytree(whole, cut := tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "2")
    again = two_steps(cut, whole.parent, "--resume", "must")
    assert [*map(untimed, again)] == [*map(untimed, metrics(whole))]
