"""Evaluations that go on: with what they began with, and asking errors again."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from evaluate import evaluation
from evaluate.benchmarks import protocol, results
from evaluate.benchmarks.sample import ERROR, SampleResult
from evaluate.model import Opened
from train.data.settings import DataSettings
from train.model import ModelSettings
from train.recipes import get_recipe

pytestmark = pytest.mark.slow

ROWS = "id,video,question,answer\n1,a.mp4,What falls?,a cup\n2,a.mp4,What rises?,the sun\n"
JUDGED, BY_RULES = "paravt", "lmms-eval"


class Weights(Opened):
    """A model of which nobody wants weights."""

    def __init__(self, folder):
        agents = SimpleNamespace(renderer=SimpleNamespace(spec=None))
        config = dataclasses.replace(get_recipe("needle_rl"), model=ModelSettings(folder))
        vars(self).update(config=config, agents=agents)


@pytest.fixture
def model(tmp_path):
    return Weights(str(tmp_path / "weights"))


@pytest.fixture
def start(model, tmp_path):
    """Opens the evaluation of these rows in one folder."""

    def opened(judge="", rows=ROWS, name=JUDGED):
        (tmp_path / "q.csv").write_text(rows)
        file = str(tmp_path / "q.csv")
        asked = evaluation.open_asked(
            protocol.load(name), [file], "direct", "", None, DataSettings()
        )
        folder, asked = tmp_path / f"run-{name}", asked.judged_by(judge)
        evaluation.check_workdir(folder, asked, model.config.model.folder, "needle_rl")
        return evaluation.Evaluation(asked, model, folder)

    return opened


def test_it_goes_on_with_the_judge_that_it_began_with(start):
    start("judge-1")
    start("judge-1")
    for other in ("judge-2", ""):
        with pytest.raises(ValueError, match=f"judge='judge-1', not '{other}': choose another"):
            start(other)


def test_a_judge_that_nothing_is_put_to_decides_nothing(start):
    start("judge-1", name=BY_RULES)
    start("judge-2", name=BY_RULES)


@pytest.mark.parametrize("change", [("the sun", "the moon"), ("rises", "sets"), ("2,a", "3,a")])
def test_it_goes_on_with_the_questions_that_it_began_with(start, change):
    start()
    with pytest.raises(ValueError, match="rows_fingerprint="):
        start(rows=ROWS.replace(*change))


def test_a_folder_of_an_earlier_version_goes_on(start, tmp_path):
    start()
    path = tmp_path / "run-paravt" / evaluation.SETTINGS
    held = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in held.items() if n not in ("judge", "rows")}))
    start("judge-1")


def test_the_folder_of_a_training_run_stays_as_it_is(start, tmp_path):
    (tmp_path / "run-paravt").mkdir()
    (tmp_path / "run-paravt" / "evaluation.json").write_text('{"after": {}}')
    with pytest.raises(ValueError, match="a training run; choose another --workdir"):
        start()


def test_one_name_stands_for_one_task(tmp_path):
    for names in (["mlvu", "mlvu_dev"], ["a/q.csv", "b/q.jsonl"]):
        with pytest.raises(ValueError, match="twice"):
            evaluation.open_asked(
                protocol.load(JUDGED), names, "", str(tmp_path), None, DataSettings()
            )


@pytest.fixture
def answers(monkeypatch):
    """What samples are answered with, by their ids; those without an answer fail."""
    given, asked = {}, []

    class Runner:
        def __init__(self, *_):
            self.waits = evaluation.Waits()

        def __call__(self, chosen):
            for sample in chosen:
                asked.append(sample.sample_id)
                text = given.get(sample.sample_id)
                came = {"response": text, "prediction": text, "score": 1.0}
                failed = SampleResult.failed(sample, "the judge failed")
                yield SampleResult.of(sample, **came) if text else failed

    monkeypatch.setattr(evaluation, "SampleRunner", Runner)
    return given, asked


def test_errors_are_asked_again_and_each_commit_is_named(start, answers, monkeypatch):
    (given, asked), console = answers, Console(quiet=True)
    given["1"] = "a cup"
    monkeypatch.setattr(evaluation, "commit", lambda: "aaaaaaa")
    start().run(4, None, console)
    assert start().report()[0]["tasks"]["q"]["errors"] == {"the judge failed": 1}
    given["2"] = "the sun"
    monkeypatch.setattr(evaluation, "commit", lambda: "bbbbbbb")
    start().run(4, None, console)
    assert asked == ["1", "2"], "an error is a line like any other"
    again = start()
    again.run(4, None, console, again=True)
    assert asked == ["1", "2", "2"]
    report, missing = again.report()
    assert missing == 0 and not report["tasks"]["q"]["errors"]
    assert {row["commit"] for row in report["rows"]} == {"aaaaaaa, bbbbbbb"}


def test_of_an_error_and_an_answer_the_answer_counts_in_whichever_file(start, answers, tmp_path):
    answers[0].update({"1": "a cup", "2": "the sun"})
    one = start()
    one.run(4, None, Console(quiet=True))
    folder = tmp_path / "run-paravt"
    lost = [
        dataclasses.replace(found, status=ERROR, score=None)
        for found in results.read(folder / results.SAMPLES)
    ]
    results.append(folder / "samples-1-of-2.jsonl", lost)
    results.append(folder / "samples.z.jsonl", lost)
    assert {found.status for found in one.answered().values()} == {"ok"}
