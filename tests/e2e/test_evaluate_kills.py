"""An evaluation killed at random moments, wherever they fall: imports, compiling, in mid-sample."""

import json
import random
import signal
import sys
import time

import pytest

from evaluate.benchmarks import results
from tests.support.command import ROOT, environment, run, server
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import based_on, to_dict

pytestmark = pytest.mark.study
DOOR = str(ROOT / "evaluate" / "main.py")
COUNT, KILLS = 48, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = based_on(get_recipe("needle_rl"), {"data.held_out_videos": 16, "data.train_videos": 2})
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    (workdir / "hf").symlink_to(COLD_START)
    return workdir


def arguments(model, cache, workdir) -> list[str]:
    own = ["--model", str(model), "--data", str(cache), "--workdir", str(workdir)]
    asked = ["--protocol", "needle", "--benchmarks", "needle_held_out", "--limit", str(COUNT)]
    return [*own, *asked, "--batch", "4"]


def written(workdir) -> int:
    path = workdir / "samples.jsonl"
    return len(results.read(path)) if path.exists() else 0


def untimed(workdir) -> dict[str, dict]:
    """The lines by sample, without what a second run does not repeat."""
    lines = map(json.loads, (workdir / "samples.jsonl").read_text().splitlines())
    return {line["sample_id"]: line | {"seconds": None} for line in lines}


@pytest.mark.parametrize("seed", [15])
def test_six_kills_leave_the_same_report(seed, model, cache, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run([sys.executable, DOOR, *arguments(model, cache, whole)], cache)
    assert done.returncode == 0, done.stderr
    draws, left = random.Random(seed), []
    for _ in range(KILLS):
        child = server().start(DOOR, arguments(model, cache, killed), cache, environment())
        # None more: in its imports or while it compiles. All kills together leave some to do.
        wanted = written(killed) + draws.randrange(COUNT // KILLS - 1)
        while not child.ended and written(killed) < wanted:
            time.sleep(0.01)
        time.sleep(draws.uniform(0, 2))
        child.send_signal(signal.SIGKILL)
        assert child.wait().code == -signal.SIGKILL
        left.append(written(killed))
    print(f"killed with {left} lines")
    done = run([sys.executable, DOOR, *arguments(model, cache, killed)], cache)
    assert done.returncode == 0, done.stderr
    assert left == sorted(left) and any(0 < count < COUNT for count in left)
    assert (killed / "report.json").read_bytes() == (whole / "report.json").read_bytes()
    assert untimed(killed) == untimed(whole)
