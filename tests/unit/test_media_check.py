"""Files that look like videos and cannot be decoded are found before a run is paid for."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paravt_jax.records import Conversation, ImageRef, Message
from pipelines import describe
from pipelines.datasets import question_rows
from pipelines.decode import video_ref
from pipelines.media_check import check_media
from pipelines.needle.world import write_mp4
from pipelines.video import VideoReader
from train import main


def write_video(path: Path, broken: bool = False) -> str:
    """A video; a broken one has its index, and zeros where its pictures would be."""
    rng = np.random.default_rng(0)
    write_mp4(str(path), rng.integers(0, 256, (80, 32, 32, 3), np.uint8), 10.0)
    if broken:
        data = bytearray(path.read_bytes())
        begin, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
        data[begin:end] = bytes(end - begin)
        path.write_bytes(data)
    return path.name


def write_questions(folder: Path, good: int, broken: int) -> str:
    names = [write_video(folder / f"good{i}.mp4") for i in range(good)]
    names += [write_video(folder / f"broken{i}.mp4", broken=True) for i in range(broken)]
    with open(folder / "questions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "question", "answer", "question_type"])
        writer.writerows([name, "What is shown?", "noise", "oe"] for name in names)
    return str(folder / "questions.csv")


def test_lengths_alone_do_not_tell_that_a_file_cannot_be_decoded(tmp_path):
    found = question_rows(write_questions(tmp_path, 2, 1))
    assert len(found.rows) == 3, "the length of a broken file can be read"
    media = check_media(found.rows, VideoReader())
    assert (media.files, media.tried) == (3, 3)
    assert [Path(path).name for path in media.faults] == ["broken0.mp4"]
    assert [media.shows(row) for row in found.rows] == [True, True, False]
    assert media.report()[0].startswith("decoded frames of 3 of 3 files: 1 of them cannot be")
    with pytest.raises(ValueError, match=r"1 of the 3 files .*data\.max_bad_rows=0\.01.*broken0"):
        media.check("data.max_bad_rows", 0.01)
    media.check("data.max_bad_rows", 0.4)


def test_large_sets_are_tried_in_part(tmp_path):
    rows = question_rows(write_questions(tmp_path, 4, 0)).rows
    assert (
        "3 of 4 files, drawn at random: 0" in check_media(rows, VideoReader(), most=3).report()[0]
    )
    assert check_media(rows, VideoReader(), seconds=0.0).tried == 0


def test_images_of_conversations_are_tried(tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    Image.new("L", (20, 10)).save(tmp_path / "small.png")
    video = video_ref(str(tmp_path / write_video(tmp_path / "good.mp4")))
    images = [ImageRef(str(tmp_path / name)) for name in ("huge.png", "small.png")]
    row = Conversation("a", (Message("user", ("Look.", *images, video)),))
    media = check_media([row], VideoReader())
    assert media.tried == 3 and [Path(path).name for path in media.faults] == ["huge.png"]


def test_describe_names_them_and_describes_the_others(tmp_path, capsys):
    assert describe.main([write_questions(tmp_path, 2, 1), "--budgets", "4"]) == 0
    text = capsys.readouterr().out
    assert "1 of them cannot be decoded" in text and "broken0.mp4: " in text
    assert "tokens of a prompt, 2 rows" in text
    (tmp_path / "none").mkdir()
    assert describe.main([write_questions(tmp_path / "none", 0, 1)]) == 1
    assert "no question has videos that can be decoded" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["0.01", "0.5"])
def test_a_dry_run_refuses_what_the_run_would_stop_at(limit, tmp_path, capsys):
    path = write_questions(tmp_path, 2, 1)
    sets = ("--set", f"data.max_bad_rows={limit}", "--set", "evaluation.rows=0")
    code = main.main(["--data", path, "--dry-run", *sets])
    said = capsys.readouterr()
    assert "decoded frames of 3 of 3 files: 1 of them" in said.out and "broken0.mp4" in said.out
    if limit == "0.5":
        assert code == 0
    else:
        assert code != 0 and len(said.err.strip().splitlines()) == 1
        assert "data.max_bad_rows=0.01" in said.err and "broken0.mp4" in said.err
