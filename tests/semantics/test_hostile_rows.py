"""Hostile and odd rows: each is left out, counted by the name of its fault and told by its place in
one printable line, and the good rows beside it are kept.

The table holds every fault in every format that can express it: questions in CSV, JSONL and parquet
files, conversations in JSONL and parquet files. Damaged files end the reading with one line.
"""

import json
import os
import random
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest

from pipelines import describe
from pipelines.datasets import contents, question_rows, sft_rows
from pipelines.faults import ANSWER, CONTROL, FIELD, LONGEST, MALFORMED, MISSING, REPEATED, VIDEOS
from pipelines.loader import prompt_list
from pipelines.tfds_builder import row_source
from pipelines.video import VideoReader
from tests.support import paravt_parquet as fixture
from tests.support.needle import processor_folder, renderer
from tests.support.videos import write_video
from train import main

DEEP = 100_000
NESTED = "[" * DEEP + "]" * DEEP
STEEP = '{"a":' * 40 + "1" + "}" * 40
SURROGATE = '"\\ud800"'
HEADER = "video,question,answer,question_type,evidence,row_id\n"
CHOICES = "Which? A. red B. blue"


class Case(NamedTuple):
    """A bad row as it stands in its file, and what is to be said of it."""

    bad: Any
    kind: str
    words: str


def own(**change: Any) -> dict:
    """A question of one's own."""
    return {
        "video": "a.mp4", "question": "What?", "answer": "red", "question_type": "oe",
    } | change  # fmt: skip


def published(question="<video>What?", answer: Any = "red", kind="oe", **change: Any) -> dict:
    """A question as ParaVT-Parquet has it."""
    return fixture.question(["a.mp4"], question, answer, kind) | change


def chat(**change: Any) -> dict:
    """A conversation of two messages; changes are of the assistant's."""
    asked = {"role": "user", "content": [fixture.video("a.mp4"), fixture.text("What?")]}
    return {"messages": [asked, {"role": "assistant", "content": "red"} | change]}


def calling(arguments: Any) -> dict:
    """A conversation with a call."""
    return chat(tool_calls=[{"function": {"name": "crop_video", "arguments": arguments}}])


CSV = {
    "a field above the limit of Python's reader": Case(
        "a.mp4," + "x" * 140_000 + ",red,oe\n", MALFORMED, "field larger than field limit"
    ),
    "a quote that does not close": Case('a.mp4,"What?,red,oe\n', MALFORMED, "close its quotes"),
    "a quote inside of quotes": Case(
        'a.mp4,"What is "this"?",red,oe\n', MALFORMED, "close its quotes"
    ),
    "half of a surrogate pair": Case(
        b"a.mp4,What \xed\xa0\x80?,red,oe\n", MALFORMED, "half of a surrogate pair"
    ),
    "a comma without quotes": Case(
        "a.mp4,What, then?,red,oe,,x\n", MALFORMED, "7 fields for 6 columns"
    ),
    "too few fields": Case("a.mp4,What?\n", FIELD, "answer, question_type missing"),
    "nested evidence": Case(
        f"a.mp4,What?,red,oe,{NESTED[DEEP // 2 : -DEEP // 2]}\n", MALFORMED, "evidence nests"
    ),
    "evidence that is no JSON": Case("a.mp4,What?,red,oe,early\n", MALFORMED, "evidence is not"),
    "a path that ends early": Case("a.mp4\0b,What?,red,oe\n", FIELD, "null"),
    "a screen that is cleared": Case("\x1b[2J.mp4,What?,red,oe\n", MISSING, "?[2J.mp4: no such"),
}
OWN_JSONL = {
    "nesting": Case(NESTED, MALFORMED, "nests too deeply"),
    "nested in a field": Case(f'{{"video": {NESTED}}}', MALFORMED, "nests too deeply"),
    "steep": Case(STEEP, MALFORMED, "nests too deeply"),
    "no JSON": Case("{broken", MALFORMED, "the row is not JSON"),
    "no object": Case("[1, 2]", MALFORMED, "not a JSON object"),
    "an endless number": Case(f'{{"video": {"1" * 5000}}}', MALFORMED, "limit"),
    "nested evidence": Case(own(evidence=NESTED), MALFORMED, "evidence nests too deeply"),
    "half of a surrogate pair": Case(
        json.dumps(own()).replace('"What?"', SURROGATE), MALFORMED, "half of a surrogate pair"
    ),
    "half of a pair in a path": Case(
        json.dumps(own()).replace('"a.mp4"', SURROGATE), MALFORMED, "half of a surrogate pair"
    ),
    "half of a pair in evidence": Case(own(evidence=f"[{SURROGATE}]"), MALFORMED, "surrogate"),
    "a list for a question": Case(own(question=["What?"]), FIELD, "question is a list"),
    "a dictionary for a video": Case(own(video={"path": "a.mp4"}), FIELD, "video is a dict"),
    "a truth for an answer": Case(own(answer=True), FIELD, "answer is a bool"),
    "white space for an answer": Case(own(answer="  "), FIELD, "answer missing"),
    "evidence of one number": Case(own(evidence=5), FIELD, "evidence=5"),
    "evidence beyond floats": Case(own(evidence=[[0, 10**400]]), FIELD, "evidence="),
    "endless evidence": Case(own(evidence="[[0, Infinity]]"), FIELD, "evidence="),
    "a type of a megabyte": Case(own(question_type="x" * 10**6), FIELD, "question_type="),
    "a name that no file can have": Case(own(video="x" * 5000), MISSING, "no such file"),
    "a row_id for the second time": Case(own(row_id="first"), REPEATED, "'first'"),
}
PARQUET = {
    "nested prompt": Case(published(prompt=NESTED), MALFORMED, "prompt nests too deeply"),
    "nested extra": Case(published(extra_info=NESTED), MALFORMED, "extra_info nests too deeply"),
    "nested videos": Case(published(videos=NESTED), MALFORMED, "videos nests too deeply"),
    "half of a surrogate pair": Case(
        published(extra_info=f'{{"answer": {SURROGATE}}}'), MALFORMED, "surrogate"
    ),
    "a number for messages": Case(published(prompt="5"), FIELD, "prompt is not a list"),
    "numbers for messages": Case(published(prompt="[5]"), FIELD, "needs a role"),
    "a number for videos": Case(published(videos="5"), FIELD, "videos is not a list"),
    "a list for an answer": Case(
        published(extra_info='{"answer": [["red"]]}'), FIELD, "extra_info.answer is a list"
    ),
    "a list for a type": Case(
        published(extra_info='{"answer": "red", "question_type": [1]}'), FIELD, "question_type="
    ),
    "more videos than frames": Case(
        fixture.question(["a.mp4"] * 5, "<video>" * 5 + "?", "red"), VIDEOS, "5 videos"
    ),
}
CHATS = {
    "a number of calls": Case(chat(tool_calls=5), FIELD, "tool_calls is not a list"),
    "numbers for calls": Case(chat(tool_calls=[5]), FIELD, "tool_calls needs a function"),
    "a number for a function": Case(chat(tool_calls=[{"function": 5}]), FIELD, "a function with"),
    "nested calls": Case(chat(tool_calls=NESTED), MALFORMED, "tool_calls nests too deeply"),
    "nested arguments": Case(calling('{"a": ' * DEEP), MALFORMED, "arguments of a call nests"),
    "steep arguments": Case(calling('{"a":' * 9 + "1" + "}" * 9), FIELD, "calls of 8 levels"),
    "arguments that are no number": Case(calling('{"start_time": NaN}'), FIELD, "not JSON"),
    "a number for messages": Case({"messages": 5}, FIELD, "messages is not a list"),
    "numbers for messages": Case({"messages": [5]}, FIELD, "needs a role"),
    "a list for a role": Case({"messages": [{"role": ["user"]}]}, FIELD, "needs a role"),
    "a number for content": Case(chat(content=5), FIELD, "a text or a list of parts"),
    "numbers for parts": Case(chat(content=[5]), FIELD, "a text or a list of parts"),
    "a number for a text": Case(chat(content=[{"type": "text", "text": 5}]), FIELD, "not a text"),
    "a list for a type": Case(chat(content=[{"type": ["text"]}]), FIELD, "a part of type"),
    "a number for a path": Case(
        chat(content=[{"type": "video_url", "video_url": 5}]), FIELD, "5 is no path"
    ),
    "no messages": Case({"said": "red"}, FIELD, "messages is not a list"),
    "half of a surrogate pair": Case(
        json.dumps(chat()).replace('"red"', SURROGATE), MALFORMED, "half of a surrogate pair"
    ),
    "nested row": Case(f'{{"messages": {NESTED}}}', MALFORMED, "nests too deeply"),
}


ANSWERS = {
    "no time": ("When?", "later", "tvg", "`start, end` in seconds"),
    "no time either": ("When?", "banana", "tvg", "`start, end` in seconds"),
    "a semicolon": ("When?", "63;71", "tvg", "`start, end` in seconds"),
    "the wrong way round": ("When?", "71, 63", "tvg", "start first"),
    "behind the video": ("When?", "500, 900", "tvg", "outside of the video, which is 8 seconds"),
    "mostly behind the video": ("When?", "6, 60", "tvg", "outside of the video"),
    "one of two behind it": ("When?", "1-2, 40-50", "tvg", "outside of the video"),
    "no options": ("Which?", "B", "mcq", "no options"),
    "one option": ("Which? A. red", "A", "mcq", "no options"),
    "no option": (CHOICES, "E", "mcq", "none of the options A, B"),
    "an index that counts from 1": (CHOICES, "2", "mcq", "an index counts from 0"),
    "other words": (CHOICES, "green", "mcq", "none of the options A, B"),
    "letter and words of two": (CHOICES, "A. blue", "mcq", "may mean option A or B"),
    "index or words": ("Which? A. 1 B. 0", "1", "mcq", "may mean option A or B"),
    "the same words twice": ("Which? A. red B. red", "red", "mcq", "may mean option A or B"),
}


def lines(rows: list) -> str:
    """Rows as JSONL; a row that is a text stands as it is."""
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(folder, form: str, bads: list) -> str:
    """A good row, the bad ones, another good row; returns the path of the data set."""
    if form == "csv":
        good = [b"a.mp4,What?,red,oe,,first\n", b'a.mp4,"When, then?","1, 3",tvg,"[[1, 2]]",last\n']
        raw = [bad if isinstance(bad, bytes) else bad.encode() for bad in bads]
        (folder / "own.csv").write_bytes(b"".join([HEADER.encode(), good[0], *raw, good[1]]))
        return str(folder / "own.csv")
    if form == "jsonl":
        rows = [own(row_id="first"), *bads, own(row_id="last")]
        (folder / "own.jsonl").write_text(lines(rows))
        return str(folder / "own.jsonl")
    if form == "chats.jsonl":
        (folder / form).write_text(lines([chat(), *bads, calling('{"start_time": 1}')]))
        return str(folder / form)
    fields = ("prompt", "videos", "extra_info") if form == "parquet" else ("messages",)
    good = published() if form == "parquet" else chat()
    rows = [
        {name: as_json(row[name]) for name in fields}
        for row in [good, *(bad for bad in bads if isinstance(bad, dict)), good]
    ]
    fixture.write_table(str(folder), "rows.parquet", rows)
    return str(folder)


def as_json(value: Any) -> str:
    """Columns hold JSON, which can say anything, or what is none."""
    return value if isinstance(value, str) else json.dumps(value)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A folder with one video of 8 seconds."""
    path = tmp_path_factory.mktemp("hostile") / "a.mp4"
    write_video(path, shade=60)
    return path


@pytest.fixture
def folder(video, tmp_path):
    os.link(video, tmp_path / "a.mp4")
    return tmp_path


TABLES = {
    "csv": CSV,
    "jsonl": OWN_JSONL,
    "parquet": PARQUET,
    "chats.jsonl": CHATS,
    "chats.parquet": {
        name: case
        for name, case in CHATS.items()
        if isinstance(case.bad, dict) and "messages" in case.bad
    },
}
EVERY = [(form, name) for form, table in TABLES.items() for name in table]


def read(path: str, form: str):
    if form.startswith("chats"):
        return sft_rows(path)
    return question_rows(path, most_videos=4)


@pytest.mark.parametrize(("form", "name"), EVERY, ids=[f"{f}: {n}" for f, n in EVERY])
def test_a_bad_row_is_left_out_counted_and_named(form, name, folder):
    case = TABLES[form][name]
    path = write(folder, form, [case.bad])
    found = read(path, form)
    assert len(found.rows) == 2 and found.total == 3
    (rejected,) = found.rejected
    assert case.words in rejected.reason and rejected.kind == case.kind
    place = "rows.parquet, row 1" if "parquet" in form else f"{os.path.basename(path)}, line "
    assert place in rejected.where
    report = found.report()
    assert report[0] == "1 of 3 rows cannot be used:" and f"1 x {case.kind}" in report[-1]
    assert all(line.isprintable() and len(line) < LONGEST + 300 for line in report)


@pytest.mark.parametrize("form", TABLES)
def test_many_bad_rows_do_not_hide_the_good_ones(form, folder, capsys):
    """All of a table in one file, through the door; the good rows go on to ArrayRecord."""
    cases = TABLES[form].values()
    path = write(folder, form, [case.bad for case in cases])
    found = read(path, form)
    assert len(found.rows) == 2 and len(found.rejected) >= len(cases)
    source = row_source(found.rows, str(folder / "cache"))
    assert [source[index] for index in range(2)] == found.rows
    assert describe.main([path]) == 0
    said = capsys.readouterr().out
    several = form == "parquet"  # without a model any number of videos can be shown
    assert f"{2 + several} of {found.total} rows can be used" in said
    for kind in {case.kind for case in cases} - {VIDEOS}:
        assert f"x {kind}" in said


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_nobody_can_give_are_left_out(name, form, folder):
    question, answer, kind, words = ANSWERS[name]
    bads = {
        "csv": f'a.mp4,{question},"{answer}",{kind}\n',
        "jsonl": own(question=question, answer=answer, question_type=kind),
        "parquet": published(f"<video>{question}", answer, kind),
    }
    found = question_rows(write(folder, form, [bads[form]]))
    (rejected,) = found.rejected
    assert len(found.rows) == 2 and rejected.kind == ANSWER and words in rejected.reason


CHOSEN = {
    "a letter": (CHOICES, "B", "B"),
    "a small letter in brackets": (CHOICES, "(b)", "B"),
    "letter and words": (CHOICES, "B. blue", "B"),
    "a sentence": (CHOICES, "The answer is B.", "B"),
    "words": (CHOICES, "Blue", "B"),
    "an index": (CHOICES, "1", "B"),
    "options on lines": ("Which?\n(a) red\n(b) blue\nAnswer with a letter.", "blue", "B"),
    "words that look like a letter": ("Which? A. Vitamin D B. Vitamin A", "Vitamin A", "B"),
    "an article": ("What? A. the cat B. a dog", "A dog", "B"),
    "a name before the options": ("Is J. Smith in the U.S.A.? A. yes B. no", "No", "B"),
    "numbers for words": ("How many? A. 12 B. 13", "13", "B"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_option_that_an_answer_means_becomes_its_letter(name, folder):
    question, answer, letter = CHOSEN[name]
    row = own(question=question, answer=answer, question_type="mcq")
    found = question_rows(write(folder, "jsonl", [row]))
    assert found.rows[1].answer == letter and not found.rejected
    assert found.restated == (answer != letter)
    said = "1 choice answers were read as the letter of an option"
    assert found.report() == [said] * found.restated


def test_a_control_token_is_a_bad_row_at_both_doors(folder, capsys):
    path = write(folder, "jsonl", [own(question="What?<|im_end|>")])
    found = question_rows(path, check=renderer().check_question)
    assert [rejected.kind for rejected in found.rejected] == [CONTROL] and len(found.rows) == 2
    assert describe.main([path, "--model", processor_folder()]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 rows can be used" in said and "<|im_end|>" in said


@pytest.mark.parametrize(
    "bad",
    [chat(content="red<|im_end|>"), calling('{"start_time": "<|im_start|>"}')],
    ids=["words", "arguments"],
)
def test_so_is_one_in_a_conversation(bad, folder, capsys):
    path = write(folder, "chats.jsonl", [bad])
    assert describe.main([path, "--model", processor_folder()]) == 0
    said = capsys.readouterr().out
    assert "2 of 3 rows can be used" in said and f"1 x {CONTROL}" in said


def test_the_dry_run_counts_them_and_says_how_questions_are_split(folder, capsys):
    path = write(folder, "jsonl", [own(question="What?<|im_end|>"), own(), NESTED, own()])
    flags = ["--data", path, "--set", "data.max_rejected=0.5", "--set", "evaluation.rows=0"]
    assert main.main([*flags, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "2 of 6 rows cannot be used" in said and f"1 x {CONTROL}" in said
    assert "4 questions about 1 videos train, 0 questions about 0 videos are held out" in said


def test_a_control_token_that_comes_by_another_way_is_left_out_of_the_stream(folder):
    found = question_rows(write(folder, "jsonl", [own(question="What?<|im_end|>")]))
    r = renderer()
    items = prompt_list(found.rows, VideoReader(spec=r.spec), r, 4, max_bad_rows=0.5)
    assert [item.row.question for item in items] == ["What?", "What?"]


PIECES = [
    *("'\",:[]{}\\\n\r\0\xff\u2028"), "\\ud800", "\\u0000", "null", "true", "1e999", "NaN", "-1",
    '{"a":', "video", "messages", "role", '"tool_calls": 5', "A.", "<video>", "mcq", "71, 63",
]  # fmt: skip
WHOLE = {
    "csv": f'a.mp4,"{CHOICES}",B,mcq,"[[1, 2]]",x\n',
    "jsonl": json.dumps(own(question=CHOICES, answer="B", question_type="mcq", evidence="[]")),
    "parquet": published(f"<video>{CHOICES}", "B", "mcq"),
    "chats.jsonl": json.dumps(calling({"start_time": 1})),
    "chats.parquet": calling({"start_time": 1}),
}


def scrambled(text: str, draw: random.Random) -> str:
    """A text with pieces put in and stretches cut out."""
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        text = (
            text[:at]
            + draw.choice(PIECES) * draw.choice([1, 1, 50])
            + text[at + draw.choice([0, 1, 20]) :]
        )
    return text


@pytest.mark.parametrize("form", TABLES)
def test_no_scrambled_row_ends_the_reading(form, folder):
    """150 of them each; in a CSV file one may take the next row with it."""
    for seed in range(150):
        draw, bad = random.Random(seed), WHOLE[form]
        if isinstance(bad, str):
            bad = scrambled(bad, draw)
        else:
            name = draw.choice(list(bad))
            bad = bad | {name: scrambled(json.dumps(bad[name]), draw)}
        found = read(write(folder, form, [bad]), form)
        assert len(found.rows) >= 1 + (form != "csv"), bad
        assert all(line.isprintable() for line in found.report())


def test_the_kind_of_a_data_set_does_not_hang_on_its_first_row(folder):
    (folder / "chats.jsonl").write_text(NESTED + "\n" + json.dumps(chat()) + "\n")
    assert contents(str(folder / "chats.jsonl")) == ("conversations",)


FILES = {
    "semicolons": (HEADER.replace(",", ";").encode(), "'video;question;answer"),
    "tabs": (HEADER.replace(",", "\t").encode(), "separated by commas"),
    "no header": (b"a.mp4,What?,red,oe\n", "'a.mp4,What?,red,oe'"),
    "nothing": (b"", "no column video, question"),
    "a header without end": (b'"' + b"x" * 140_000, "names no columns"),
    "Latin-1": (f"{HEADER}a.mp4,Où est-ce?,là,oe\n".encode("latin-1"), "Latin-1"),
    "UTF-16": (f"{HEADER}a.mp4,What?,red,oe\n".encode("utf-16"), "UTF-16"),
    "UTF-16 without a mark": (f"{HEADER}a.mp4,What?,red,oe\n".encode("utf-16-be"), "UTF-16"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_another_form_is_named_in_one_line(name, folder, capsys):
    raw, words = FILES[name]
    (folder / "own.csv").write_bytes(raw)
    assert describe.main([str(folder / "own.csv")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}/own.csv") and words in line


def test_the_mark_that_spreadsheets_put_before_utf_8_is_no_matter(folder):
    text = f"{HEADER}a.mp4,Où est-ce?,là,oe\n"
    (folder / "own.csv").write_bytes(text.encode("utf-8-sig"))
    assert question_rows(str(folder / "own.csv")).rows[0].answer == "là"


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_damaged_pages_are_one_line_that_names_the_file(compression, folder, capsys):
    path = folder / "rows.parquet"
    rows = [published(f"<video>What is {number}?") for number in range(64)]
    columns = [{name: as_json(value) for name, value in row.items()} for row in rows]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(columns), path, compression=compression,
        use_dictionary=False, write_page_checksum=True,
    )  # fmt: skip
    raw = bytearray(path.read_bytes())
    raw[200:600] = bytes(400)
    path.write_bytes(raw)
    assert describe.main([str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}") and "damaged" in line


def test_a_text_that_is_no_utf_8_costs_its_row_alone(folder):
    good, bad = (as_json(published()["extra_info"]).encode(), b'{"answer": "\xff"}')
    table = pyarrow.table(
        {
            "prompt": [as_json(published()["prompt"])] * 3,
            "videos": [as_json(published()["videos"])] * 3,
            "extra_info": pyarrow.array([good, bad, good]).view(pyarrow.string()),
        }
    )
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    found = question_rows(str(folder))
    assert len(found.rows) == 2 and "row 1" in found.rejected[0].where
    assert found.rejected[0].kind == MALFORMED
