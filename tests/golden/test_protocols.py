"""What each shipped protocol puts to a model and makes of its answers, as it was.

A changed byte of a prompt is another benchmark under the same name. Whoever means one writes the
file anew, and says why in the commit:

    pytest tests/golden/test_protocols.py --rewrite-golden
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evaluate.benchmarks import protocol, schemas, scoring
from evaluate.benchmarks.captions import Seen
from evaluate.benchmarks.protocol import Span
from evaluate.benchmarks.sample import Sample
from tests.support import benchmark_rows as rows

GOLDEN = Path(__file__).parent / "protocols.json"
ADVICE = "if this is meant, run this file with --rewrite-golden and say why in the commit"
FRAMES = 90
COMPLETIONS = (
    "B",
    "b",
    "(B) dog",
    "Because",
    "The answer is (A) or B",
    "<answer>B</answer>",
    "<think>A man... so A</think><answer>B</answer>",
    "<think>unfinished, perhaps B",
    "I see",
    "",
    "burnt sienna",
    "<answer>Burnt sienna.</answer>",
    "The event happens in the 0.3 - 3.0 seconds.",
    "<answer>[0.3, 3.0]</answer>",
    "start time: 0.3, end time: 3",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return rows.write_splits(tmp_path_factory.mktemp("splits"))


def chosen(task: str, root: Path) -> list[Sample]:
    """The second sample of a task, and its first of another kind if it has one."""
    samples = schemas.load(task, str(root)).samples[1:]
    return list({sample.kind: sample for sample in reversed(samples)}.values())[::-1]


def told(loaded: protocol.Protocol, mode: str, sample: Sample) -> dict[str, Any]:
    rules = loaded.rules(sample.task, sample.kind, mode)
    indices = rules.video.indices(FRAMES, rows.RATE)
    messages = rules.messages(sample, Seen(indices, FRAMES, rows.RATE))
    parts = [f"<{part.stop - part.start} frames>" if isinstance(part, Span) else part
             for part in messages.parts]  # fmt: skip
    return {
        "system": messages.system,
        "user": "".join(parts),
        "frames": indices,
        "decoding": rules.decoding.shown,
        "rounds": rules.agent.rounds,
        "scores": [round(scoring.score(rules, sample, said).score, 6) for said in COMPLETIONS],
    }


def found(name: str, root: Path) -> dict[str, Any]:
    loaded = protocol.load(name)
    return {
        f"{task}, {sample.kind}, {mode}": told(loaded, mode, sample)
        for task in loaded.tasks
        for sample in chosen(task, root)
        for mode in loaded.modes
    }


HARNESSES = [n for n in protocol.names() if set(protocol.load(n).tasks) <= set(schemas.TASKS)]


@pytest.mark.parametrize("name", HARNESSES)
def test_prompts_and_scores(name, root, request):
    now = found(name, root)
    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    if request.config.getoption("--rewrite-golden"):
        text = json.dumps(golden | {name: now}, indent=1, ensure_ascii=False, sort_keys=True)
        GOLDEN.write_text(text + "\n", "utf-8")
        return
    assert now.keys() == golden[name].keys(), ADVICE
    for key, value in now.items():
        assert value == golden[name][key], f"{name}: {key}: {ADVICE}"
