"""Twenty rows of each split in its published schema, by the real command.

A tiny model answers them; what is held is the way from the published file to the report: prompts
byte by byte, a line and a figure for each, open answers by a judge, lmms-eval's files beside them.
"""

import json
import os
import sys

import pytest

from evaluate.benchmarks import protocol, schemas
from evaluate.benchmarks.captions import Seen
from tests.support import benchmark_rows as rows
from tests.support.command import ROOT, run
from tests.support.judge_server import completion, running
from train.recipes.needle import COLD_START

pytestmark = pytest.mark.slow
DOOR = str(ROOT / "evaluate" / "main.py")
JUDGED, WINDOWS = "mmvu_val", "timelens_charades"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return rows.write_splits(tmp_path_factory.mktemp("splits"))


@pytest.fixture(scope="module")
def brief(tmp_path_factory):
    """lmms-eval's default in all but the length of answers: the model knows no end."""
    path = tmp_path_factory.mktemp("protocols") / "brief.toml"
    short = "".join(f"[task.{task}.decoding]\nmax_new_tokens = 8\n" for task in rows.TASKS)
    path.write_text('extends = "lmms-eval"\n' + short)
    return str(path)


def evaluate(root, workdir, tasks, name, *more):
    """Lines and report of an evaluation."""
    own = ["--model", str(COLD_START), "--data", str(root), "--workdir", str(workdir)]
    asked = ["--benchmarks", ",".join(tasks), "--protocol", name, "--batch", "20", *more]
    done = run([sys.executable, DOOR, *own, *asked], root)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    return lines, json.loads((workdir / "report.json").read_text())


def check_prompts(root, task, lines):
    """Each row has been put to the model, in the words of the fact sheet."""
    asked = {sample.sample_id: sample for sample in schemas.load(task, str(root)).samples}
    found = {line["sample_id"]: line for line in lines if line["task"] == task}
    assert found.keys() == asked.keys() and len(found) == rows.ROWS
    for key, line in found.items():
        assert line["prompt"] == rows.EXPECTED[task](asked[key].doc)
        assert line["frames"] == 32


def check_figures(workdir, task, lines, report):
    """The headline stands in the report and in lmms-eval's files."""
    own = [line for line in lines if line["task"] == task]
    assert all(line["status"] == "ok" and 0.0 <= line["score"] <= 1.0 for line in own)
    metric, name = report["tasks"][task]["headline"], report["protocol"]["name"]
    row = next(row for row in report["rows"] if (row["task"], row["name"]) == (task, metric))
    assert row["samples"] == rows.ROWS and row["clusters"] == 3 and row["protocol"] == name
    told = json.loads((workdir / "results.json").read_text())["results"][task]
    assert told[f"{metric},none"] == row["value"]
    stem = f"{name.replace('/', '_')}_{report['mode']}_samples_{task}.jsonl"
    assert len((workdir / stem).read_text().splitlines()) == rows.ROWS


def verdicts(body, number):
    """Of the numbered questions: the first ends in a refusal, the second in words, the others are
    right."""
    question = body["messages"][0]["content"].splitlines()[0]
    if question.endswith("step 3?"):
        return 400, b"no", 0
    return 200, completion("perhaps" if question.endswith("step 4?") else "1.0"), 0


@pytest.fixture(scope="module")
def judged(root, brief, tmp_path_factory):
    """Choices, open questions and windows; what the judge was asked."""
    workdir = tmp_path_factory.mktemp("judged") / "run"
    with running() as serve:
        service = serve(verdicts)
        judge = "--judge", service.settings().url, "--judge-model", "judge-1"
        came = evaluate(root, workdir, (JUDGED, WINDOWS), brief, *judge, "--sight", "0")
        return workdir, *came, service.requests


def test_two_splits(root, judged):
    workdir, lines, report, _ = judged
    for task in (JUDGED, WINDOWS):
        check_prompts(root, task, lines)
    check_figures(workdir, WINDOWS, lines, report)


def test_a_judge_decides_open_questions_and_its_failures_are_errors(judged):
    _, lines, report, requests = judged
    opened = {line["doc_id"]: line for line in lines if line["kind"] == "open"}
    assert len(opened) == len(requests) == 8
    assert all(body["model"] == "judge-1" for _, _, body in requests)
    for number, line in opened.items():
        failed = {3: "status 400", 4: "no verdict"}.get(number)
        if failed:
            assert (line["status"], line["score"]) == ("error", None) and failed in line["error"]
        else:
            assert (line["status"], line["score"], line["method"]) == ("ok", 1.0, "judge")
    told = report["tasks"][JUDGED]
    assert report["judge"] == "judge-1" and told["judged"] == 6
    assert sum(told["errors"].values()) == 2 and told["headline"] is None, "two of twenty"
    figures = {row["name"]: row for row in report["rows"] if row["task"] == JUDGED}
    assert (figures["accuracy/open"]["value"], figures["accuracy/open"]["samples"]) == (1.0, 6)


@pytest.mark.study
def test_every_split(root, brief, tmp_path):
    lines, report = evaluate(root, tmp_path / "run", rows.TASKS, brief, "--sight", "0")
    for task in rows.TASKS:
        check_prompts(root, task, lines)
        check_figures(tmp_path / "run", task, lines, report)


SHORT = """
[all.video]
min_pixels = 1024
max_pixels = 1024
[all.agent]
crop_frames = 2
crop_min_pixels = 1024
crop_max_pixels = 1024
[mode.agentic.agent]
rounds = 1
calls_per_turn = 2
[mode.sequential.agent]
rounds = 1
"""
KINDS = ("videomme_w_subtitle", JUDGED, WINDOWS)
PUT = {
    ("lmms-eval/qwen3_vl", "direct"): rows.TASKS,
    ("vlmevalkit", "direct"): rows.TASKS,
    ("vlmevalkit/1fps", "direct"): KINDS,
    ("qwen-report", "reasoning"): (*KINDS, "lvbench"),
    ("paravt-release", "agentic"): KINDS,
    ("paravt", "agentic"): KINDS,
    ("paravt", "direct"): KINDS,
    ("paravt", "reasoning"): KINDS,
    ("paravt", "sequential"): KINDS,
}
"""Tasks that are put by a protocol in a mode; of each only those that it knows."""


@pytest.mark.study
@pytest.mark.parametrize("put", PUT, ids="-".join)
def test_every_protocol_and_mode(put, root, tmp_path):
    """Two rows of each task, in the words of the protocol; shown small and answered in few words,
    as the model reads no more than 4096 tokens."""
    name, mode = put
    loaded = protocol.load(name)
    tasks = [task for task in PUT[put] if task in loaded.tasks]
    brief = "".join(f"[task.{task}.decoding]\nmax_new_tokens = 8\n" for task in tasks)
    (tmp_path / "short.toml").write_text(f'extends = "{name}"\n{SHORT}{brief}')
    flags = "--mode", mode, "--limit", "2", "--sight", "0"
    lines, report = evaluate(root, tmp_path / "run", tasks, str(tmp_path / "short.toml"), *flags)
    assert len(lines) == 2 * len(tasks)
    assert {line["status"] for line in lines} == {"ok"}, [line["error"] for line in lines]
    assert all(report["tasks"][task]["headline"] for task in tasks)
    asked = {(s.task, s.sample_id): s for t in tasks for s in schemas.load(t, str(root)).samples}
    for line in lines:
        sample = asked[line["task"], line["sample_id"]]
        rules = loaded.rules(sample.task, sample.kind, mode)
        total = round(rows.RATE * rows.LENGTHS[os.path.basename(sample.video).partition(".")[0]])
        seen = Seen(rules.video.indices(total, rows.RATE), total, rows.RATE)
        assert line["prompt"] == rules.messages(sample, seen).text
        assert line["frames"] == len(seen.indices)
