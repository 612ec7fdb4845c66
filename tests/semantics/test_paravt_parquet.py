"""ParaVT-Parquet, from its published schema to typed rows and prompts.

1. Sentinel, `file://` and absolute paths lead to the same files below one root.
2. A row is used only if all its videos are there and can be read; what is missing is reported.
3. Nothing outside of the root is opened.
4. Lists and dictionaries may be JSON in a string.
5. All videos of a row are shown, and share its frame budget.
"""

import json
import os
import shutil

import pytest

from paravt_jax.records import ImageRef, Message, ToolCall, VideoRef
from pipelines.budget import shares
from pipelines.datasets import question_rows, sft_rows
from pipelines.loader import prompt_list
from pipelines.media import OUTSIDE, Bucket
from pipelines.tfds_builder import row_source
from pipelines.video import VideoReader
from tests.support import paravt_parquet as fixture
from tests.support.needle import renderer
from tests.support.videos import write_video


def below(folder, *names):
    return [os.path.join(os.path.realpath(folder), name) for name in names]


def test_questions_are_read_as_published(paravt_folder):
    rows = question_rows(paravt_folder).rows
    first, second, third, fourth = below(paravt_folder, *fixture.VIDEOS)
    assert [[video.path for video in row.videos] for row in rows] == [
        [first], [second], [third, fourth], [fourth],
    ]  # fmt: skip
    assert [row.question_type for row in rows] == ["oe", "tvg", "mcq", "oe"]
    assert [row.answer for row in rows] == ["red", "1.0, 3.5", "B", "a wall"]
    assert rows[0].question == "What colour is the wall?"
    assert rows[3].question == "Look:  What is it?"
    assert rows[0].row_id == "rl/nested.parquet:0" and rows[3].row_id == "rl/strings.parquet:0"
    assert rows[0].video.duration == fixture.SECONDS


def test_conversations_are_read_as_published(paravt_folder):
    first, second, third = sft_rows(paravt_folder).rows
    assert [m.role for m in first.messages] == ["system", "user", "assistant"]
    assert first.messages[0].content == (fixture.SYSTEM,)
    video, words = first.messages[1].content
    assert isinstance(video, VideoRef) and words == "What colour is it?"
    assert [v.path for v in second.videos] == below(paravt_folder, *fixture.VIDEOS[1:3])
    assert [m.role for m in third.messages] == ["user", "assistant", "tool", "assistant"]
    assert third.messages[2].content[0] == ImageRef(*below(paravt_folder, fixture.FRAME))
    assert third.row_id == "sft/selftrace/train.parquet:0"


def test_a_row_needs_all_its_videos(paravt_folder):
    found = question_rows(paravt_folder)
    reasons = {rejected.where.rsplit(", ")[1]: rejected.reason for rejected in found.rejected}
    assert set(reasons) == {"row 3", "row 1", "row 2"}
    assert "selfqa/lost.mp4: no such file" in reasons["row 3"]
    assert "broken.mp4" in reasons["row 2"]
    assert found.buckets == {
        "longvt_source": Bucket(2, missing=0, unreadable=1),
        "museg": Bucket(3, missing=1, unreadable=0),
        "selfqa": Bucket(3, missing=1, unreadable=0),
    }
    assert len(sft_rows(paravt_folder).rejected) == 1


def test_the_report_says_what_is_missing(paravt_folder):
    found = question_rows(paravt_folder, None, ("oe",))
    report = "\n".join(found.report())
    assert found.left_out == 2 and "; museg: 1 of 3" in found.summary()
    assert "3 of 7 rows cannot be used" in report
    assert "museg: 1 of 3 files missing, 0 unreadable" in report
    assert "longvt_source: 0 of 2 files missing, 1 unreadable" in report


def test_videos_may_lie_elsewhere(paravt_folder, tmp_path):
    """Only the tables: sentinels follow the root, a `file://` URI of another machine does not."""
    shutil.copytree(os.path.join(paravt_folder, "rl"), tmp_path / "rl")
    found = question_rows(str(tmp_path), paravt_folder)
    assert len(found.rows) == 4
    with pytest.raises(ValueError, match=r"no questions .* 7 of 7 rows"):
        question_rows(str(tmp_path))
    with pytest.raises(ValueError, match=r"video root .*nowhere: no such folder"):
        question_rows(str(tmp_path), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("escape", ["../outside.mp4", "link.mp4", "file:///{}/outside.mp4"])
def test_nothing_outside_of_the_root_is_opened(escape, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside.mp4"
    write_video(outside, 0)
    root.mkdir()
    (root / "link.mp4").symlink_to(outside)
    written = escape.format(tmp_path)
    rows = [fixture.question([written], "<video>What?", "x")]
    fixture.write_table(str(root), "rl.parquet", rows)
    with pytest.raises(ValueError, match="leads out of"):
        question_rows(str(root))
    write_video(root / "inside.mp4", 0)
    rows += [fixture.question(["inside.mp4"], "<video>What?", "x")]
    fixture.write_table(str(root), "rl.parquet", rows)
    found = question_rows(str(root))
    assert len(found.rows) == 1 and sum(b.missing for b in found.buckets.values()) == 1
    assert ("link" in escape) or found.buckets[OUTSIDE].missing == 1


def test_own_files_may_name_videos_absolutely_unless_a_root_is_given(tmp_path):
    write_video(tmp_path / "far.mp4", 0)
    (tmp_path / "data").mkdir()
    table = tmp_path / "data" / "questions.csv"
    table.write_text(f"video,question,answer,question_type\n{tmp_path}/far.mp4,What?,red,oe\n")
    assert len(question_rows(str(table)).rows) == 1
    with pytest.raises(ValueError, match="leads out of"):
        question_rows(str(table), str(tmp_path / "data"))


@pytest.fixture
def linked(tmp_path):
    """A root beside a folder of films: a link to it, one to a film, and links that are no entry."""
    films, root = tmp_path / "films", tmp_path / "root"
    write_video(films / "a.mp4", 0)
    shutil.copy(films / "a.mp4", tmp_path / "secret.mp4")
    (films / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "deep").mkdir(parents=True)
    (root / "videos").symlink_to(films)
    (root / "one.mp4").symlink_to(films / "a.mp4")
    (root / "deep" / "videos").symlink_to(films)
    return root


OWN_LINKS = ["videos/a.mp4", "./videos/a.mp4", "one.mp4", "deep/../videos/a.mp4"]
ESCAPES = [
    "../secret.mp4", "videos/../../secret.mp4", "videos/out.mp4", "deep/videos/a.mp4",
    "../films/a.mp4", "../../../etc/passwd", "file://../secret.mp4",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("written", [*OWN_LINKS, *ESCAPES])
def test_own_links_directly_beside_own_questions_are_followed(written, kind, linked):
    row = {"video": written, "question": "What?", "answer": "red", "question_type": "oe"}
    table = linked / f"questions.{kind}"
    text = f"{','.join(row)}\n{','.join(row.values())}\n" if kind == "csv" else json.dumps(row)
    table.write_text(text)
    if written in ESCAPES:
        with pytest.raises(ValueError, match="leads out of"):
            question_rows(str(table))
        return
    (row,) = question_rows(str(table)).rows
    assert row.video.path == os.path.realpath(linked / "videos" / "a.mp4")
    with pytest.raises(ValueError, match="leads out of"):
        question_rows(str(table), str(linked))


@pytest.mark.parametrize("written", [*OWN_LINKS, *ESCAPES])
def test_links_that_came_with_a_data_set_are_not(written, linked):
    fixture.write_table(str(linked), "rl.parquet", [fixture.question([written], "<video>?", "x")])
    with pytest.raises(ValueError, match="leads out of"):
        question_rows(str(linked))


BAD_QUESTIONS = {
    "no answer": ({"extra_info": {"answer": ""}}, "extra_info.answer is missing"),
    "unknown type": ({"extra_info": {"answer": "x", "question_type": "essay"}}, "essay"),
    "marks": ({"prompt": [{"role": "user", "content": "What?"}]}, "0 <video> marks for 1 videos"),
    "turns": ({"prompt": [{"role": "assistant", "content": "<video>"}]}, "turns of assistant"),
    "no prompt": ({"prompt": "{"}, "prompt is not JSON"),
    "no path": ({"videos": [{"video": None}]}, "None is no path"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_QUESTIONS.values(), ids=BAD_QUESTIONS)
def test_bad_questions_are_rejected_with_the_reason(change, reason, paravt_folder, tmp_path):
    good = fixture.question([fixture.VIDEOS[0]], "<video>What?", "x")
    fixture.write_table(str(tmp_path), "good.parquet", [good])
    fixture.write_table(str(tmp_path), "bad.parquet", [good | change])
    found = question_rows(str(tmp_path), paravt_folder)
    assert len(found.rows) == 1
    assert reason in found.rejected[0].reason and "bad.parquet, row 0" in found.rejected[0].where


def test_calls_in_a_field_are_read_and_kept(tmp_path):
    function = {"name": "crop_video", "arguments": json.dumps({"start_time": 1})}
    calls = [{"id": "1", "type": "function", "function": function}] * 2
    said = {"role": "assistant", "content": None, "tool_calls": calls}
    fixture.write_table(str(tmp_path), "calls.parquet", [{"messages": json.dumps([said])}])
    (row,) = sft_rows(str(tmp_path)).rows
    assert row.messages == (
        Message("assistant", (), 2 * (ToolCall("crop_video", {"start_time": 1}),)),
    )
    assert row_source([row], str(tmp_path / "cache"))[0] == row


BAD_CONVERSATIONS = {
    "silent": (fixture.conversation(user=[fixture.text("?")]), "nothing to learn"),
    "role": (fixture.conversation(robot=[fixture.text("?")]), "each message needs a role"),
    "part": (fixture.conversation(assistant=[{"type": "audio"}]), "'audio'"),
    "calls": (
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
        "tool_calls",
    ),
}


@pytest.mark.parametrize(("row", "reason"), BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS)
def test_bad_conversations_are_rejected_with_the_reason(row, reason, tmp_path):
    fixture.write_table(str(tmp_path), "bad.parquet", fixture.as_text([row], "messages"))
    with pytest.raises(ValueError, match=f"no conversations.*{reason}"):
        sft_rows(str(tmp_path))


def test_configurations_are_told_apart(paravt_folder, tmp_path):
    only_sft = os.path.join(paravt_folder, "sft")
    with pytest.raises(ValueError, match="no parquet file has the columns extra_info"):
        question_rows(only_sft)
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="no parquet file"):
        question_rows(str(tmp_path))
    with pytest.raises(ValueError, match="give a CSV, JSONL or parquet file"):
        question_rows(str(tmp_path / "empty"))


def test_rows_and_conversations_survive_array_record(paravt_folder, tmp_path):
    for rows in (question_rows(paravt_folder).rows, sft_rows(paravt_folder).rows):
        source = row_source(rows, str(tmp_path))
        assert [source[index] for index in range(len(source))] == rows


@pytest.mark.parametrize(
    ("budget", "videos", "expected"),
    [(4, 1, [4]), (64, 3, [22, 22, 20]), (8, 3, [4, 2, 2]), (4, 3, [2, 1, 1]), (3, 2, [2, 1])],
)
def test_videos_share_the_frame_budget(budget, videos, expected):
    assert shares(budget, videos) == expected
    with pytest.raises(ValueError, match="5 videos cannot share a frame budget of 4"):
        shares(4, 5)


@pytest.mark.parametrize("mode", ["image", "video"])
def test_prompts_show_all_videos(mode, paravt_folder):
    row = question_rows(paravt_folder, None, ("mcq",)).rows[0]
    r = renderer(mode)
    (item,) = prompt_list([row], VideoReader(spec=r.spec), r, budget=8)
    text = r.decode(item.prompt.tokens)
    assert text.index("Video 1:") < text.index("Video 2:") < text.index("Which?")
    assert [len(times) for times in item.prompt.times] == [4, 4]
    assert [times[0] for times in item.prompt.times] == [0.0, 0.0]
    assert len(item.prompt.patches.grids) == r.spec.group_count(8)
    again = r.with_hint(row, item.prompt, True, "")
    assert (again.tokens == item.prompt.tokens).all()
    assert (again.patches.values == item.prompt.patches.values).all()
