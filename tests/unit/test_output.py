"""`metrics.jsonl` holds every step once, also after a resume; the SFT schedule counts examples."""

import json

from train.evaluation.tables import comparison_table
from train.report.log import RunLog
from train.sft.batches import examples_before, phase_at
from train.sft.settings import SftPhase


def test_resume_drops_the_steps_that_are_run_again(tmp_path):
    log = RunLog(tmp_path, steps=4)
    for step in range(3):
        log.step(step, {"loss": float(step)})
    log.close()
    log = RunLog(tmp_path, steps=4, first_step=2)
    log.step(2, {"loss": 20.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_a_silent_log_writes_nothing(tmp_path):
    log = RunLog(tmp_path / "quiet", steps=1, silent=True)
    log.step(0, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "quiet").exists()


def test_table_shows_only_figures_that_exist():
    table = comparison_table("t", {"greedy": {"accuracy": 0.5}, "sampled": {"accuracy/oe": 0.25}})
    assert [str(column.header) for column in table.columns] == ["", "accuracy", "open"]
    assert [list(column.cells) for column in table.columns][1:] == [["0.500", "-"], ["-", "0.250"]]


def test_examples_of_a_step_follow_from_the_schedule():
    phases = (SftPhase(0, {"frame": 4}), SftPhase(2, {"frame": 1, "qa": 3}))
    assert phase_at(phases, 1).rows == {"frame": 4}
    assert phase_at(phases, 2).rows == {"frame": 1, "qa": 3}
    assert [examples_before(phases, step, "frame") for step in range(5)] == [0, 4, 8, 9, 10]
    assert [examples_before(phases, step, "qa") for step in range(5)] == [0, 0, 0, 3, 6]
