"""Supervised steps on conversations through the real command: files -> packs -> steps -> folder."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata

from models import convert
from tests.support.command import TIMED, command, metrics, run, untimed
from tests.support.hosts import on_hosts
from tests.support.paravt_parquet import VIDEOS, write_paravt
from train import setup
from train.checks import describe_conversations
from train.compile.cache import Compilations
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.run import Run
from train.settings.override import override
from train.sft.conversations import open_conversations

pytestmark = pytest.mark.slow

SMALL = (
    "model.compute_dtype=float32",
    "model.remat=false",
    "sft.packing.tokens=384",
    "sft.packing.frames=24",
    "sft.packing.rows=2",
    "sft.packing.bins=2",
    "sft.micro_rows=1",
    "sft.packing.max_frames=4",
    "data.frames_as=video",
    "data.min_pixels=1024",
    "data.max_pixels=1024",
    "optimizer.warmup_steps=1",
    "output.checkpoint_every=1",
    "data.max_rejected=0.5",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Path(write_paravt(str(tmp_path_factory.mktemp("paravt"))))


def steps(workdir, data, settings=()):
    """Two steps by the command."""
    sets = [f"data.cache_dir={data / 'cache'}", *SMALL, *settings]
    arguments = ["--recipe", "paravt_sft", "--model", str(COLD_START), "--data", str(data)]
    return command(workdir, *arguments, "--steps", "2", sets=sets)


def start(workdir, data, settings=()):
    """The same, run on one device."""
    return run(steps(workdir, data, settings), data)


def records(workdir):
    """Figures of all steps, but for how much was read for them: rows that were open are read anew
    by a resume."""
    figures = [untimed(record) for record in metrics(workdir)]
    return [{n: v for n, v in own.items() if not n.startswith("hosts/")} for own in figures]


def test_two_steps_from_parquet_and_a_resume_that_repeats_the_second(data, tmp_path):
    whole = tmp_path / "whole"
    done = start(whole, data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 4 rows cannot be used" in done.stdout
    first, second = records(whole)
    assert 0 < first["data/epoch"] <= second["data/epoch"]
    assert 0.3 < first["data/fill"] <= 1 and first["data/conversations"] >= 2
    assert first["grad_norm"] > 0 and second["loss"] != first["loss"]
    assert (whole / "hf" / "model.safetensors").exists()
    check_export(whole, tmp_path / "converted")
    shutil.rmtree(whole / "checkpoints" / "2")
    done = start(whole, data, settings=("output.export_hf=false",))
    assert done.returncode == 0, done.stderr[-3000:]
    assert records(whole) == [first, second]


@pytest.mark.study
def test_hosts_give_the_run_of_one_and_read_half_of_it_each(data, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    settings = ("sft.micro_rows=2", "output.export_hf=false")
    assert start(alone, data, settings).returncode == 0
    on_hosts(steps(together, data, settings))
    for one, two in zip(metrics(alone), metrics(together), strict=True):
        for name, value in one.items():
            if not name.startswith((*TIMED, "hosts/")):
                np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        assert two["hosts/sent_mib"] > one["hosts/sent_mib"] == 0
    made, shared = (
        sum(record["hosts/overviews"] for record in metrics(folder)) for folder in (alone, together)
    )
    print(f"\nconversations: {made:g} by one, {shared:g} by the busier of two")
    assert shared <= made / 2 + 1


def shown(folder):
    """Grid of eight frames, and how many frames of a minute are sampled, as transformers has it."""
    processor = AutoProcessor.from_pretrained(folder).video_processor
    clip = np.zeros((8, 3, 96, 64), np.uint8)
    grid = processor(videos=[clip], do_sample_frames=False)["video_grid_thw"]
    minute = VideoMetadata(total_num_frames=1800, fps=30.0)
    return grid.tolist(), len(processor.sample_frames(minute))


def check_export(workdir, converted):
    """Both ways to a folder for serving tell transformers how the run showed videos (`SMALL`)."""
    assert convert.main(["to-hf", str(workdir), str(converted)]) == 0
    assert shown(COLD_START) == ([[4, 6, 4]], 120)
    for folder in (workdir / "hf", converted):
        assert shown(folder) == ([[4, 2, 2]], 4)
        settings = json.loads((folder / "video_preprocessor_config.json").read_text())
        assert settings["video_marks"] == "outer"
        assert settings["video_marks_as_in"] == "transformers>=5.10"


def recipe(path, *settings):
    config = get_recipe("paravt_sft")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path)))
    return override(config, list(settings))


def test_own_conversations_from_jsonl_are_described(tmp_path):
    said = [
        {"role": "user", "content": "Which colour is a ripe tomato?"},
        {"role": "assistant", "content": "<think>Easy.</think><answer>red</answer>"},
    ]
    (tmp_path / "own.jsonl").write_text(5 * (json.dumps({"messages": said}) + "\n"))
    found = open_conversations(recipe(tmp_path / "own.jsonl").data)
    assert describe_conversations(found) == "5 conversations, 0 videos"


def test_a_bad_file_is_refused_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.Parts, "params", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "own.jsonl").write_text("{}\n")
    config = recipe(tmp_path / "own.jsonl", f"model.folder={COLD_START}")
    with pytest.raises(ValueError, match=r"own\.jsonl"):
        Run(config, tmp_path / "run", setup.open_mesh(config), Compilations())


def test_subtitles_that_no_video_has_are_refused(data):
    with pytest.raises(ValueError, match="no video has subtitles"):
        open_conversations(recipe(data, "data.subtitles=true", "data.max_rejected=0.5").data)
    (data / VIDEOS[0]).with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello.\n")
    assert (
        len(
            open_conversations(
                recipe(data, "data.subtitles=true", "data.max_rejected=0.5").data
            ).rows
        )
        == 3
    )


@pytest.mark.parametrize(
    "setting, named",
    [
        ("evaluation.rows=4", "no questions to evaluate"),
        ("sft.packing.learn=all", "assistant or special"),
        ("sft.packing.fit=worst", "first or best"),
        ("sft.packing.fps=0", "above 0"),
        ("sft.packing.rows=0", "at least 1"),
        ("sft.micro_rows=3", "does not divide"),
        ("sft.task_masks=0.1", "no effect"),
        ("data.workers=2", "no effect"),
        ("model.router_balance=0.1", "several"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, named):
    with pytest.raises(ValueError, match=named):
        override(get_recipe("paravt_sft"), [setting])


def test_tasks_and_packs_exclude_one_another():
    with pytest.raises(ValueError, match="take --recipe paravt_sft"):
        override(get_recipe("needle_sft"), ["sft.packing.rows=4"])
    with pytest.raises(ValueError, match="reads no conversations"):
        override(get_recipe("needle_sft"), ["data.path=somewhere"])
