"""The whole path through the real command: mp4 -> Grain -> rollouts -> PARA-GRPO -> folder.

One short RL run is shared by the tests of this module.
"""

import json
import resource
import shutil
import signal

import numpy as np
import pytest

from tests.support.command import (
    CONTRACT,
    SMALL,
    command,
    disturb,
    documented,
    is_saving,
    logged,
    metrics,
    run_anew,
    saved,
    send,
    start,
    untimed,
)
from tests.support.command import run as run_command
from tests.support.videos import write_video

pytestmark = pytest.mark.slow

FIGURE = "sampled/accuracy"
EVALUATED = ("evaluation.every=1", f"evaluation.best={FIGURE}", "rl.sight_every=2")
QUICK = ("output.export_hf=false",)
FULL_BYTES = 300_000
"""More than logs and rollouts take, and less than the weights."""


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """Three RL steps from the committed cold start, each evaluated."""
    workdir = tmp_path_factory.mktemp("run") / "first"
    sets = [*SMALL, *EVALUATED, f"data.cache_dir={cache}"]
    done = run_anew(command(workdir, "--steps", "3", sets=sets), cache)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_metrics_hold_the_contract(run):
    workdir, _ = run
    records = metrics(workdir)
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records:
        assert set(record) >= CONTRACT
        assert all(map(documented, record)), "docs/metrics.md explains what a run tells"
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
    assert "4 test questions" in output and "95 % interval" in output and "1 event" in output
    assert json.loads((workdir / "config.json").read_text())["steps"] == 3
    assert (workdir / "checkpoints" / "3").is_dir()
    assert list((workdir / "tensorboard").iterdir())
    lines = (workdir / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    rollouts = [json.loads(line) for line in lines]
    assert len(rollouts) == 4 and all(r["rewards"]["total"] is not None for r in rollouts)
    figures = json.loads((workdir / "evaluation.json").read_text())
    assert set(figures["before"]) == {"sampled", "greedy", "no crops"} == set(figures["after"])
    greedy = figures["after"]["greedy"]
    assert greedy["accuracy/low"] <= greedy["accuracy"] <= greedy["accuracy/high"]
    assert greedy["accuracy/videos"] == 4


def test_every_step_has_its_figures(run):
    workdir, _ = run
    *earlier, last = metrics(workdir)
    told = json.loads((workdir / "evaluation.json").read_text())["after"]
    for mode in ("sampled", "greedy", "no crops"):
        name = mode.replace(" ", "_")
        assert all(0 <= record[f"evaluation/{name}/accuracy"] <= 1 for record in earlier)
        assert last[f"evaluation/{name}/accuracy"] == told[mode]["accuracy"]
        assert last[f"evaluation/{name}/accuracy/low"] == told[mode]["accuracy/low"]
    assert earlier[0]["time/evaluate"] > 0


def test_the_best_weights_are_kept(run):
    workdir, _ = run
    best = json.loads((workdir / "best.json").read_text())
    figures = [record[f"evaluation/{FIGURE}"] for record in metrics(workdir)]
    assert best["figure"] == FIGURE and best["value"] == max(figures)
    assert best["step"] == 1 + figures.index(max(figures)), "the first of the best"
    weights = (workdir / "best" / "model.safetensors").read_bytes()
    assert (weights == (workdir / "hf" / "model.safetensors").read_bytes()) == (best["step"] == 3)
    assert (workdir / "best" / "tokenizer.json").is_file()


def test_sight_is_measured_when_it_is_due(run):
    first, second, third = metrics(run[0])
    kinds = {f"sight/{what}{how}" for what in ("answer", "report") for how in ("", "_blind")}
    assert kinds <= set(first) & set(third) and all(first[name] < 0 for name in kinds)
    assert not kinds & set(second)


@pytest.mark.study
def test_a_figure_that_there_is_not_is_named(cache, tmp_path):
    settings = ("evaluation.every=1", "evaluation.best=greedy/wit")
    done = start(tmp_path / "run", cache, "--steps", "1", settings=settings)
    assert done.returncode == 1
    assert "evaluation.best=greedy/wit" in done.stderr and "greedy/accuracy" in done.stderr


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


@pytest.mark.study
def test_another_seed_is_another_run(run, cache, tmp_path):
    """That the same seed is the same one is held below."""
    other, quick = tmp_path / "other", (*QUICK, "evaluation.rows=0")
    assert start(other, cache, "--steps", "1", "--seed", "1", settings=quick).returncode == 0
    assert metrics(other)[0]["loss"] != metrics(run[0])[0]["loss"]


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.study)])
def test_a_run_that_is_stopped_ends_like_one_that_was_not(run, cache, tmp_path, killed):
    """SIGTERM within a step saves what came before it; SIGKILL costs the steps since; then
    `--workdir` alone goes on."""
    cut = tmp_path / "cut"
    quick = (*QUICK, *EVALUATED, "output.checkpoint_every=0", "output.checkpoint_minutes=0")
    code, said = send(
        *(signal.SIGTERM, lambda: logged(cut) > 0, cut, cache, "--steps", "3"), settings=quick
    )
    assert code == 0, said
    assert f"SIGTERM: interrupted; continue with --workdir {cut}" in said
    assert f"the page of the run: {cut}/report/index.html" in said
    assert (cut / "report" / "index.html").exists()
    assert [path.name for path in (cut / "checkpoints").iterdir()] in (["1"], ["2"])
    assert list(json.loads((cut / "evaluation.json").read_text())) == ["of", "before"]
    if killed:
        before = (cut / "evaluation.json").stat().st_mtime_ns
        send(signal.SIGKILL, lambda: logged(cut) == 3, cut, cache, settings=quick)
        assert (cut / "evaluation.json").stat().st_mtime_ns == before, "before is evaluated once"
    done = run_command(command(cut, sets=()), cache)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [untimed(r) for r in metrics(cut)] == [untimed(r) for r in metrics(run[0])]
    assert saved(cut, 3) == saved(run[0], 3), "all weights and moments, bit by bit"
    for name in ("evaluation.json", "best.json"):
        assert json.loads((cut / name).read_text()) == json.loads((run[0] / name).read_text())


@pytest.mark.study
def test_a_full_disk_is_one_line_and_costs_the_steps_since_the_last_checkpoint(
    run, cache, tmp_path
):
    """Files that may not grow beyond a size stand in for the disk, from step 2 on."""
    full = tmp_path / "full"
    shutil.copytree(run[0], full)
    for step in ("2", "3"):
        shutil.rmtree(full / "checkpoints" / step)

    def fill(process):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FULL_BYTES, FULL_BYTES))

    code, said = disturb(fill, lambda: True, full, cache)
    assert code == 1, said
    line = said.splitlines()[-1]
    assert said.count("rror") == 1 and line.startswith("error: checkpoint "), said
    assert "(File too large)" in line and str(full) in line and "--workdir" in line
    assert "Traceback" not in said
    whole = [path.name for path in (full / "checkpoints").iterdir() if path.name.isdigit()]
    assert whole == ["1"], "the last good one stays; that it goes on from there is held above"


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


def test_own_videos_of_any_size_and_length(cache, tmp_path):
    """Two shapes of frames and a video shorter than K, through another recipe."""
    write_video(tmp_path / "wide.mp4", frames=40, rate=2.0, size=(96, 64))
    write_video(tmp_path / "tall.mp4", frames=3, rate=2.0, size=(64, 128))
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


@pytest.mark.study
def test_cold_start_from_random_weights_and_its_resume(cache, tmp_path):
    recipe = ("--recipe", "needle_sft")
    settings = ("evaluation.rows=0", "optimizer.decay=constant")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = start(whole, cache, *recipe, "--steps", "3", settings=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (whole / "hf" / "model.safetensors").exists()
    code, said = send(
        *(signal.SIGKILL, lambda: is_saving(cut), cut, cache, *recipe, "--steps", "3"),
        settings=settings,
    )
    assert code == -signal.SIGKILL, said
    assert run_command(command(cut, sets=()), cache).returncode == 0
    assert [untimed(r) for r in metrics(cut)] == [untimed(r) for r in metrics(whole)]
    assert saved(cut, 3) == saved(whole, 3)
