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


DRIVER = read("eval_cases.jsonl")


def same(found, expected):
    """Equal, numbers to nine digits."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[name], expected[name]) for name in expected
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=0, abs=1e-9, nan_ok=True)
    return found == expected and type(found) is type(expected)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_harnesses(fn):
    cases = [case for case in BENCHMARKS if case["fn"] == fn]
    wrong = [(case["in"], replay(case)) for case in cases if not same(replay(case), case["out"])]
    assert not wrong, f"{len(wrong)} of {len(cases)}"


@pytest.mark.parametrize("case", DRIVER, ids=[case["id"] for case in DRIVER])
def test_paravt(case):
    assert same(replay(case), case["expected"])


def test_the_empty_category_of_mlvu_counts():
    """The fact sheet: four rows in three of seven categories, one and a half of them right."""
    rows = [("count", "A", "A"), ("count", "B", "A"), ("ego", "A", "A"), ("order", "B", "A")]
    assert replay({"fn": "mlvu_aggregate_dev", "in": rows}) == pytest.approx(150 / 7)
