"""The stream of prompts, as training relies on it.

1. Rows go through ArrayRecord unchanged.
2. K of a prompt is the draw of (seed, epoch, row id), and K frames are shown.
3. Each epoch shows every row once, in an order of its own.
4. Processes share one order and never show the same row twice in an epoch.
5. A stream set to a saved state goes on exactly as the one that saved it.
6. Rows whose videos cannot be read are left out of full batches, counted and told once each; too
   many of them end the stream with a ValueError that names the last file.
7. Frames of the needle world reach the model untouched, as images and as video.
"""

import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import pytest

from paravt_jax.records import Row, VideoRef
from pipelines.budget import frame_budget
from pipelines.datasets import question_rows
from pipelines.loader import prompt_list, prompt_stream
from pipelines.tfds_builder import RowBuilder, row_source
from pipelines.video import VideoReader
from tests.support.needle import data_folder, questions, renderer

BUDGETS = (2, 4)


def rows() -> list[Row]:
    return [q.row for q in questions()]


def stream(source=None, seed=0, **options: Any):
    options = {"groups_per_step": 4} | options
    return prompt_stream(source or rows(), VideoReader(), renderer(), BUDGETS, seed=seed, **options)


def take(prompts, steps: int) -> list:
    return [item for _ in range(steps) for item in next(prompts)]


def same(left, right) -> bool:
    return (
        (left.row, left.frame_budget) == (right.row, right.frame_budget)
        and np.array_equal(left.prompt.tokens, right.prompt.tokens)
        and np.array_equal(left.prompt.patches.values, right.prompt.patches.values)
    )


def test_rows_survive_array_record():
    source = row_source(rows(), data_folder())
    assert [source[i] for i in range(len(source))] == rows()


def test_the_same_rows_are_written_once_and_other_rows_apart(tmp_path):
    for kept in (rows(), rows(), rows()[:5]):
        source = row_source(kept, str(tmp_path))
        assert len(source) == len(kept)
    assert len(list(tmp_path.glob("rows-*"))) == 2


def test_two_hosts_may_write_the_same_rows_at_once(tmp_path, monkeypatch):
    examples = RowBuilder._generate_examples

    def overtaken(builder):
        monkeypatch.setattr(RowBuilder, "_generate_examples", examples)
        row_source(rows(), str(tmp_path))  # another one begins later and is done first
        yield from examples(builder)

    monkeypatch.setattr(RowBuilder, "_generate_examples", overtaken)
    source = row_source(rows(), str(tmp_path))
    assert [source[i] for i in range(len(source))] == rows()
    assert not [*tmp_path.rglob("incomplete*")]


def test_prompts_show_as_many_frames_as_the_draw_says():
    items = take(stream(), 6)
    for item in items:
        text = renderer().decode(item.prompt.tokens)
        assert item.frame_budget == text.count("<|image_pad|>") == len(item.prompt.patches.values)
    assert {item.frame_budget for item in items} == set(BUDGETS)


def test_budgets_follow_seed_epoch_and_row():
    length = len(rows())
    items = take(stream(seed=7, groups_per_step=1), 2 * length)
    for at, item in enumerate(items):
        expected = frame_budget(7, at // length, item.row.row_id, BUDGETS)
        assert item.frame_budget == expected


def test_epochs_show_every_row_once_in_their_own_order():
    length = len(rows())
    ids = [item.row.row_id for item in take(stream(groups_per_step=1), 2 * length)]
    assert sorted(ids[:length]) == sorted(ids[length:]) == sorted(r.row_id for r in rows())
    assert ids[:length] != ids[length:]


def test_seeds_change_the_order():
    first, second = ([i.row.row_id for i in take(stream(seed=s), 3)] for s in (0, 1))
    assert first != second


def test_a_saved_position_resumes_exactly():
    source = row_source(rows(), data_folder())
    prompts = stream(source)
    take(prompts, 3)
    state = json.loads(json.dumps(prompts.get_state()))
    ahead = take(prompts, 5)
    resumed = stream(source)
    resumed.set_state(state)
    assert all(same(a, b) for a, b in zip(ahead, take(resumed, 5), strict=True))


def test_tools_are_offered_or_not():
    for tools in (True, False):
        text = renderer().decode(take(stream(tools=tools), 1)[0].prompt.tokens)
        assert ("crop_video" in text) is tools


@pytest.mark.parametrize("mode", ["image", "video"])
def test_needle_frames_stay_as_they_are(mode):
    spec = renderer(mode).spec
    for limits in (spec, spec.limited(32 * 32, 32 * 32)):
        for count in (1, 3, 5, 64):
            raw, sized = (
                reader.overview(rows()[0].video, count).pixels
                for reader in (VideoReader(), VideoReader(spec=limits))
            )
            np.testing.assert_array_equal(sized, raw)


def test_evaluation_prompts_keep_the_order_of_the_rows():
    items = prompt_list(rows()[:3], VideoReader(), renderer(), budget=3)
    assert [item.row for item in items] == rows()[:3]
    assert all(len(item.prompt.patches.values) == item.frame_budget == 3 for item in items)


def with_broken(folder, every: int) -> list[Row]:
    """Rows of which every so many-th has no video, but a file in its place."""
    bad = folder / "broken.mp4"
    bad.write_bytes(b"no video")
    broken = VideoRef(str(bad), 64.0)
    return [
        dataclasses.replace(row, video=broken) if at % every == 0 else row
        for at, row in enumerate(rows())
    ]


def test_bad_rows_are_left_out_and_told_once(tmp_path, caplog):
    source = with_broken(tmp_path, every=3)
    good = sorted(row.row_id for at, row in enumerate(source) if at % 3)
    bad = len(source) - len(good)
    prompts = stream(source, groups_per_step=len(good), max_bad_rows=0.5)
    for _ in range(2):
        assert sorted(item.row.row_id for item in next(prompts)) == good
    assert prompts.metrics["data/bad_rows"] == bad
    assert len(caplog.messages) == bad and all("broken.mp4" in m for m in caplog.messages)


@pytest.mark.slow
def test_the_position_of_a_stream_that_left_rows_out_resumes_exactly(tmp_path):
    source = with_broken(tmp_path, every=2)
    prompts = stream(source, groups_per_step=1, max_bad_rows=0.5)
    for _ in range(len(source)):
        state = json.loads(json.dumps(prompts.get_state()))
        resumed = stream(source, groups_per_step=1, max_bad_rows=0.5)
        resumed.set_state(state)
        assert resumed.metrics["data/bad_rows"] == prompts.metrics["data/bad_rows"]
        assert same(next(prompts)[0], next(resumed)[0])


def test_too_many_bad_rows_stop_the_stream(tmp_path):
    source = with_broken(tmp_path, every=3)
    told = rf"of {len(source)} rows cannot be read.*data\.max_bad_rows=0\.1.*broken\.mp4"
    with pytest.raises(ValueError, match=told):
        take(stream(source, max_bad_rows=0.1), 10)
    with pytest.raises(ValueError, match=told):
        prompt_list(source, VideoReader(), renderer(), 2, max_bad_rows=0.1)


def test_rows_that_are_all_bad_stop_the_stream_whatever_the_limit(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read.*broken\.mp4"):
        take(stream(with_broken(tmp_path, every=1), max_bad_rows=1.0), 1)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_files_that_take_too_long_are_bad_rows_in_threads_and_processes(workers, caplog):
    reader = VideoReader(decode_seconds=1e-6)
    told = r"cannot be read.*\.mp4: decoding takes longer than data\.decode_seconds=1e-06"
    prompts = prompt_stream(
        rows(), reader, renderer(), BUDGETS, 4, seed=0, workers=workers, max_bad_rows=1.0
    )
    with pytest.raises(ValueError, match=told):
        next(prompts)
    assert len(caplog.messages) == len(rows())


def test_evaluation_leaves_bad_rows_out(tmp_path):
    source = with_broken(tmp_path, every=4)
    items = prompt_list(source, VideoReader(), renderer(), 2, max_bad_rows=0.5)
    assert [item.row for item in items] == [row for at, row in enumerate(source) if at % 4]


def test_impossible_streams_are_refused():
    with pytest.raises(ValueError, match="groups_per_step=0"):
        stream(groups_per_step=0)


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no rows"):
        row_source([], str(tmp_path))
    with pytest.raises(ValueError, match="share a row_id"):
        row_source([rows()[0], rows()[0]], str(tmp_path))


# --- a user's own questions -----------------------------------------------------------------

HEADER = "video,question,answer,question_type\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with one real video."""
    source = rows()[0].video.path
    (tmp_path / "clips").mkdir()
    shutil.copy(source, tmp_path / "clips" / "a.mp4")
    return tmp_path


def test_csv_and_jsonl_give_the_same_rows(folder):
    (folder / "questions.csv").write_text(
        HEADER + 'clips/a.mp4,"What, then?",red,oe\nclips/a.mp4,When?,"3, 8",tvg\n'
    )
    records = [
        {"video": "clips/a.mp4", "question": "What, then?", "answer": "red"},
        {"video": "clips/a.mp4", "question": "When?", "answer": "3, 8"},
    ]
    kinds = ("oe", "tvg")
    lines = [
        json.dumps(r | {"question_type": k, "row_id": i})
        for i, (r, k) in enumerate(zip(records, kinds, strict=True))
    ]
    (folder / "more.jsonl").write_text("\n\n".join(lines))
    from_csv = question_rows(str(folder)).rows
    from_jsonl = question_rows(str(folder / "more.jsonl")).rows
    plain = [dataclasses.replace(r, row_id="") for r in from_csv]
    assert plain == [dataclasses.replace(r, row_id="") for r in from_jsonl]
    assert [r.row_id for r in from_csv] == ["questions.csv:2", "questions.csv:3"]
    assert [r.row_id for r in from_jsonl] == ["0", "1"]
    assert from_csv[0].video.duration == 64.0 and from_csv[1].answer == "3, 8"


def test_own_rows_stream_like_any_others(folder, tmp_path_factory):
    (folder / "questions.csv").write_text(HEADER + "clips/a.mp4,What?,red,oe\n")
    source = row_source(question_rows(str(folder)).rows, str(tmp_path_factory.mktemp("cache")))
    items = take(stream(source, groups_per_step=2), 1)
    assert [item.row.question for item in items] == ["What?", "What?"]


def test_types_can_be_chosen(folder):
    (folder / "questions.csv").write_text(
        HEADER + 'clips/a.mp4,What?,red,oe\nclips/a.mp4,When?,"3, 8",tvg\n'
    )
    assert [r.question_type for r in question_rows(str(folder), None, ("tvg",)).rows] == ["tvg"]
    with pytest.raises(ValueError, match=r"no questions \(mcq\)"):
        question_rows(str(folder), None, ("mcq",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "clips/a.mp4,What?,red,open\n", r"questions\.csv, line 2: question_type='open'"),
        (HEADER + "clips/a.mp4,What?,,oe\n", r"line 2: answer missing"),
        (
            "video,question,answer\nclips/a.mp4,What?,red\n",
            "no column question_type; its first line is 'video,question,answer'",
        ),
        (HEADER + "clips/b.mp4,What?,red,oe\n", r"line 2: clips/b\.mp4: no such file"),
        (HEADER, "no questions"),
    ],
)
def test_faulty_csv_names_line_and_remedy(folder, text, message):
    (folder / "questions.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        question_rows(str(folder))


@pytest.mark.parametrize("text", ["{broken", "[1, 2]"])
def test_faulty_jsonl_names_the_line(folder, text):
    (folder / "questions.jsonl").write_text(f"\n{text}\n")
    with pytest.raises(ValueError, match=r"questions\.jsonl, line 2: the row is not "):
        question_rows(str(folder))


def test_a_folder_without_questions_says_what_it_needs(tmp_path):
    with pytest.raises(ValueError, match=r"questions\.csv or questions\.jsonl"):
        question_rows(str(tmp_path))
