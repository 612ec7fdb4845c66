"""Supervised steps on conversations through the real command: files -> packs -> steps -> folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paravt_fixture import write_paravt

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "train" / "assets" / "needle_sft"
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
    "data.min_pixels=1024",
    "data.max_pixels=1024",
    "optimizer.warmup_steps=1",
    "optimizer.decay=constant",
    "output.checkpoint_every=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Path(write_paravt(str(tmp_path_factory.mktemp("paravt"))))


def start(workdir, data, *arguments, settings=()):
    sets = [f"data.cache_dir={data / 'cache'}", *SMALL, *settings]
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--recipe", "paravt_sft"]
    command += ["--model", str(MODEL), "--workdir", str(workdir), *arguments]
    command += [part for text in sets for part in ("--set", text)]
    return subprocess.run(
        command, cwd=data, env=os.environ, capture_output=True, text=True, timeout=600
    )


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in records]


def test_two_steps_from_parquet_and_their_resume(data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = start(whole, data, "--data", str(data), "--steps", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 of 4 rows cannot be used" in done.stdout
    first, second = metrics(whole)
    assert 0.3 < first["data/fill"] <= 1 and first["data/conversations"] >= 2
    assert first["grad_norm"] > 0 and second["loss"] != first["loss"]
    assert (whole / "hf" / "model.safetensors").exists()
    quick = ("output.export_hf=false",)
    again = ("--data", str(data), "--steps")
    assert start(cut, data, *again, "1", settings=quick).returncode == 0
    assert start(cut, data, *again, "2", settings=quick).returncode == 0
    assert metrics(cut) == [first, second]


def test_own_conversations_from_jsonl(data, tmp_path):
    said = [
        {"role": "user", "content": "Which colour is a ripe tomato?"},
        {"role": "assistant", "content": "<think>Easy.</think><answer>red</answer>"},
    ]
    (tmp_path / "own.jsonl").write_text(5 * (json.dumps({"messages": said}) + "\n"))
    done = start(tmp_path / "run", data, "--data", str(tmp_path / "own.jsonl"), "--dry-run")
    assert done.returncode == 0 and "5 conversations, 0 videos" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "setting, named",
    [
        ("data.subtitles=true", "no video of --data has subtitles"),
        ("sft.packing.tokens=40", "sft.packing.skip"),
        ("evaluation.rows=4", "no questions to evaluate"),
        ("sft.packing.learn=all", "assistant, special"),
        ("sft.micro_rows=3", "does not divide"),
    ],
)
def test_what_cannot_be_learned_is_one_line(data, tmp_path, setting, named):
    done = start(tmp_path / "run", data, "--data", str(data), settings=[setting])
    assert done.returncode in (1, 2)
    assert named in done.stderr and len(done.stderr.strip().splitlines()) == 1
