"""Runs that are killed again and again, saves included, end like one that was not.

A study of some half an hour; `test_needle_run.py` holds the short version.
"""

import random
import signal
import time

import pytest

from tests.support.command import (
    command,
    is_saving,
    logged,
    metrics,
    run,
    saved,
    send,
    start,
    untimed,
)

pytestmark = pytest.mark.study

KILLS = 10
STAGES = {
    "rl": ("--steps", "6"),
    "sft": ("--recipe", "needle_sft", "--steps", "12"),
}
SETTINGS = ("optimizer.decay=constant", "output.export_hf=false", "output.checkpoint_minutes=0.02")


def moment(dice, workdir, longest):
    """Something to wait for: a save and a little more, or any time since this start."""
    if dice.random() < 0.5:
        later, seen = dice.uniform(0, 0.1), []

        def when():
            if not seen and is_saving(workdir):
                seen.append(time.monotonic())
            return bool(seen) and time.monotonic() - seen[0] >= later

        return when
    end = time.monotonic() + dice.uniform(0, longest)
    return lambda: time.monotonic() >= end


@pytest.mark.parametrize("stage", STAGES)
def test_ten_kills_at_random_moments(stage, tmp_path):
    dice, arguments = random.Random(stage), STAGES[stage]
    cache, whole, cut = tmp_path / "cache", tmp_path / "whole", tmp_path / "cut"
    cache.mkdir()
    began = time.monotonic()
    done = start(whole, cache, *arguments, settings=SETTINGS)
    assert done.returncode == 0, done.stderr[-3000:]
    longest, steps = time.monotonic() - began, logged(whole)
    for _ in range(KILLS):
        number = dice.choice([signal.SIGKILL, signal.SIGTERM])
        when = moment(dice, cut, longest)
        code, said = send(number, when, cut, cache, *arguments, settings=SETTINGS)
        assert code in (0, -number), said  # 0 as well where the run ended before
    done = run(command(cut, sets=()), cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [untimed(r) for r in metrics(cut)] == [untimed(r) for r in metrics(whole)]
    assert saved(cut, steps) == saved(whole, steps)
