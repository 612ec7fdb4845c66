"""Figures of scores: intervals clustered by video, errors that are never scored, reports."""

import dataclasses
import json

import numpy as np
import pytest

from evaluate.benchmarks import protocol, report, results
from evaluate.benchmarks.aggregate import aggregate, sight, usage
from evaluate.benchmarks.rules import ScoringRules
from evaluate.benchmarks.sample import Kind, Sample, SampleResult
from paravt_jax.estimates import estimate, paired_bootstrap


def result(number, score=1.0, cluster=None, kind="mcq", **more):
    name = f"v{number}" if cluster is None else cluster
    fields = {"groups": {}, "target": "A", "annotation": str(number), "score": score} | more
    return SampleResult("t", str(number), number, name, kind, **fields)


def failed(number, why="no room in the context"):
    return result(number, None, status="error", error=why)


# --- Intervals ------------------------------------------------------------------------------------


def test_independent_questions_have_the_textbook_error():
    scores = [1.0] * 30 + [0.0] * 10
    found = estimate(scores, range(40))
    assert found.value == 0.75
    assert found.stderr == pytest.approx(np.std(scores, ddof=1) / 40**0.5)


def test_questions_of_one_video_that_agree_count_once():
    one_each = estimate([1, 0, 1, 1] * 5, range(20))
    thrice = estimate(np.repeat([1, 0, 1, 1] * 5, 3).tolist(), np.repeat(range(20), 3).tolist())
    assert thrice.stderr == pytest.approx(one_each.stderr)
    assert (thrice.low, thrice.high) == pytest.approx((one_each.low, one_each.high))


def test_intervals_hold_the_truth():
    """Of 400 evaluations with three questions a video, about 95 in a hundred."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        video = random.beta(2, 1, 60)  # of each video its own difficulty, 2/3 in the mean
        scores = (random.random((60, 3)) < video[:, None]).astype(float)
        found = estimate(scores.ravel().tolist(), np.repeat(range(60), 3).tolist())
        held += found.low <= 2 / 3 <= found.high
    assert 0.92 <= held / 400 <= 0.98


def test_all_right_is_no_certainty():
    found = estimate([1.0] * 6, list("aabbcc"))
    assert found.high == 1.0 and found.low < 0.5, "three videos, not six questions"


def test_strata_weigh_the_same():
    found = estimate([1, 1, 1, 1, 0], range(5), list("aaaab"))
    assert found.value == 0.5


def test_bootstrap_of_equal_and_of_better_runs():
    random = np.random.default_rng(1)
    before = (random.random(300) < 0.5).astype(float)
    clusters = np.repeat(range(100), 3).tolist()
    same = paired_bootstrap(before.tolist(), before.tolist(), clusters)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    after = np.maximum(before, (random.random(300) < 0.3).astype(float))
    better = paired_bootstrap(before.tolist(), after.tolist(), clusters)
    assert better.low > 0 and better.p < 0.01
    assert better == paired_bootstrap(before.tolist(), after.tolist(), clusters), "seeded"


def test_bootstrap_draws_whole_videos():
    gains = [1.0, -1.0] * 20
    apart = paired_bootstrap([0.0] * 40, gains, range(40))
    together = paired_bootstrap([0.0] * 40, gains, np.repeat(range(20), 2).tolist())
    assert apart.high > 0.2 and (together.low, together.high) == (0, 0)


def test_p_values_of_no_difference_are_spread_evenly():
    random = np.random.default_rng(2)
    values = []
    for _ in range(200):
        a, b = (random.random((2, 120)) < 0.5).astype(float).tolist()
        values.append(paired_bootstrap(a, b, np.repeat(range(40), 3).tolist(), 400).p)
    assert 0.01 <= np.mean(np.array(values) < 0.05) <= 0.11


# --- Figures --------------------------------------------------------------------------------------


def test_an_error_is_not_a_wrong_answer():
    rules = ScoringRules(error_limit=0.5)
    found = aggregate(rules, [result(0), result(1), result(2, 0.0), failed(3)])
    assert found.headline.value == pytest.approx(2 / 3)
    assert found.errors == {"no room in the context": 1} and found.samples == 4


def test_above_the_limit_there_is_no_headline():
    found = aggregate(ScoringRules(error_limit=0.2), [result(0), result(1), failed(2)])
    assert found.headline is None and "no headline" in found.notes[0]
    assert found.figures[0].name == "accuracy/without_errors"
    only = aggregate(ScoringRules(), [failed(0)], ["line 7: no field 'video'"])
    assert only.headline is None and sum(only.errors.values()) == only.samples == 2


def test_what_the_release_made_of_errors_is_a_second_figure():
    rules = ScoringRules(count_errors=True, error_limit=1.0)
    found = aggregate(rules, [result(0), failed(1)])
    assert found.headline.value == 1.0
    assert [(f.name, f.value) for f in found.figures] == [("accuracy/errors_as_wrong", 0.5)]


def in_category(number, score, category):
    return result(number, score, groups={"category": category})


def test_macro_means():
    rows = [in_category(0, 1.0, "a"), in_category(1, 1.0, "a"), in_category(2, 0.0, "b")]
    known = {"categories": ("a", "b", "c", "d"), "scale": 100.0}
    there = aggregate(ScoringRules(aggregate="macro", **known), rows)
    every = aggregate(ScoringRules(aggregate="macro-all", **known), rows)
    assert (there.headline.value, every.headline.value) == (50.0, 25.0)
    assert there.headline.note == "2 of 4 categories"
    micro = next(figure for figure in there.figures if figure.name == "accuracy/micro")
    assert micro.value == pytest.approx(200 / 3)
    assert every.headline.low <= 25 <= every.headline.high


def test_questions_of_unknown_categories_are_left_out_and_told():
    """MMVU's mean in lmms-eval is over rows with a known subject."""
    rows = [in_category(0, 1.0, "Science"), in_category(1, 0.0, "unknown")]
    found = aggregate(protocol.load("lmms-eval").rules("mmvu_val", Kind.CHOICE).scoring, rows)
    assert (found.headline.value, found.headline.samples) == (1.0, 1)
    assert "without 1 questions" in found.headline.note
    assert {f.name: f.value for f in found.figures}["accuracy/all"] == 0.5


def test_parts_and_kinds():
    rows = [
        result(0, 1.0, groups={"duration": "short"}),
        result(1, 0.0, groups={"duration": "long"}),
        result(2, 0.5, kind="open", groups={"duration": "long"}),
    ]
    found = aggregate(ScoringRules(metric="m"), rows)
    named = {figure.name: figure.value for figure in found.figures}
    expected = {"m/duration=long": 0.25, "m/duration=short": 1.0, "m/mcq": 0.5, "m/open": 0.5}
    assert named == expected


def test_a_question_of_two_types_counts_for_both():
    rows = [in_category(0, 1.0, "a | b"), in_category(1, 0.0, "b")]
    named = {f.name: f.value for f in aggregate(ScoringRules(), rows).figures}
    assert named == {"accuracy/category=a": 1.0, "accuracy/category=b": 0.5}


def test_identical_annotations_collapse_where_the_harness_does():
    rows = [result(n, s, kind="grounding", annotation="same") for n, s in ((0, 1.0), (1, 0.2))]
    kept = aggregate(ScoringRules(collapse=True), rows)
    assert (kept.headline.value, kept.headline.samples) == (0.2, 1), "the last one counts"
    assert aggregate(ScoringRules(), rows).headline.value == 0.6


def test_recall_at_thresholds():
    rows = [result(n, s, kind="grounding") for n, s in enumerate((0.2, 0.3, 0.5, 0.9))]
    found = aggregate(ScoringRules(scale=100.0), rows)
    assert [f.value for f in (found.headline, *found.figures)] == [47.5, 75, 50, 25]


def test_order_does_not_matter():
    random = np.random.default_rng(3)
    rows = [result(n, float(s), f"v{n // 3}") for n, s in enumerate(random.random(30))]
    shuffled = [rows[n] for n in random.permutation(30)]
    assert aggregate(ScoringRules(), rows) == aggregate(ScoringRules(), shuffled)


def test_a_model_that_does_not_see_is_told():
    seen = [result(n, blind=-2.0 - n / 10, seeing=-0.5) for n in range(8)]
    found = sight([*seen, result(9), failed(10)])
    assert found is not None and found.samples == 8
    assert found.value == pytest.approx(1.85) and 1.5 < found.low < found.value
    assert "no sign" not in _note(seen)
    unseen = [result(n, blind=-1.0, seeing=-1.0 + (-1) ** n / 50) for n in range(8)]
    assert "no sign that the model sees them" in _note(unseen)
    assert sight([result(0)]) is None


def _note(results) -> str:
    loaded = protocol.load("lmms-eval")
    rules = {Kind.CHOICE: loaded.rules("videomme", Kind.CHOICE)}
    about = report.About(loaded, "direct", "some/model", "abc1234")
    told = report.make(about, {"videomme": report.TaskRun(rules, [], results)})["tasks"]
    return next(n for n in told["videomme"]["notes"] if n.startswith("frames make"))


def test_what_answers_took_is_told():
    used = [
        result(0, calls=3, turns=2, seconds=1.0, prediction="A"),
        result(1, turns=1, seconds=3.0),
    ]
    line = report.usage_line([*used, failed(2)])
    assert line.startswith("calls: 1.50 a question, 1.00 a turn, 0.0% failed; 50.0% of answers")
    assert line.endswith("2.0 s from prompt to answer (3.0 the longest)")
    assert report.usage_line([failed(0)]) == "nothing was answered"


def test_usage():
    found = usage([result(0, calls=3, turns=2, failed_calls=1), result(1, turns=1), failed(2)])
    assert found["tool/calls_per_turn"] == 1.0 and found["tool/samples_with_call"] == 0.5
    assert found["tool/failed_share"] == pytest.approx(1 / 3)


# --- Reports --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told():
    """A report of two tasks, and what it was made from."""
    loaded = protocol.load("lmms-eval")
    about = report.About(loaded, "direct", "some/model", "abc1234", limit=4)
    runs = {
        "videomme": run_of(loaded, "videomme", Kind.CHOICE, [1.0, 0.0, 1.0, None]),
        "timelens_charades": run_of(loaded, "timelens_charades", Kind.GROUNDING, [0.4, 0.8]),
    }
    return report.make(about, runs), runs


def run_of(loaded, task, kind, scores):
    rules = loaded.rules(task, kind)
    rules = dataclasses.replace(rules, scoring=dataclasses.replace(rules.scoring, error_limit=0.5))
    gold = (1.0, 2.0) if kind is Kind.GROUNDING else "A"
    samples = [
        Sample(task, f"q{n}", n, {"n": np.float16(n)}, kind, "/v.mp4", f"{n}?", gold, f"v{n // 2}")
        for n in range(len(scores))
    ]
    came = {"response": "<think>x</think>A", "filtered": "A", "frames": 32, "pixels": 50176}
    done = [
        SampleResult.failed(sample, "no readable video")
        if score is None
        else SampleResult.of(sample, score=score, prediction="A", **came)
        for sample, score in zip(samples, scores, strict=True)
    ]
    return report.TaskRun({kind: rules}, samples, done)


def test_every_row_says_what_it_depends_on(told):
    made, _ = told
    assert len(made["rows"]) == 5
    for row in made["rows"]:
        wanted = ("protocol", "mode", "frames", "pixels", "decoding", "commit")
        assert all(row[name] for name in wanted)
    assert made["rows"][0]["value"] == pytest.approx(200 / 3)
    assert made["tasks"]["videomme"]["errors"] == {"no readable video": 1}
    assert any("random" in line for line in report.remarks(made))
    assert report.table(made).row_count == 5


def test_errors_are_told_the_most_frequent_first_and_not_each(told):
    made, _ = told
    counts = {"no room": 7, **{f"no such file: {n}.mp4": 1 for n in range(900)}}
    tasks = {"videomme": made["tasks"]["videomme"] | {"errors": counts, "notes": []}}
    lines = report.remarks(made | {"tasks": tasks})
    assert lines[0] == "videomme: 7 x error: no room" and "0.mp4" in lines[1]
    assert lines[report.SHOWN_ERRORS] == "videomme: 896 x error of 896 other kinds: report.json"


def test_the_first_malformed_row_is_told(told):
    _, runs = told
    faulty = dataclasses.replace(runs["videomme"], faults=["q.csv, line 3: no field 'answer'", "x"])
    about = report.About(protocol.load("lmms-eval"), "direct", "some/model", "abc1234")
    notes = report.make(about, {"videomme": faulty})["tasks"]["videomme"]["notes"]
    assert "the first malformed row of 2: q.csv, line 3: no field 'answer'" in notes


def test_files_of_lmms_eval(told, tmp_path):
    made, runs = told
    report.write(tmp_path, made, runs)
    found = json.loads((tmp_path / "results.json").read_text())
    videomme = found["results"]["videomme"]
    assert videomme["videomme_perception_score,none"] == pytest.approx(200 / 3)
    assert "videomme_perception_score_stderr,none" in videomme
    assert found["n-samples"]["videomme"] == {"original": 4, "effective": 3}
    assert "timelens_IOU@5,none" in found["results"]["timelens_charades"]
    path = tmp_path / "lmms-eval_direct_samples_timelens_charades.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1]
    first = lines[0]
    assert (first["resps"], first["filtered_resps"]) == (["<think>x</think>A"], "A")
    assert (first["timelens_mIOU"]["score"], first["timelens_IOU@5"]["score"]) == (0.4, 0.0)
    assert next(first[key] for key in first if "score" in key.lower()) == 0.4, "its loader's choice"
    assert (tmp_path / "lmms-eval_direct_results.json").is_file(), "found beside the samples"


def test_the_same_results_give_the_same_files(told, tmp_path):
    made, runs = told
    for name in ("once", "again"):
        (tmp_path / name).mkdir()
        report.write(tmp_path / name, made, runs)
    for path in (tmp_path / "once").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_lines_outlive_a_kill(tmp_path):
    path = tmp_path / results.SAMPLES
    results.append(path, [result(0), result(1, 0.5)])
    with path.open("ab") as file:
        file.write(results.line(result(2)).encode()[:40])
    assert [r.sample_id for r in results.read(path)] == ["0", "1"]
    results.append(path, [result(2), result(0, 0.0)])
    found = {r.sample_id: r.score for r in results.read(path)}
    assert found == {"0": 0.0, "1": 0.5, "2": 1.0}
