"""`python evaluate/compare.py A B`: two evaluations of the same questions, side by side."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluate import compare
from evaluate.benchmarks import results
from evaluate.benchmarks.sample import SampleResult

DOOR = Path(__file__).resolve().parents[2] / "evaluate" / "compare.py"


def write(folder, scores, task="lvbench", target="A"):
    folder.mkdir()
    lines = [
        SampleResult(
            task,
            str(n),
            n,
            f"v{n // 3}",
            "mcq",
            {},
            target,
            status="error" if score is None else "ok",
            score=score,
        )
        for n, score in enumerate(scores)
    ]
    results.append(folder / results.SAMPLES, lines)
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    first = write(tmp_path / "a", [0.0, 1.0, 0.0] * 20 + [1.0, None])
    second = write(tmp_path / "b", [1.0, 1.0, 0.0] * 20 + [None, 1.0])
    return first, second


def test_the_command_from_a_foreign_directory(runs, tmp_path):
    done = subprocess.run(
        [sys.executable, str(DOOR), *runs], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "lvbench" in done.stdout and "+33.3" in done.stdout


def test_errors_are_left_out_in_pairs(runs, capsys):
    assert compare.main([*runs, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["tasks"]
    assert (row["samples"], row["clusters"], row["left_out"]) == (60, 20, 2)
    assert row["value"] == pytest.approx(100 / 3) and row["p"] < 0.001
    assert row["second"] - row["first"] == pytest.approx(row["value"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"scores": [1.0], "task": "mlvu_dev"}, "no task in common"),
        ({"scores": [1.0], "target": "B"}, "the truth is"),
        ({"scores": [None]}, "no question was answered by both"),
    ],
)
def test_what_cannot_be_compared(other, said, runs, tmp_path, capsys):
    second = write(tmp_path / "c", other.pop("scores"), **other)
    assert compare.main([runs[0], second]) == 1
    assert said in capsys.readouterr().err


def test_no_evaluation(tmp_path, capsys):
    assert compare.main([str(tmp_path), str(tmp_path)]) == 1
    assert "samples.jsonl" in capsys.readouterr().err
