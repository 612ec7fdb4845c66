"""The real command with several optimiser steps per batch, dynamic sampling, over-long shaping and
the release's advantages; and its resume."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.e2e.test_needle_run import ROOT, SMALL, metrics, untimed

pytestmark = pytest.mark.slow
SETTINGS = [
    "evaluation.rows=0",
    "output.export_hf=false",
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
    "rl.overlong_limit=90",
    "rl.overlong_margin=60",
    "advantages.kl_weight=0.01",
    "advantages.whiten_tokens=true",
    "advantages.difficulty_weighted=true",
]


def start(workdir, cache, *arguments):
    given = [*SMALL, *SETTINGS, f"data.cache_dir={cache}"]
    sets = [part for text in given for part in ("--set", text)]
    # Compiling is most of the time.
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--steps", "2"]
    done = subprocess.run(
        [*command, "--workdir", str(workdir), *arguments, *sets],
        env={**os.environ, **quick},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(workdir)


def test_clips_act_groups_are_filtered_and_a_resume_goes_on_exactly(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    first, second = start(whole, tmp_path)
    for record in (first, second):
        assert all(np.isfinite(value) for value in record.values())
        assert 0 < record["clip_fraction"] < 1, "the policy moves within a batch"
        assert record["logprob/gap_max"] < 1e-4, "behaviour is the policy before the first step"
        assert record["group/kept"] == 1 / (1 + record["group/redraws"])
        assert (record["group/redraws"] > 0) == (record["group/zero_std"] > 0)
    assert first["reward/length"] + second["reward/length"] < 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "2")
    again = start(cut, tmp_path, "--resume", "must")
    assert [untimed(record) for record in again] == [untimed(first), untimed(second)]
