"""What a page holds is what the run wrote: `metrics.jsonl`, rollouts and details."""

import json
from urllib.parse import unquote

import numpy as np
import pytest

from tests.support.page_run import some_groups, write_run, write_settings
from train.report.page.figures import RolloutFigures, interval
from train.report.page.write import write_page
from train.rl.scoring import rollout_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = write_run(tmp_path_factory.mktemp("page") / "run")
    return workdir, write_page(workdir).parent


def data(report, name):
    return json.loads((report / "data" / f"{name}.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_those_of_the_run(run):
    workdir, report = run
    told = data(report, "run")["metrics"]
    for at, record in enumerate(lines(workdir / "metrics.jsonl")):
        assert {name: values[at] for name, values in told.items()} == record


def test_the_index_is_the_rollouts(run):
    workdir, report = run
    told = data(report, "index")
    written = [
        (step, line)
        for step in (0, 1)
        for line in lines(workdir / "rollouts" / f"step_{step:06d}.jsonl")
    ]
    assert told["step"] == [step for step, _ in written]
    assert told["reward"] == [line["rewards"]["total"] for _, line in written]
    assert told["calls"] == [line["calls"] for _, line in written]
    assert told["hits"] == [1, 0, 0, 0, 0, 0] * 2
    assert [told["questions"][at] for at in told["question"]] == [w["question"] for _, w in written]
    assert [told["types"][at] for at in told["type"]] == [w["question_type"] for _, w in written]


def test_a_step_is_its_rollouts_and_details(run):
    workdir, report = run
    told = data(report, "step_000001")
    own = [rollout for group in told["groups"] for rollout in group["rollouts"]]
    written = lines(workdir / "rollouts" / "step_000001.jsonl")
    details = lines(workdir / "details" / "step_000001.jsonl")
    assert len(own) == len(written) == len(details) == 6
    for shown, line, more in zip(own, written, details, strict=True):
        for name in ("text", "said", "rewards", "generated", "stop_reasons"):
            assert shown[name] == line[name]
        assert "".join(shown["pieces"]) == line["text"]
        assert {n: v for n, v in shown["values"].items() if n != "sampler"} == more["values"]
        assert all(len(v) == sum(line["generated"]) for v in shown["values"].values())
        assert [{k: v for k, v in c.items() if k != "crop"} for c in shown["calls"]] == line[
            "tool_calls"
        ]
        assert [call["crop"] for call in shown["calls"]] == more["crops"]
    for group in told["groups"]:
        assert (report / "frames" / group["sheet"]["file"]).stat().st_size > 0
        assert "/" not in group["video"], "where a video lay is nobody's business"


def test_scripts_and_json_say_the_same(run):
    for path in sorted((run[1] / "data").glob("*.json")):
        script = path.with_suffix(".js").read_text()
        head = f'paravt.receive("{path.stem}", '
        assert script.startswith(head) and script.endswith(");\n")
        assert json.loads(script[len(head) : -3]) == json.loads(path.read_text())


def test_bands_are_around_the_metric(run):
    told, metrics = data(run[1], "run")["bands"], rollout_metrics(some_groups())
    for name, bands in told.items():
        for step, (at, low, high) in enumerate(bands):
            assert at == step and (low + high) / 2 == pytest.approx(metrics[name])
    assert set(told) >= {"reward/total", "format/compliance", "tool/calls_per_rollout"}


def test_intervals_cover_the_mean_as_often_as_they_say():
    dice = np.random.default_rng(0)
    covers = [
        low < 0 < high
        for low, high in (interval(dice.normal(size=40).tolist()) for _ in range(2000))
    ]
    assert np.mean(covers) == pytest.approx(0.95, abs=0.02)


def test_where_it_looks_is_counted_from_the_gold_window():
    """A video of 40 s, gold from 18 to 22: one of two rollouts looks at it and ten seconds on."""
    call = {"window": [18.0, 32.0], "verdict": "hit"}
    invalid = {"window": [0.0, 18.0], "verdict": "invalid"}
    line = {"question": "?", "question_type": "oe", "rewards": {"total": 1.0}, "generated": [1],
            "duration": 40.0, "gold": [[18.0, 22.0]], "calls": 1}  # fmt: skip
    found = RolloutFigures()
    found.add(
        0, [[{**line, "rollout": n, "tool_calls": [own]} for n, own in ((0, call), (1, invalid))]]
    )
    look = found.look
    shares = dict(zip(look["offsets"], look["shares"][0], strict=True))
    assert shares[0.0] == 0.5 and shares[0.25] == 0.5 and shares[-0.1] == 0.0
    assert shares[0.35] == 0.0 and shares[0.55] is None, "beyond the video nobody can look"
    assert look["gold_width"] == 0.1


def test_departures_from_the_recipe_and_another_run(run, tmp_path):
    assert ["steps", 40, 3] in data(run[1], "run")["departures"]
    other = write_run(tmp_path / "other", steps=1)
    report = write_page(run[0], other).parent
    told = data(report, "run")["other"]
    assert told["page"] is None
    write_page(other)
    way = data(write_page(run[0], other).parent, "run")["other"]["page"]
    assert (report / unquote(way)).resolve() == (other / "report" / "index.html").resolve()
    assert (
        told["name"] == "other"
        and told["metrics"] == data(write_page(other).parent, "run")["metrics"]
    )


def test_a_run_that_has_only_begun_and_no_run_at_all(tmp_path):
    write_settings(tmp_path / "begun")
    (tmp_path / "begun" / "metrics.jsonl").write_text('{"step": 0, "loss": NaN}\n{"step": 1, "lo')
    told = data(write_page(tmp_path / "begun").parent, "run")
    assert told["metrics"] == {"step": [0], "loss": [None]} and told["look"] is None
    with pytest.raises(ValueError, match=r"holds no config\.json: name the workdir"):
        write_page(tmp_path)
