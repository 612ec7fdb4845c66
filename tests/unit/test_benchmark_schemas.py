"""Published rows become samples whose prompts are those of the harness, byte by byte."""

import functools
import json
import os

import pytest

from evaluate.benchmarks import protocol, schemas, scoring
from evaluate.benchmarks.captions import Seen
from evaluate.benchmarks.protocol import Span
from evaluate.benchmarks.sample import Kind
from evaluate.prompts import frames_a_second
from paravt_jax.records import VideoRef
from pipelines.video import VideoReader
from tests.support import benchmark_rows as rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return rows.write_splits(tmp_path_factory.mktemp("splits"))


load = functools.cache(protocol.load)


def messages(name, sample, mode="", total=90):
    rules = load(name).rules(sample.task, sample.kind, mode)
    indices = rules.video.indices(total, rows.RATE)
    return rules.messages(sample, Seen(indices, total, rows.RATE))


@pytest.mark.parametrize("task", rows.TASKS)
def test_twenty_rows(task, root):
    loaded = schemas.load(task, str(root))
    assert len(loaded.samples) == rows.ROWS and not loaded.faults
    for number, sample in enumerate(loaded.samples):
        assert sample.doc_id == number and os.path.isfile(sample.video), sample.video
        shown = messages("lmms-eval", sample)
        assert shown.parts[0] == Span(0, 32), "frames come first"
        assert shown.text == rows.EXPECTED[task](sample.doc)
        json.loads(schemas.as_json(dict(sample.doc)))


def test_frames_a_second_are_those_of_the_container(root):
    """54 frames in 8.999999999999998 s are 6 a second: else Qwen's 18 frames would be 16."""
    sample = next(s for s in schemas.load("lvbench", str(root)).samples if "clip0" in s.video)
    info = VideoReader().info(VideoRef(sample.video, 1.0))
    rate = frames_a_second(info.frames, info.duration)
    shown = load("qwen-report").rules("lvbench", sample.kind).video.indices(info.frames, rate)
    assert (rate, len(shown)) == (rows.RATE, 18)
    assert frames_a_second(1798, 1798 * 1001 / 30000) == 30000 / 1001
    assert frames_a_second(3, 86400.0) == 3 / 86400, "a time-lapse"


def test_gold(root):
    found = {task: schemas.load(task, str(root)).samples for task in rows.TASKS}
    assert [sample.gold for sample in found["videomme"]][:5] == list("ABCDA")
    assert found["longvideobench_val_v"][3].gold == "D" and found["mmvu_val"][4].kind is Kind.OPEN
    # 3.3 in half precision
    assert found["temporal_grounding_charades"][0].gold == (0.0, 3.30078125)
    assert found["timelens_charades"][2].gold == (0.5, 3.0)
    assert found["lvbench"][0].options == rows.COLOURS
    assert found["lvbench"][1].groups == {"category": "entity recognition | reasoning"}
    assert found["mlvu_dev"][0].stem == "What does person 0 do?"
    assert found["videomme"][1].choice("B") == "green."


def test_questions_about_one_video_are_one_cluster(root):
    samples = schemas.load("videomme", str(root)).samples
    assert len({sample.cluster for sample in samples}) == 3
    assert len({sample.sample_id for sample in samples}) == rows.ROWS


def test_rows_of_a_part_count_from_zero(root):
    long = schemas.load("videomme_long", str(root)).samples
    assert [sample.doc_id for sample in long] == list(range(6))
    assert {sample.groups["duration"] for sample in long} == {"long"}


def test_interleaved_subtitles_of_longvideobench(root):
    sample = schemas.load("longvideobench_val_i", str(root)).samples[0]
    shown = messages("lmms-eval", sample, total=54)
    text = "".join("<image>" if isinstance(part, Span) else part for part in shown.parts)
    assert text.startswith(
        "<image>\n<image>\n<image>\nfirst line\n<image>\n<image>\n<image>\nsecond line\n<image>"
    )
    assert text.count("<image>") == 9, "one for each second of a short video"


def test_release_letters_options_twice_and_paravt_once(root):
    sample = schemas.load("videomme", str(root)).samples[0]
    assert "\nA. A. red.\n" in messages("paravt-release", sample).text
    assert "\nA. red.\n" in messages("paravt", sample).text
    assert messages("paravt", sample).text.endswith("The video path for this video is: clip0.mp4")


def test_own_file(tmp_path):
    loaded = schemas.load(str(rows.write_own(tmp_path)), "/nowhere")
    choice, words, window = loaded.samples
    assert (choice.kind, choice.gold, choice.options) == (Kind.CHOICE, "B", ("red", "blue"))
    assert (words.kind, words.gold) == (Kind.OPEN, "a cup")
    assert (window.kind, window.gold) == (Kind.GROUNDING, (1.5, 4.0))
    assert window.groups == {"place": "outdoors"} and os.path.isfile(window.video)
    rules = load("paravt").rules(protocol.OWN, choice.kind)
    assert "A. red\nB. blue" in rules.messages(choice, Seen([0, 1], 2, 1.0)).text


def test_questions_as_training_has_them(tmp_path):
    """Options in the question, or only a letter as answer."""
    (tmp_path / "questions.csv").write_text(
        "video,question,answer,question_type\n"
        'v.mp4,"Which?\nA. red\nB. blue",B,mcq\nv.mp4,Which letter?,C,mcq\n'
        'v.mp4,When?,"63, 71",tvg\nv.mp4,What?,a cup,oe\n'
    )
    inside, bare, window, words = schemas.load(str(tmp_path / "questions.csv"), "").samples
    assert (inside.options, inside.stem, inside.gold) == (("red", "blue"), "Which?", "B")
    assert (window.gold, words.kind) == ((63.0, 71.0), Kind.OPEN)
    rules = load("paravt").rules(protocol.OWN, Kind.CHOICE)
    assert scoring.score(rules, bare, "<answer>C</answer>").score == 1.0
    assert scoring.score(rules, inside, "<answer>C</answer>").score == 0.0


def test_a_row_that_is_no_question_is_told(tmp_path):
    (tmp_path / "mine.jsonl").write_text(
        '{"video": "v.mp4", "question": "?", "answer": "C", "options": ["x", "y", "C1"]}\n'
        '{"video": "v.mp4", "question": "?", "answer": "blue", "options": ["x", "y"]}\n'
        '{"question": "?", "answer": "C"}\n{broken\n'
        '{"video": "v.mp4", "question": " ", "answer": "C"}\n'
    )
    loaded = schemas.load(str(tmp_path / "mine.jsonl"), "")
    assert len(loaded.samples) == 1
    assert ["line 2" in loaded.faults[0], "line 4" in loaded.faults[2]] == [True, True]
    assert "'video'" in loaded.faults[1] and "question is empty" in loaded.faults[3]


def test_a_video_path_stays_below_its_folder(tmp_path):
    (tmp_path / "secret.mp4").write_text("")
    (tmp_path / "data").mkdir()
    places = schemas.Places(tmp_path / "data")
    assert places.video("../secret.mp4") == str(tmp_path / "data" / "secret.mp4")
    assert places.video("/etc/passwd").startswith(str(tmp_path / "data"))


def test_videos_of_an_own_file_lie_beside_it_or_below_the_root(tmp_path):
    media, beside = tmp_path / "media", tmp_path / "questions"
    for path in (media / "a" / "one.mp4", beside / "two.mp4", tmp_path / "other" / "three.mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    named = ["a/one.mp4", str(media / "a/one.mp4"), "two.mp4", str(tmp_path / "other/three.mp4")]
    rows = "".join(f"{name},What?,x\n" for name in named)
    (beside / "q.csv").write_text("video,question,answer\n" + rows)
    found = [s.video for s in schemas.load(str(beside / "q.csv"), str(media)).samples]
    assert found[:3] == [str(media / "a/one.mp4")] * 2 + [str(beside / "two.mp4")]
    assert not os.path.exists(found[3]), "no row names a file outside of both"


def test_videos_in_other_folders_are_found_by_their_names(tmp_path):
    for name in ("part/1_plotQA/a.mp4", "part/x/twice.mp4", "part/y/twice.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    places = schemas.Places(tmp_path)
    assert places.video("a.mp4") == str(tmp_path / "part/1_plotQA/a.mp4")
    assert places.video("twice.mp4") == str(tmp_path / "twice.mp4"), "no guess which"
    assert places.video("gone") == str(tmp_path / "gone.mp4")


@pytest.mark.parametrize(
    ("task", "named"),
    [("lvbnech", "lvbench"), ("lvbench", "lvbench"), ("none.csv", "none.csv")],
)
def test_what_is_not_there(task, named, tmp_path):
    with pytest.raises((ValueError, OSError), match=named):
        schemas.load(task, str(tmp_path))
