"""Questions and conversations that cannot be read, and videos that are not there."""

from tests.contracts.mistakes import Mistake

HEADER = "video,question,answer,question_type\n"
GOOD = "{videos}/a.mp4,What?,red,oe\n"


def questions(text: str | bytes, *named: str, name: str = "q.csv", settings: str = "") -> Mistake:
    """A run on the one file `q.csv`."""
    arguments = f"{{own}} --data {name} {settings}".strip()
    return Mistake(arguments, (name, *named), code=1, files={name: text})


def conversations(text: str, *named: str) -> Mistake:
    """Fine-tuning on the one file `c.jsonl`."""
    return Mistake("{chatting} --data c.jsonl", ("c.jsonl", *named), 1, {"c.jsonl": text})


ROWS = [
    questions(""),
    questions(HEADER),
    questions("video,question\n{videos}/a.mp4,What?\n", "answer", "question_type"),
    questions(HEADER + "{videos}/a.mp4,,red,oe\n", "line 2", "question"),
    questions(HEADER + "{videos}/a.mp4,What?,red,essay\n", "line 2", "question_type"),
    questions(HEADER + "lost.mp4,What?,red,oe\n", "lost.mp4"),
    questions(HEADER + GOOD + "lost.mp4,What?,red,oe\n", "lost.mp4", "data.max_rejected"),
    questions(
        "video,question,answer,question_type,evidence\n{videos}/a.mp4,What?,red,oe,soon\n",
        "evidence",
    ),
    questions(
        'video,question,answer,question_type,evidence\n{videos}/a.mp4,What?,red,oe,"[[3, 1]]"\n',
        "evidence",
    ),
    questions(HEADER + GOOD, "mcq", settings="--set data.question_types=mcq"),
    questions('{"video": "a.mp4"\n', "line 1", name="q.jsonl"),
    questions("[1, 2]\n", "line 1", name="q.jsonl"),
    questions("no parquet", name="q.parquet"),
    questions(GOOD, name="q.txt"),
    Mistake("{own} --data d", ("d", "questions.csv"), 1, {"d/readme.txt": "nothing"}),
    Mistake(
        "{own} --data q.csv",
        "broken.mp4",
        code=1,
        files={"q.csv": HEADER + "broken.mp4,What?,red,oe\n", "broken.mp4": "no video"},
    ),
    Mistake(
        "{own} --data q.csv",
        "broken.mp4",
        code=1,
        files={"q.csv": HEADER + "broken.mp4,What?,red,oe\n", "broken.mp4": b""},
    ),
    Mistake("{own} --set data.mixture={here}/b.csv", "b.csv", 1, {"b.csv": HEADER}),
    conversations(""),
    conversations("{}\n", "messages"),
    conversations('{"messages": []}\n'),
    conversations('{"messages": [{"role": "user", "content": "hello"}]}\n', "assistant"),
    conversations('{"messages": [{"role": "robot", "content": "hello"}]}\n', "role"),
    conversations("not json\n", "line 1"),
    Mistake("{chatting} --data {questions}", "questions.csv", code=1),
    Mistake("lost.csv", "lost.csv", code=1, door="pipelines/describe.py"),
    Mistake("q.csv", "q.csv", 1, {"q.csv": HEADER}, door="pipelines/describe.py"),
    Mistake("q.jsonl", ("q.jsonl", "line 1"), 1, {"q.jsonl": "{"}, door="pipelines/describe.py"),
]
