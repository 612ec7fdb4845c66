"""A data set of one's own columns, read by a function from outside of the package."""

import json
import sys
from pathlib import Path

import pytest

from paravt_jax.plugins import Own, load
from pipelines.datasets import question_rows
from tests.support.command import ROOT, run
from tests.support.paravt_parquet import write_video
from train.data.settings import DataSettings

MINE = """
from paravt_jax.records import Row


def row(record, row_id, media):
    return Row(
        row_id=row_id,
        video=media.video(record["clip"]),
        question=record["ask"]["text"],
        answer=record["gold"],
        question_type="oe",
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A JSONL file with columns of its own, one record of which lacks a field, and its reader."""
    write_video(str(tmp_path / "a.mp4"), 120)
    records = [
        {"clip": "a.mp4", "ask": {"text": "Which colour?"}, "gold": "red"},
        {"clip": "a.mp4", "gold": "red"},
        {"clip": "none.mp4", "ask": {"text": "Which colour?"}, "gold": "red"},
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "mine.jsonl").write_text(lines)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def test_records_become_rows_and_failures_are_rejected_by_name(folder: Path):
    reader = load(f"{folder}/mine.py:row")
    found = question_rows(str(folder / "mine.jsonl"), reader=reader)
    (row,) = found.rows
    assert (row.question, row.answer) == ("Which colour?", "red")
    reasons = [rejected.reason for rejected in found.rejected]
    assert reasons[0] == "row: KeyError: 'ask'" and "none.mp4" in reasons[1]


def test_a_reader_must_return_rows(folder: Path):
    with pytest.raises(ValueError, match="returned str, not a Row"):
        question_rows(str(folder / "mine.jsonl"), reader=lambda record, row_id, media: "red")


@pytest.mark.slow
def test_describe_reads_with_it_from_another_folder(folder: Path):
    command = [ROOT / "pipelines/describe.py", "mine.jsonl", "--reader", "mine.py:row"]
    done = run([sys.executable, *command], folder)
    assert done.returncode == 0, done.stderr
    assert "KeyError: 'ask'" in done.stdout


@pytest.mark.slow
def test_the_example_reads_choices(tmp_path: Path):
    write_video(str(tmp_path / "a.mp4"), 120)
    record = {"clip": "a.mp4", "ask": "Which colour?", "choices": ["red", "blue"], "correct": 1}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(record) + "\n")
    reader = load(str(ROOT / "examples" / "own_questions.py:question"))
    (row,) = question_rows(str(tmp_path / "quiz.jsonl"), reader=reader).rows
    assert row.answer == "B" and row.question.splitlines()[2] == "(B) blue"
    own = str(ROOT / "examples" / "own_questions.py:question")
    command = [sys.executable, ROOT / "pipelines/describe.py", "quiz.jsonl", "--reader", own]
    done = run(command, tmp_path)
    assert done.returncode == 0 and "1 of 1 rows can be used" in done.stdout, done.stderr


def test_the_setting_names_the_function_wherever_it_is_read(folder: Path, monkeypatch):
    monkeypatch.chdir(folder)
    whole = f"{folder.resolve()}/mine.py:row"
    assert DataSettings(reader=Own("mine.py:row")).reader == whole
    assert DataSettings(reader=load(whole)).reader == whole
    with pytest.raises(ValueError, match="has nothing called rows"):
        DataSettings(reader=Own("mine.py:rows"))


@pytest.mark.slow
def test_a_run_reads_with_it(folder: Path):
    settings = ["data.reader=mine.py:row", "data.max_rejected=0.7", "evaluation.rows=0"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, ROOT / "train/main.py", "--data", "mine.jsonl", "--dry-run", *flags]
    done = run(command, folder)
    assert done.returncode == 0, done.stderr
    assert "1 questions about 1 videos" in done.stdout
