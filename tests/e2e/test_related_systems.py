"""Recipes of related systems through the real command: two steps each, as small as they go."""

import json

import numpy as np
import pytest

from tests.support.command import CONTRACT, metrics, start
from train.recipes.needle import COLD_START

pytestmark = pytest.mark.slow

SETTINGS = (
    "data.train_videos=4",
    "data.crop_frames=4",
    "agent.turn_tokens=112",
    "agent.answer_tokens=24",
    "agent.max_tool_rounds=1",
    "evaluation.rows=0",
    "output.export_hf=false",
    "output.checkpoint_every=0",
)


def run(recipe, cache, workdir, *arguments, settings=()):
    """Two steps if no other number is given; the records of `metrics.jsonl`."""
    command = ("--recipe", recipe, "--steps", "2", *arguments)
    done = start(workdir, cache, *command, settings=(*SETTINGS, *settings))
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(workdir)


def check(records):
    """The contract holds, and sampler and learner agree, also on frames in tool responses."""
    assert [record["step"] for record in records] == [0, 1]
    for record in records:
        assert set(record) >= CONTRACT
        assert all(np.isfinite(value) for value in record.values())
        assert record["logprob/gap_max"] < 1e-4


def rollouts(workdir):
    files = sorted((workdir / "rollouts").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.study
def test_longvt_sees_the_frames_of_one_crop_a_turn(cache, tmp_path):
    records = run("needle_longvt", cache, tmp_path)
    check(records)
    assert max(record["tool/success_rate"] for record in records) > 0
    texts = [rollout["text"] for rollout in rollouts(tmp_path)]
    assert any("frames from" in text for text in texts)


@pytest.mark.study
def test_vital_calls_its_own_tool(cache, tmp_path):
    """With the repetition penalty of `vital_rl`: under it and a grammar, `check` says, sampler and
    learner mean the same distribution, and nothing is learned that the grammar wrote."""
    penalty = ("agent.sampling.repetition_penalty=1.05",)
    records = run("needle_vital", cache, tmp_path, settings=penalty)
    check(records)
    assert abs(records[0]["kl"]) < 1e-6
    # A step whose four rollouts call nothing leaves the grammar nothing to write.
    assert max(record["tokens/not_chosen"] for record in records) > 0
    for record in records:
        assert record["tokens/learned_not_chosen"] == 0
        assert record["tokens/learned"] == pytest.approx(1 - record["tokens/not_chosen"])
    check_choices(rollouts(tmp_path))
    assert max(record["tool/success_rate"] for record in records) > 0
    texts = [rollout["text"] for rollout in rollouts(tmp_path)]
    assert any('{"name": "get_video_clip_frame"' in text for text in texts)
    assert not any('<tool_call>\n{"name": "crop_video"' in text for text in texts)


def check_choices(written):
    """The token that a grammar forces on a policy is one that it finds unlikely, seldom its own."""
    generated, chosen, log_probs = (
        np.concatenate([rollout[name] for rollout in written])
        for name in ("generated", "chosen", "log_probs")
    )
    assert 0 < chosen.sum() < generated.sum() and not (chosen > generated).any()
    assert (log_probs[chosen == 1] < -5).mean() < 0.05
    assert (log_probs[generated == 0] == 0).all()


@pytest.fixture(scope="module")
def looks(cache, tmp_path_factory):
    """Supervised steps in Video-o3's syntax, every row masked by task."""
    workdir = tmp_path_factory.mktemp("looks")
    settings = ("sft.task_masks=1", "output.export_hf=true")
    first, *_, last = run("needle_video_o3_sft", cache, workdir, settings=settings)
    assert last["loss/looks"] < first["loss/looks"]
    return workdir / "hf"


@pytest.mark.study
def test_video_o3_after_its_cold_start(cache, looks, tmp_path):
    """Two optimiser steps per batch, groups filtered, over-turns masked."""
    check_video_o3(cache, tmp_path, looks)


def test_video_o3_in_a_foreign_syntax(cache, tmp_path):
    """From weights that never saw a grounding call."""
    check_video_o3(cache, tmp_path, COLD_START)


def check_video_o3(cache, workdir, model):
    check(run("needle_video_o3", cache, workdir, "--model", str(model)))
    config = json.loads((workdir / "config.json").read_text())
    assert config["agent"]["call_syntax"] == "grounding"
    assert config["rl"]["minibatches"] == 2 and config["rl"]["mask_over_turn"]
