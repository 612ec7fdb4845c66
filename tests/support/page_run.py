"""Workdirs as runs leave them, made without a run: for the page that shows them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paravt_jax.records import CallResult, Patches, RolloutGroup, Row, ToolCall, Trajectory
from pipelines.preprocess import to_patches
from tests.support.rollout_fakes import SPECIAL
from tests.support.scripted_rollouts import ROW, SPEC, rollout
from train.recipes import get_recipe
from train.report.rollouts import RolloutLog
from train.rl.scoring import rollout_metrics
from train.rl.token_values import OfRollouts
from train.settings.override import based_on, to_dict

CONTENTS = [*(bytes([index]) for index in range(128)), *(name.encode() for name in SPECIAL)]
"""What the tokens of the toy renderer stand for."""
CALL = (
    '<tool_call>{"name": "crop_video", "arguments": {"start_time": 8, "end_time": 16}}</tool_call>'
)
GOLD = dataclasses.replace(ROW, evidence=((10.0, 14.0),))


def shown(count: int, seed: int) -> Patches:
    """Random frames as the model sees them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return to_patches(pixels, SPEC)


def episode(total: float, answer: str = "red", windows: Sequence[tuple] = (), seed: int = 0):
    """A rollout that calls once for each window, and then answers."""
    think = "<think>I look.</think>"
    said = think + CALL * len(windows), f"{think}<answer>{answer}</answer>"
    texts = said if windows else said[1:]
    made = rollout(*texts, responses=("seen",), subagents=("red",) * len(windows), seed=seed)
    prompt = dataclasses.replace(made.prompt, patches=shown(2, 0), times=(np.array([0.0, 60.0]),))
    accuracy = float(answer == "red")
    rewards = {"accuracy": accuracy, "format": total - accuracy, "tool": 0.0, "total": total}
    made = dataclasses.replace(made, prompt=prompt, rewards=rewards)
    return _with_calls(made, windows) if windows else made


def _with_calls(made: Trajectory, windows: Sequence[tuple]) -> Trajectory:
    times = (np.arange(3.0),)
    looked = [
        dataclasses.replace(t.prompt, patches=shown(3, 1), times=times) for t in made.subagents
    ]
    subagents = tuple(
        dataclasses.replace(t, prompt=p) for t, p in zip(made.subagents, looked, strict=True)
    )
    results = tuple(CallResult("seen", True, w, 0.25, n) for n, w in enumerate(windows))
    calls = tuple(ToolCall("crop_video", {"start_time": a, "end_time": b}) for a, b in windows)
    first = dataclasses.replace(made.turns[0], calls=calls, results=results)
    return dataclasses.replace(made, subagents=subagents, turns=(first, *made.turns[1:]))


def some_groups(row: Row = GOLD) -> list[RolloutGroup]:
    """Two prompts with three rollouts each: right and wrong, with a hit, with a miss, without."""
    other = dataclasses.replace(row, row_id="1", question="When?", answer="3, 9", evidence=(),
                                question_type="tvg")  # fmt: skip
    first = (
        episode(2.0, windows=((8.0, 16.0), (20.0, 28.0))),
        episode(0.5, "blue", ((30.0, 38.0),), seed=1),
        episode(1.0, seed=2),
    )
    second = tuple(episode(0.25 * n, "blue", seed=3 + n) for n in range(3))
    return [RolloutGroup(row, 2, first), RolloutGroup(other, 4, second)]


def write_settings(workdir: Path, **changes: Any) -> None:
    """`config.json`."""
    workdir.mkdir(parents=True, exist_ok=True)
    config = based_on(get_recipe("needle_rl"), {"steps": 3, **changes})
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))


def write_run(workdir: Path, groups: Sequence[RolloutGroup] | None = None, steps: int = 2) -> Path:
    """A run of some steps, all alike, written by what writes those of real runs."""
    groups = groups or some_groups()
    write_settings(workdir)
    log = RolloutLog(workdir, steps, 1e8, CONTENTS, SPEC)
    rollouts = [t for group in groups for t in group.trajectories]
    dice, rows = np.random.default_rng(0), {id(t): n for n, t in enumerate(rollouts)}
    most = max(len(t.tokens) for t in rollouts)
    values = {n: dice.normal(size=(len(rows), most)) for n in ("log_probs", "advantages")}
    values["structural"] = values["advantages"] * (dice.random((len(rows), most)) < 0.2)
    lines = []
    for step in range(steps):
        log(step, groups, lambda: OfRollouts(values, rows))
        told = {"step": step, **rollout_metrics(groups), "loss": -0.5 * step, "time/step": 2.0}
        lines.append(json.dumps(told) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines))
    return workdir


def write_long_run(workdir: Path, steps: int, rollouts: int, group_size: int = 8) -> Path:
    """A run of many steps, of one written line over and over, without its tokens: rewards and
    places differ."""
    write_run(workdir, steps=1)
    write_settings(workdir, steps=steps)
    shutil.rmtree(workdir / "details")
    source = workdir / "rollouts" / "step_000000.jsonl"
    line = json.loads(source.read_text().splitlines()[0])
    line |= {"text": "<answer>red</answer>", "tokens": [], "generated": [], "log_probs": []}
    known = json.loads((workdir / "metrics.jsonl").read_text())
    dice, lines = np.random.default_rng(0), []
    for step in range(steps):
        totals = dice.random(rollouts).round(3).tolist()
        told = [
            {**line, "rollout": n % group_size, "rewards": {**line["rewards"], "total": total}}
            for n, total in enumerate(totals)
        ]
        path = source.with_name(f"step_{step:06d}.jsonl")
        path.write_text("".join(json.dumps(one) + "\n" for one in told))
        noisy = {name: value + 0.1 * dice.normal() for name, value in known.items()}
        lines.append(json.dumps({**noisy, "step": step}) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines))
    return workdir
