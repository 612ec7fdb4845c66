"""The whole path through the real command: mp4 -> Grain -> rollouts -> PARA-GRPO -> folder.

One short RL run is shared by the tests of this module.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

SMALL = [
    "data.train_videos=12",
    "data.held_out_videos=4",
    "data.frame_budgets=4",
    "rl.prompts_per_step=2",
    "rl.group_size=2",
    "rl.micro_groups=1",
    "agent.turn_tokens=80",
    "agent.sampling.temperature=0.9",
    "agent.subagent_batch=8",
    "evaluation.rows=4",
    "evaluation.batch=4",
    "output.checkpoint_every=1",
    "output.keep_checkpoints=4",
    "optimizer.warmup_steps=0",
]
CONTRACT = set(
    """step loss grad_norm kl reward/total reward/accuracy reward/format reward/tool
    format/compliance format/score tool/calls_per_rollout tool/rollouts_with_call
    tool/parallel_max tool/success_rate frames/budget_mean logprob/gap_mean logprob/gap_max
    clip_fraction group/zero_std time/rollout time/learn time/data tokens_per_second
    data/wait data/bad_rows frames/cache_hits frames/decode_seconds""".split()  # noqa: SIM905
)
READING = ("data/", "frames/asked", "frames/cache", "frames/decode")
TIMED = ("time/", "tokens_per_second", "compile/", *READING)
"""Beginnings of the names of figures that a second run does not repeat."""


QUICK = ("output.export_hf=false",)


QUICK_COMPILE = "--xla_backend_optimization_level=0"
"""Compiling is most of the time of a short run."""


def start(workdir, cache, *arguments, settings=(), xla_flags=QUICK_COMPILE):
    """Run the command from another directory; all runs share what they compile (see conftest)."""
    sets = [
        part for text in (*SMALL, f"data.cache_dir={cache}", *settings) for part in ("--set", text)
    ]
    return subprocess.run(
        [
            sys.executable,
            str(ROOT / "train" / "main.py"),
            "--workdir",
            str(workdir),
            *arguments,
            *sets,
        ],
        cwd=cache,
        env={**os.environ, "XLA_FLAGS": xla_flags},
        capture_output=True,
        text=True,
        timeout=900,
    )


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def untimed(record):
    return {k: v for k, v in record.items() if not k.startswith(TIMED)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """Three RL steps from the committed cold start."""
    workdir = tmp_path_factory.mktemp("run") / "first"
    done = start(workdir, cache, "--steps", "3")
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_metrics_hold_the_contract(run):
    workdir, _ = run
    records = metrics(workdir)
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records:
        assert set(record) >= CONTRACT
        assert all(np.isfinite(value) for value in record.values())
    assert records[0]["tool/calls_per_rollout"] > 0, "the cold start must call the tool"


def test_kl_is_zero_at_step_0(run):
    """Law 3: policy, behaviour and reference use one temperature."""
    first, second, _ = metrics(run[0])
    assert abs(first["kl"]) < 1e-6
    assert second["kl"] > 1e-6, "the reference must not move with the policy"


def test_sampler_and_learner_agree(run):
    """Law 2, on real rollouts with frames, crops and tool responses."""
    assert max(record["logprob/gap_max"] for record in metrics(run[0])) < 1e-4


def test_everything_is_left_in_the_workdir(run):
    workdir, output = run
    assert "held-out questions" in output and "sampled" in output
    assert json.loads((workdir / "config.json").read_text())["steps"] == 3
    assert (workdir / "checkpoints" / "3").is_dir()
    assert list((workdir / "tensorboard").iterdir())
    rollouts = [json.loads(line) for line in (workdir / "rollouts" / "step_000001.jsonl").open()]
    assert len(rollouts) == 4 and all(r["rewards"]["total"] is not None for r in rollouts)
    figures = json.loads((workdir / "evaluation.json").read_text())
    assert set(figures["before"]) == {"sampled", "greedy", "no crops"} == set(figures["after"])


def test_exported_folder_gives_the_same_logits_in_transformers(run):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    from models.qwen3_vl import from_pretrained

    folder = run[0] / "hf"
    theirs = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Name it.<|im_end|>\n"
    ids = np.array([tokenizer(text)["input_ids"]])
    pixels = np.random.default_rng(0).normal(size=(4, 1536)).astype(np.float32)
    grid = np.array([[1, 2, 2]])
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(ids),
            mm_token_type_ids=torch.tensor((ids == theirs.config.image_token_id).astype(int)),
            pixel_values=torch.tensor(pixels),
            image_grid_thw=torch.tensor(grid),
        ).logits.numpy()
    got = from_pretrained(folder).logits(ids, pixel_values=pixels, image_grid_thw=grid)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_same_seed_same_metrics_other_seed_differs(run, cache, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert start(again, cache, "--steps", "3", settings=QUICK).returncode == 0
    assert start(other, cache, "--steps", "1", "--seed", "1", settings=QUICK).returncode == 0
    first = [untimed(record) for record in metrics(run[0])]
    assert [untimed(record) for record in metrics(again)] == first
    assert untimed(metrics(other)[0]) != first[0]


def test_resume_continues_where_the_run_stopped(run, cache, tmp_path):
    """A run cut after its second checkpoint ends with the metrics of the uninterrupted one."""
    cut = tmp_path / "cut"
    shutil.copytree(run[0], cut)
    # Steps 0 and 1 have moved weights and moments; step 2 shows whether they came back.
    shutil.rmtree(cut / "checkpoints" / "3")
    done = start(cut, cache, "--steps", "3", "--resume", "must", settings=QUICK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [untimed(r) for r in metrics(cut)] == [untimed(r) for r in metrics(run[0])]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--steps", "3", "--resume", "never"), "--workdir"),
        (("--steps", "3", "--seed", "7"), "seed=0, not 7"),
        (("--steps", "1"), "already at step 3"),
    ],
    ids=["resume never", "another seed", "fewer steps"],
)
def test_a_workdir_is_not_overwritten(run, cache, arguments, named):
    done = start(run[0], cache, *arguments)
    assert done.returncode == 1 and named in done.stderr
    assert len(metrics(run[0])) == 3
    assert json.loads((run[0] / "config.json").read_text())["steps"] == 3


def write_video(path, frames, size):
    """An mp4 of drifting colours."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 2.0, size)
    for number in range(frames):
        writer.write(np.full((size[1], size[0], 3), (9 * number % 255, 80, 200), np.uint8))
    writer.release()


def test_own_videos_of_any_size_and_length(cache, tmp_path):
    """Two shapes of frames and a video shorter than K, through another recipe."""
    write_video(tmp_path / "wide.mp4", 40, (96, 64))
    write_video(tmp_path / "tall.mp4", 3, (64, 128))
    lines = ["video,question,answer,question_type"]
    lines += [f"{name}.mp4,What colour is it?,red,oe" for name in ("wide", "tall", "wide")]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    own = ["--recipe", "needle_grpo", "--data", str(tmp_path / "own.csv"), "--steps", "1"]
    sizes = ["data.min_pixels=1024", "data.max_pixels=8192", "data.frame_budgets=4,8"]
    done = start(tmp_path / "own", cache, *own, settings=["evaluation.rows=0", *sizes, *QUICK])
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = metrics(tmp_path / "own")
    assert record["logprob/gap_max"] < 1e-4 and record["kl"] == pytest.approx(0, abs=1e-6)


def test_an_unreadable_video_is_one_line(cache, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    lines = "video,question,answer,question_type\nbroken.mp4,What?,red,oe\n"
    (tmp_path / "bad.csv").write_text(lines)
    done = start(tmp_path / "bad", cache, "--data", str(tmp_path / "bad.csv"))
    assert done.returncode == 1
    assert "broken.mp4" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_cold_start_from_random_weights_and_its_resume(cache, tmp_path):
    recipe = ("--recipe", "needle_sft")
    settings = ("evaluation.rows=0", "optimizer.decay=constant")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = start(whole, cache, *recipe, "--steps", "3", settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (whole / "hf" / "model.safetensors").exists()
    assert start(cut, cache, *recipe, "--steps", "2", settings=settings).returncode == 0
    assert start(cut, cache, *recipe, "--steps", "3", settings=settings).returncode == 0
    assert [untimed(r) for r in metrics(cut)] == [untimed(r) for r in metrics(whole)]
