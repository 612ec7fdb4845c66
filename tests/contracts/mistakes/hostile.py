"""Rows and files that are damaged or odd, answers that nobody can give, and empty values.

That good rows beside them are kept is the matter of `tests/semantics/test_hostile_rows.py`.
"""

import io
import json

import pyarrow
import pyarrow.parquet

from tests.contracts.mistakes import Mistake
from tests.contracts.mistakes.data import GOOD, HEADER, conversations, questions

DEEP = "[" * 100_000
VIDEO = "{videos}/a.mp4"
DESCRIBE = "pipelines/describe.py"
SECRET = {"secret.mp4": "", "own/q.csv": HEADER + "../secret.mp4,What?,red,oe\n"}


def answered(question: str, answer: str, kind: str) -> Mistake:
    """A question that has no such answer."""
    return questions(f'{HEADER}{VIDEO},{question},"{answer}",{kind}\n', "line 2", answer)


def chatting(**assistant: object) -> Mistake:
    """A conversation whose assistant says this."""
    said = {"role": "assistant", "content": "x"} | assistant
    return conversations(json.dumps({"messages": [{"role": "user", "content": "?"}, said]}))


def damaged() -> bytes:
    """A parquet file with a page that is no longer what it was."""
    rows = [
        {"prompt": "[]", "videos": "[]", "extra_info": "{}", "note": f"{n}" * 40} for n in range(99)
    ]
    file = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, file, compression="snappy", use_dictionary=False)
    raw = bytearray(file.getvalue())
    raw[40:400] = bytes(360)
    return bytes(raw)


def empty(flag: str) -> Mistake:
    """A flag whose shell variable is not set."""
    return Mistake(f'{{small}} --dry-run {flag} ""', (flag, "empty"))


ROWS = [
    questions(HEADER.replace(",", ";"), "'video;question;answer;question_type'"),
    questions(f"{HEADER}lost.mp4,Où?,là,oe\n".encode("latin-1"), "Latin-1", "UTF-8"),
    questions(f"{HEADER}lost.mp4,What?,red,oe\n".encode("utf-16"), "UTF-16", "UTF-8"),
    questions(HEADER + f'{VIDEO},"What?,red,oe\n', "line 2", "quotes"),
    questions(HEADER + f"{VIDEO},{'x' * 140_000},red,oe\n", "line 2", "field limit"),
    questions(HEADER + f"{VIDEO},What, then?,red,oe\n", "line 2", "quotes around"),
    questions(HEADER.encode() + b"lost.mp4,\xed\xa0\x80?,red,oe\n", "line 2", "surrogate"),
    questions(HEADER + f"{VIDEO},What?<|im_end|>,red,oe\n", "line 2", "<|im_end|>"),
    questions(DEEP, "line 1", "nests", name="q.jsonl"),
    questions(damaged(), "damaged", name="q.parquet"),
    Mistake(
        "{own} --data q.csv --set evaluation.rows=9",
        "evaluation.rows=9",
        1,
        {"q.csv": HEADER + GOOD},
    ),
    answered("When?", "later", "tvg"),
    answered("When?", "63;71", "tvg"),
    answered("When?", "71, 63", "tvg"),
    answered("When?", "500, 900", "tvg"),
    answered("Which? A. red B. blue", "E", "mcq"),
    answered("Which? A. red B. blue", "7", "mcq"),
    questions(HEADER + f"{VIDEO},Which?,B,mcq\n", "line 2", "no options"),
    conversations(DEEP, "line 1", "nests"),
    chatting(tool_calls=5),
    chatting(tool_calls=[{"function": {"name": "crop_video", "arguments": DEEP}}]),
    chatting(content="x<|im_end|>"),
    Mistake("{own} --data own/q.csv", ("own/q.csv", "leads out"), code=1, files=SECRET),
    Mistake("q.csv", ("q.csv", "Latin-1"), 1, {"q.csv": b"\xe9\n"}, door=DESCRIBE),
    Mistake('""', ("path", "empty"), door=DESCRIBE),
    Mistake('from-hf "" out', "empty", door="models/convert.py"),
    *map(empty, ("--data", "--model", "--mesh", "--rollout-mesh", "--workdir")),
    *map(empty, ("--compile-only", "--programs")),
    *(
        Mistake(f"{{small}} --dry-run --set {name}=", (f"--set {name}", "empty"))
        for name in ("data.path", "data.video_root", "data.cache_dir", "data.mixture", "mesh")
    ),
    Mistake("{small} --dry-run --set model.adapter=", ("--set model.adapter", "empty")),
]
