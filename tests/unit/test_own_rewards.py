"""Rewards that are a function of the user's own."""

import dataclasses
import sys

import pytest

from paravt_jax.rewards import (
    Attempt,
    RewardRules,
    ranges,
    reward_terms,
    scheme_names,
    schemes,
    score,
)
from paravt_jax.rewards.rules import readers_of

SAID = "<think>\nthe ball is red\n</think>\n<answer>red</answer>"


@reward_terms(accuracy=(0, 1), format=(0, 1), pace=(-1, 0))
def quick(attempt: Attempt) -> dict[str, float]:
    return {"accuracy": attempt.accuracy(), "format": 1.0, "pace": -0.25}


@reward_terms(surprise=(0, 3))
def odd(attempt: Attempt) -> dict[str, float]:
    return {"surprise": 3.0}


@reward_terms(accuracy=(0, 1))
def too_high(attempt: Attempt) -> dict[str, float]:
    return {"accuracy": 1.5}


@reward_terms(accuracy=(0, 1))
def forgetful(attempt: Attempt) -> dict[str, float]:
    return {}


@reward_terms(accuracy=(0, 1))
def no_number(attempt: Attempt) -> dict[str, float]:
    return {"accuracy": float("nan")}


def undeclared(attempt: Attempt) -> dict[str, float]:
    return {"accuracy": 1.0}


def test_the_total_is_the_sum_of_the_terms():
    rules = RewardRules(scheme=quick, format_weight=2.0)
    result = score(SAID, "red", rules=rules)
    assert result.as_dict() == {
        "total": 1.0 + 2.0 * 1.0 - 0.25,
        "task": 2.75,
        "accuracy": 1.0,
        "format": 1.0,
        "tool": 0.0,
        "anchor": 0.0,
        "pace": -0.25,
    }
    found = ranges(rules)
    assert set(found) == set(result.as_dict())
    assert found["total"] == (-1.0, 3.0)


def test_accuracy_is_measured_where_it_does_not_count():
    result = score(SAID, "red", rules=RewardRules(scheme=odd))
    assert (result.total, result.accuracy, result.terms) == (3.0, 1.0, {"surprise": 3.0})
    assert ranges(RewardRules(scheme=odd))["accuracy"] == (0.0, 1.0)


def test_a_setting_keeps_the_name_and_finds_the_function_again():
    rules = RewardRules(scheme=quick)
    assert rules.scheme == f"{__file__}:quick"
    assert RewardRules(scheme=str(rules.scheme)) == rules == dataclasses.replace(rules)


def test_the_mode_reaches_the_attempt():
    half = "<answer>red ball</answer>"
    assert score(half, "red", rules=RewardRules(scheme=quick, mode="exact")).accuracy == 0.0
    assert 0 < score(half, "red", rules=RewardRules(scheme=quick)).accuracy < 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (too_high, r"too_high returned accuracy=1\.5.*\[0, 1\]"),
        (forgetful, r"forgetful returned the terms \[\].*\['accuracy'\]"),
        (no_number, "no_number returned accuracy=nan"),
    ],
)
def test_a_value_that_was_not_declared_stops_the_run(function, message):
    with pytest.raises(ValueError, match=message):
        score(SAID, "red", rules=RewardRules(scheme=function))


def test_what_declares_no_terms_is_refused_at_once():
    with pytest.raises(ValueError, match=r"scheme=.*undeclared.*@reward_terms"):
        RewardRules(scheme=undeclared)


@pytest.mark.parametrize("ranges", [{}, {"total": (0, 1)}, {"pace": (1, 0)}])
def test_a_declaration_without_meaning_is_refused(ranges):
    with pytest.raises(ValueError, match="reward_terms"):
        reward_terms(**ranges)


def test_a_module_among_the_schemes_is_found_by_its_name(tmp_path, monkeypatch):
    """A scheme of this package is one file: nothing else names it."""
    (tmp_path / "lengthy.py").write_text(
        "from paravt_jax.rewards.rules import Scheme, breakdown, total_range\n"
        "def score(attempt, rules):\n"
        "    return breakdown(rules, accuracy=0.0, format=0.0, added={'words': 2.0})\n"
        "def ranges(rules):\n"
        "    zero = (0.0, 0.0)\n"
        "    parts = {'accuracy': zero, 'format': zero, 'tool': zero, 'words': (0.0, 9.0)}\n"
        "    return total_range(rules, parts)\n"
        "SCHEME = Scheme(score, ranges, reads=('grounded',))\n"
    )
    monkeypatch.setattr(schemes, "__path__", [*schemes.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"{schemes.__name__}.lengthy", raising=False)
    assert "lengthy" in scheme_names()
    rules = RewardRules(scheme="lengthy", grounded=True)
    assert score(SAID, "red", rules=rules).total == 2.0
    assert ranges(rules)["total"] == (0.0, 9.0)
    assert set(readers_of("grounded")) == {"deepvideo_r1", "lengthy", "visd", "vital"}
