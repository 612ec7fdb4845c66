"""Ten RL steps and ten SFT steps through the real command give the figures of before.

What a change of the code must not change is held here from outside, by settings, `metrics.jsonl`
and `rollouts/`, so that code may move without an edit of this test. A change that means to change
figures writes them anew, and its commit says why:

    pytest tests/golden --rewrite-golden

Another kind of CPU, or another number of threads, rounds otherwise in the last place. That is
forgiven, and a changed draw or loss is not:

* Rewards, lengths and counts follow from the tokens and are compared exactly, as are the tokens, by
  a digest of each rollout. A draw is an argmax, and rounding decides about one in a million. So
  from the second step on, one rollout of a step may be another; it ends the comparison, which is
  told as a skipped test. A change of how tokens are drawn changes more, or the first step.
* What devices compute is compared with `TOLERANCES`, ten times what was seen: with SSE4.2, AVX2 and
  AVX-512, with and without XLA's optimisations, on one core and on two, all rollouts were the same,
  losses differed by 1e-6 (relative), KL and entropy by 1e-5 and gradient norms by 6e-5.
* Other pixels are no rounding: where OpenCV's codec gives others, nothing can be compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.support.command import SMALL, command, metrics, run, untimed

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STEPS = 10
GAP = 1e-4
"""Sampler and learner agree at least this well (law 2); how well is rounding."""
TOLERANCES = {
    "loss": (2e-5, 1e-6),
    "grad_norm": (6e-4, 0.0),
    "kl": (1e-4, 1e-6),
    "entropy": (1e-4, 0.0),
    "optimizer/learning_rate": (1e-5, 0.0),
    "logprob/gap_mean": (0.0, GAP),
    "logprob/gap_max": (0.0, GAP),
}
"""Relative and absolute, of what devices compute; of `loss/TASK` as of `loss`."""
EXACT = (1e-9, 0.0)
"""Of everything else: sums of the same numbers."""
ADVICE = "if this is meant, run `pytest tests/golden --rewrite-golden` and say why in the commit"


def run_rl(workdir: Path, cache: str) -> None:
    """The small run of the suite, whose programs other tests compile too."""
    settings = ("evaluation.rows=0", "output.export_hf=false", "output.checkpoint_every=0")
    end(command(workdir, "--steps", str(STEPS), sets=[*SMALL, *settings, cache]))


def run_sft(workdir: Path, cache: str) -> None:
    """Frames and whole episodes; phases cannot be set on a command line."""
    workdir.mkdir()
    shutil.copy(HERE / "sft.config.json", workdir / "config.json")
    end(command(workdir, sets=[cache]))


def end(arguments: list[str]) -> None:
    done = run(arguments, HERE)
    assert done.returncode == 0, done.stderr[-3000:]


STAGES = {"rl": run_rl, "sft": run_sft}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def codec(folder: Path) -> str:
    """A digest of the pixels that this machine's OpenCV makes of noise, without our code."""
    path = str(folder / "noise.mp4")
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 1.0, (32, 32))
    for frame in frames:
        writer.write(cv2.blur(frame, (5, 5)))
    writer.release()
    reader = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
    return digest([reader.read()[1].tolist() for _ in frames])


def rollouts(workdir: Path, step: int) -> list[str]:
    """A digest of each rollout of a step: its question, what it drew and what it was told."""
    path = workdir / "rollouts" / f"step_{step:06d}.jsonl"
    if not path.exists():
        return []
    named = ("row_id", "frame_budget", "tokens", "generated", "stop_reasons", "subagents")
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [digest([record[name] for name in named]) for record in records]


def run_steps(stage: str, folder: Path) -> list[dict[str, Any]]:
    """Rollouts and figures of each step of a fresh run."""
    workdir = folder / "run"
    STAGES[stage](workdir, f"data.cache_dir={folder / 'cache'}")
    return [
        {"rollouts": rollouts(workdir, step), "metrics": untimed(record)}
        for step, record in enumerate(metrics(workdir))
    ]


def write(path: Path, found: dict[str, Any]) -> None:
    """One line per step, so that a difference can be read."""
    lines = ",\n".join(json.dumps(step) for step in found["steps"])
    path.write_text(f'{{"codec": "{found["codec"]}",\n"steps": [\n{lines}\n]}}\n', encoding="utf-8")


def changed(was: dict[str, float], now: dict[str, float]) -> list[str]:
    """Figures that are not what they were, or gone. New ones may come."""
    found = []
    for name, before in was.items():
        family = "loss" if name.startswith("loss/") else name
        relative, absolute = TOLERANCES.get(family, EXACT)
        after = now.get(name, math.nan)
        if not math.isclose(before, after, rel_tol=relative, abs_tol=absolute):
            found.append(f"{name} was {before!r} and is {after!r}")
    return found


def compare(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> str | None:
    """Where rounding ended the comparison, if it did.

    Raises:
      AssertionError: a step is another.
    """
    assert len(now) == len(was) == STEPS
    for number, (before, after) in enumerate(zip(was, now, strict=True)):
        drawn = list(zip(before["rollouts"], after["rollouts"], strict=True))
        others = sum(a != b for a, b in drawn)
        if number and others == 1:
            return (
                f"step {number}: one of {len(drawn)} rollouts is another, as rounding may have it"
            )
        assert not others, f"step {number}: {others} of {len(drawn)} rollouts are others; {ADVICE}"
        found = changed(before["metrics"], after["metrics"])
        assert not found, f"step {number}: {'; '.join(found)}; {ADVICE}"
    return None


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_give_the_figures_of_before(stage, tmp_path, request):
    path = HERE / f"{stage}.json"
    now = {"codec": codec(tmp_path), "steps": run_steps(stage, tmp_path)}
    if request.config.getoption("--rewrite-golden"):
        write(path, now)
    was = json.loads(path.read_text(encoding="utf-8"))
    if was["codec"] != now["codec"]:
        pytest.skip("this machine's OpenCV gives other pixels than the golden figures are of")
    if ended := compare(was["steps"], now["steps"]):
        pytest.skip(ended)


def test_a_changed_draw_or_figure_is_noticed():
    """And one rollout that rounding may have changed is not, once there were equal ones."""
    step = {"rollouts": ["a", "b"], "metrics": {"loss": 1.0, "reward/total": 0.5}}
    was = [step] * STEPS

    def but(**change: Any) -> list[dict[str, Any]]:
        return [step, step | change, *was[2:]]

    assert compare(was, was) is None
    assert compare(was, but(metrics={"loss": 1.0 + 1e-5, "reward/total": 0.5, "new": 1})) is None
    assert "step 1: one of 2" in str(compare(was, but(rollouts=["a", "c"])))
    for now in (
        but(rollouts=["c", "d"]),
        but(metrics={"loss": 1.1, "reward/total": 0.5}),
        but(metrics={"loss": 1.0, "reward/total": 0.500001}),
        but(metrics={"loss": 1.0}),
        [step | {"rollouts": ["a", "c"]}, *was[1:]],
        was[1:],
    ):
        with pytest.raises(AssertionError):
            compare(was, now)
