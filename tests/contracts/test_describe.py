"""`python pipelines/describe.py` says what a data set holds, from any directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import describe
from pipelines.preprocess import ImageSpec
from pipelines.video import VideoReader
from tests.support import paravt_parquet as fixture
from tests.support.needle import processor_folder, questions

DOOR = Path(__file__).resolve().parents[2] / "pipelines" / "describe.py"


def command(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(DOOR), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": ""},
    )


@pytest.mark.slow
def test_paravt_parquet_from_a_foreign_directory(paravt_folder, tmp_path):
    done = command(paravt_folder, "--model", processor_folder(), "--budgets", "4,8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for line in (
        "questions: 4 of 7 rows can be used",
        "types: mcq 1, oe 2, tvg 1",
        "videos of a row: 1 3, 2 1",
        "4 videos, 0.01 h, seconds: least 8.0, median 8.0, most 8.0",
        "longvt_source: 1, 0, 1",
        "museg: 2, 1, 0",
        "rl/nested.parquet, row 3: selfqa/lost.mp4: no such file",
        "room of a prompt",
        "example rl/nested.parquet:0 (oe), answer 'red':",
        "<|im_start|>user",
        "<|image_pad|>x4",
        "What colour is the wall?<|im_end|>",
        "conversations: 3 of 4 rows can be used",
        "messages: assistant 4, system 1, tool 1, user 3",
        "<video a.mp4>What colour is it?",
    ):
        assert line in text, f"{line!r} is missing in\n{text}"
    assert not list(tmp_path.iterdir()), "a description must not write anything"


@pytest.mark.slow
def test_own_questions_without_a_model(paravt_folder, tmp_path):
    (tmp_path / "own.csv").write_text(
        "video,question,answer,question_type,evidence\n"
        f'{paravt_folder}/{fixture.VIDEOS[0]},What?,red,oe,"[[1, 2]]"\n'
    )
    done = command("own.csv", "--frames-as", "video", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with evidence windows: 1" in done.stdout and "give --model" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no/such/folder"], "no/such/folder"),
        (["x.csv", "--budgets", "4,many"], "--budgets 4,many"),
        (["x.csv", "--pixels", "784"], "--pixels 784"),
        (["x.csv", "--budgets", "0"], "--budgets 0"),
    ],
)
def test_bad_input_is_one_line(arguments, named, capsys):
    assert describe.main(arguments) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and named in errors[0]


def test_vision_tokens_are_those_of_the_prompt(paravt_folder):
    """Of an overview of frames that are resized: 64x64 pixels are 2x2 tokens each."""
    row = describe.question_rows(paravt_folder).rows[2]
    spec = ImageSpec().limited(784, 50176)
    assert describe.vision_tokens(row.videos, 8, spec, VideoReader(spec=spec)) == 8 * 4
    assert describe.vision_tokens(row.videos, 256, spec, VideoReader(spec=spec)) == 64 * 4


def test_the_needle_world_needs_no_path():
    found = describe.Found([question.row for question in questions()])
    spec = ImageSpec()
    text = "\n".join(describe.about_questions(found, spec, (4,), None))
    assert f"questions: {len(questions())} of {len(questions())}" in text
    assert "example" in text


def test_runs_of_padding_are_counted():
    text = "a<|image_pad|><|image_pad|>b<|image_pad|>c<|video_pad|><|video_pad|><|video_pad|>"
    assert describe.shortened(text) == "a<|image_pad|>x2b<|image_pad|>c<|video_pad|>x3"
