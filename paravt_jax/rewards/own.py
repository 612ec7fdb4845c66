"""Rewards from a file of your own: a function of an attempt that returns its terms.

    from paravt_jax.rewards import Attempt, reward_terms

    @reward_terms(accuracy=(0, 1), brevity=(-0.2, 0))
    def concise(attempt: Attempt) -> dict[str, float]:
        return {"accuracy": attempt.accuracy(), "brevity": -0.2 * (len(attempt.text) > 400)}

`--set rewards.scheme=path/to/file.py:concise` trains with them, and so does a recipe with
`RewardRules(scheme=concise)`. The total is the sum of the terms, `format` times
`rewards.format_weight`. Without a term `accuracy` it is measured all the same, for the metrics, and
does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from paravt_jax.plugins import load
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.rules import (
    UNIT,
    Ranges,
    RewardBreakdown,
    RewardRules,
    Scheme,
    total_range,
)

RewardFunction = Callable[[Attempt], Mapping[str, float | int]]
"""The value of each term of a rollout."""

_TERMS = "__reward_terms__"
_TAKEN = ("total", "task", "anchor")


def reward_terms(
    **ranges: tuple[float | int, float | int],
) -> Callable[[RewardFunction], RewardFunction]:
    """Declare the terms that a reward returns, and the least and greatest value of each.

    Raises:
        ValueError: no terms, a name that the total and the anchor have, or a range that is none.
    """
    for name, ends in ranges.items():
        if name in _TAKEN or not (len(ends) == 2 and ends[0] <= ends[1]):
            raise ValueError(
                f"reward_terms({name}={ends}): give two rising numbers, and the term another name "
                f"than {', '.join(_TAKEN)}"
            )
    if not ranges:
        raise ValueError("reward_terms(): name a term, as in reward_terms(accuracy=(0, 1))")

    def declare(function: RewardFunction) -> RewardFunction:
        terms = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        setattr(function, _TERMS, terms)
        return function

    return declare


def scheme_of(reference: str) -> Scheme:
    """The scheme of a function with declared terms.

    Raises:
        ValueError: it cannot be found, or declares none.
    """
    function = load(reference)
    terms: Ranges | None = getattr(function, _TERMS, None)
    if terms is None:
        raise ValueError(
            f"{reference} does not say which terms it returns; put @reward_terms(...) above "
            "it (paravt_jax.rewards)"
        )

    def score(attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
        values = _checked(function(attempt), terms, reference)
        return _breakdown(values, attempt, rules)

    def ranges(rules: RewardRules) -> Ranges:
        nothing = {"format": (0.0, 0.0), "tool": (0.0, 0.0)}
        return {"accuracy": UNIT} | total_range(rules, {**nothing, **terms})

    return Scheme(score, ranges, reads=("mode",))


def _checked(values: Mapping[str, float | int], terms: Ranges, reference: str) -> dict[str, float]:
    if set(values) != set(terms):
        raise ValueError(
            f"rewards.scheme={reference} returned the terms {sorted(values)}; its reward_terms "
            f"declare {sorted(terms)}, and each rollout has all of them"
        )
    for name, (low, high) in terms.items():
        if not (math.isfinite(values[name]) and low <= values[name] <= high):
            raise ValueError(
                f"rewards.scheme={reference} returned {name}={values[name]}, which its "
                f"reward_terms declare to lie in [{low:g}, {high:g}]; correct one of them"
            )
    return {name: float(value) for name, value in values.items()}


def _breakdown(values: dict[str, float], attempt: Attempt, rules: RewardRules) -> RewardBreakdown:
    weighted = {**values, "format": rules.format_weight * values.get("format", 0.0)}
    total = sum(weighted.values())
    return RewardBreakdown(
        total=total,
        accuracy=values.pop("accuracy") if "accuracy" in values else attempt.accuracy(),
        format=values.pop("format", 0.0),
        tool=values.pop("tool", 0.0),
        task=total,
        terms=values,
    )
