"""`python evaluate/main.py` on a small needle world: whole, killed, in shards."""

import dataclasses
import json
import random
import signal
import sys
import time
from pathlib import Path

import pytest

from evaluate.benchmarks import results
from evaluate.benchmarks.protocol import load
from evaluate.benchmarks.sample import Kind
from evaluate.needle import load_needle
from evaluate.prompts import SamplePrompts
from pipelines.render import ChatRenderer
from pipelines.video import VideoReader
from rollout.tools import agent_tools
from tests.support.command import ROOT, environment, run, server
from train.recipes import get_recipe
from train.recipes.needle import COLD_START
from train.settings.override import based_on, to_dict
from train.setup import Parts

pytestmark = pytest.mark.slow
DOOR = str(ROOT / "evaluate" / "main.py")
COUNT = 12
"""Questions."""
TIMED = ("seconds", "seconds_per_sample")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The workdir of a run on a world of eight held-out videos, which has left the cold start."""
    workdir = tmp_path_factory.mktemp("run")
    config = based_on(get_recipe("needle_rl"), {"data.held_out_videos": 8, "data.train_videos": 12})
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    (workdir / "hf").symlink_to(COLD_START)
    return workdir


def flags(model: Path, cache: Path, workdir: Path, *more: str) -> list[str]:
    own = ["--model", str(model), "--data", str(cache), "--workdir", str(workdir)]
    asked = ["--protocol", "needle", "--benchmarks", "needle_held_out", "--limit", str(COUNT)]
    return [*own, *asked, "--batch", "4", "--sight", "1", *more]


def evaluate(model: Path, cache: Path, workdir: Path, *more: str) -> str:
    done = run([sys.executable, DOOR, *flags(model, cache, workdir, *more)], cache)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(model, cache, tmp_path_factory):
    """An evaluation from beginning to end, and what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "evaluation"
    return workdir, evaluate(model, cache, workdir)


def untimed(value):
    """A report without what a second run does not repeat."""
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if name not in TIMED}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def report(workdir: Path):
    return untimed(json.loads((workdir / "report.json").read_text()))


def lines(workdir: Path, name="samples.jsonl") -> list[dict]:
    return [untimed(dataclasses.asdict(found)) for found in results.read(workdir / name)]


def test_every_sample_has_a_line_and_the_report_its_figures(whole):
    workdir, said = whole
    answered = lines(workdir)
    assert len({line["sample_id"] for line in answered}) == len(answered) == COUNT
    assert all(line["status"] == "ok" and line["frames"] == 4 for line in answered)
    assert sum(line["calls"] for line in answered) > 0 < sum(line["score"] for line in answered)
    mean = sum(line["score"] for line in answered) / COUNT
    (row,) = (row for row in report(workdir)["rows"] if row["name"] == "accuracy")
    assert row["value"] == pytest.approx(mean) and row["low"] < mean < row["high"]
    assert row["protocol"] == "needle" and row["decoding"].startswith("greedy")
    assert "the device waited" in said and "needle_held_out" in said


def test_prompts_are_those_of_training_token_for_token(cache, model):
    config = get_recipe("needle_rl")
    parts = Parts(config)
    world = {"train_videos": 12, "held_out_videos": 8, "cache_dir": str(cache)}
    data = dataclasses.replace(config.data, **world)
    rules = load("needle").rules("needle_held_out", Kind.OPEN, "agentic")
    tools = [dict(tool.schema) for tool in agent_tools(config.agent).values()]
    renderer = ChatRenderer.from_folder(str(COLD_START), pixels=(1024, 1024), tools=tools)
    make = SamplePrompts(rules, renderer, VideoReader(spec=renderer.spec), "")
    for sample in load_needle("needle_held_out", data).samples[:6]:
        ready = make(sample)
        row, frames, prompt = ready.item
        shown = parts.reader.overview(row.video, 4)
        own = parts.renderer.main_prompt(row, shown, tools=True)
        assert prompt.tokens.tolist() == own.tokens.tolist()
        assert (prompt.patches.values == own.patches.values).all()
        assert make.size(sample) == (len(prompt.tokens), prompt.patches.values.shape[1])
        assert (frames, ready.pixels, ready.words) == (4, 1024, row.question)


@pytest.mark.study
def test_killed_at_a_random_moment_and_in_shards_it_comes_to_the_same_report(
    whole, model, cache, tmp_path
):
    """`test_evaluate_kills.py` kills one six times."""
    workdir, shard = tmp_path / "evaluation", ("--shard", "2/2")
    own, wanted = workdir / "samples-2-of-2.jsonl", random.Random(7).randrange(1, COUNT // 2 - 1)
    child = server().start(DOOR, flags(model, cache, workdir, *shard), cache, environment())
    until = time.monotonic() + 300
    while not child.ended and time.monotonic() < until and _written(own) < wanted:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = own.read_bytes()
    assert wanted <= _written(own) < COUNT // 2
    with own.open("ab") as file:
        file.write(b'{"task": "needle_held_out", "sample_id": "held_o')  # in the midst of a line
    said = evaluate(model, cache, workdir, *shard)
    assert own.read_bytes().startswith(kept), "what was written stays"
    assert f"{COUNT // 2} questions are left to others" in said
    assert not (workdir / "report.json").exists()
    evaluate(model, cache, workdir, "--shard", "1/2")
    assert report(workdir) == report(whole[0])
    assert lines(workdir) == sorted(lines(whole[0]), key=lambda line: line["doc_id"])
    assert len(lines(workdir, own.name)) == COUNT // 2


def test_what_cannot_be_put_is_an_error_and_no_score(model, cache, tmp_path):
    """Without tools, so that what is put has one turn."""
    video = next(cache.rglob("held_out/*.mp4"))
    (tmp_path / "broken.mp4").write_bytes(video.read_bytes()[:3000])
    rows = [
        {"video": str(video.name), "question": "What colour is the cross?", "answer": "red"},
        {"video": "nowhere.mp4", "question": "What colour is the cross?", "answer": "red"},
        {"video": "broken.mp4", "question": "What colour is the cross?", "answer": "red"},
        {"video": str(video.name), "question": "What is <|im_end|>?", "answer": "red"},
        {"video": str(video.name), "question": "word " * 5000, "answer": "red"},
        {"video": str(video.name)},
    ]
    (tmp_path / video.name).write_bytes(video.read_bytes())
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--protocol", "needle", "--benchmarks", str(tmp_path / "mine.jsonl")]
    own = ["--model", str(model), "--workdir", str(tmp_path / "evaluation")]
    direct = ["--mode", "direct", "--frames", "8"]
    done = run([sys.executable, DOOR, *own, *asked, *direct], tmp_path)
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "evaluation")
    assert len(found) == 5
    found.sort(key=lambda line: line["doc_id"])
    assert (found[0]["turns"], found[0]["calls"], found[0]["frames"]) == (1, 0, 8)
    reasons = [line["error"] for line in found]
    assert reasons[0] == "" and "no such file" in reasons[1] and "broken.mp4" in reasons[2]
    assert "control token" in reasons[3] and "context overflow" in reasons[4]
    (row, *_) = report(tmp_path / "evaluation")["rows"]
    assert (row["protocol"], row["mode"], row["frames"]) == ("needle+8frames", "direct", "8")
    told = report(tmp_path / "evaluation")["tasks"]["mine"]
    assert told["headline"] is None and told["questions"] == 6
    assert sum(told["errors"].values()) == 5


def test_a_folder_holds_one_evaluation(whole, model, cache):
    more = flags(model, cache, whole[0], "--mode", "direct")
    done = run([sys.executable, DOOR, *more], cache)
    assert done.returncode == 1 and "mode='agentic', not 'direct'" in done.stderr


def _written(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
