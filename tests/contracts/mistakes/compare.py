"""Evaluations that cannot be compared: not there, of other questions, of other rows."""

from __future__ import annotations

import json

from tests.contracts.mistakes import Mistake

DOOR = "evaluate/compare.py"


def line(**fields: object) -> str:
    """A result of a sample."""
    known = {"task": "lvbench", "sample_id": "0", "doc_id": 0, "cluster": "v", "kind": "mcq"}
    return json.dumps(known | {"groups": {}, "target": "A", "score": 1.0} | fields) + "\n"


def compare(*named: str, a: str = line(), b: str = line(), code: int = 1, flags: str = "a b"):
    """Two evaluations."""
    files = {"a/samples.jsonl": a, "b/samples.jsonl": b}
    return Mistake(flags, named, code, files=files, door=DOOR)


ROWS = [
    compare("nowhere", "samples.jsonl", flags="a nowhere"),
    compare("REPORT_B", code=2, flags="a"),
    compare("no task in common", b=line(task="mlvu_dev")),
    compare("lvbench, question 0", "the truth is", b=line(target="B")),
    compare("no question was answered by both", b=line(status="error", score=None)),
    compare("b/samples.jsonl, line 1", "no result", b='{"doc_id": 3}\n'),
    compare("b/samples.jsonl, line 1", "no result", b="[1, 2]\n"),
    compare("no task in common", b=""),
    compare("--draws 5", "100", code=2, flags="a b --draws 5"),
    compare("--draws", "many", code=2, flags="a b --draws many"),
    compare("--seed -1", code=2, flags="a b --seed -1"),
    compare("REPORT_A", "empty", code=2, flags="'' b"),
]
