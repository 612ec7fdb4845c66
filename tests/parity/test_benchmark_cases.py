"""Every recorded case of other harnesses, through `tests/parity/benchmark_cases.py`."""

import json
import pathlib

import pytest

from tests.parity.benchmark_cases import replay

CASES = pathlib.Path(__file__).parents[1] / "data" / "benchmark_cases"


def read(name):
    return [json.loads(line) for line in (CASES / name).read_text("utf-8").splitlines()]


BENCHMARKS = read("benchmark_cases.jsonl")
FUNCTIONS = sorted({case["fn"] for case in BENCHMARKS})


@pytest.mark.parametrize("fn", [fn for fn in FUNCTIONS if fn.startswith("prompt")])
def test_prompts(fn):
    for case in (case for case in BENCHMARKS if case["fn"] == fn):
        assert replay(case) == case["out"]
