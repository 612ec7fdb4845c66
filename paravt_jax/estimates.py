"""Means of scores with their uncertainty: questions about one video are not independent."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

Z = 1.959964
"""Quantile of the standard normal distribution that leaves 2.5 % above it."""
DRAWS = 10_000
"""Of a bootstrap: the third digit of a p value at 0.05 stands."""
SEED = 20_260_520
"""The same draws in every report."""
_TOGETHER = 1 << 22
"""Numbers of a bootstrap in memory at once."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean of scores between 0 and 1."""

    value: float
    stderr: float
    """Clustered standard error (Miller, arXiv 2411.00640, equation 4), with the factor
    G / (G - 1) for G clusters; 0 with one cluster."""
    low: float
    high: float
    """95 % interval."""
    samples: int
    clusters: int


def estimate(
    scores: Sequence[float], clusters: Sequence[Hashable], strata: Sequence[Hashable] | None = None
) -> Estimate:
    """The mean of scores and its interval, clustered.

    The interval is Wilson's of as many independent questions as have this standard error, so that
    it stays within [0, 1] and has a width where all answers are right. With no spread between
    clusters it counts these.

    Args:
        scores: between 0 and 1.
        clusters: what each question has in common with others: its video.
        strata: with these, the mean of the means of the strata.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("no scores: there is no mean of nothing")
    values, groups = np.asarray(scores, float), _numbered(clusters)
    strata_of = _numbered(strata) if strata is not None else np.zeros(len(values), int)
    counts = np.bincount(strata_of)
    means = np.bincount(strata_of, values) / counts
    residuals = (values - means[strata_of]) / counts[strata_of] / len(counts)
    mean, many = float(means.mean()), int(groups.max()) + 1
    spread = float((np.bincount(groups, residuals) ** 2).sum()) * many / max(many - 1, 1)
    stderr = spread**0.5 if many > 1 else 0.0
    effective = mean * (1 - mean) / spread if stderr > 1e-9 else 0.0
    low, high = wilson(mean, effective or many)
    return Estimate(mean, stderr, low, high, len(values), many)


def wilson(mean: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of `count` independent trials."""
    weight = Z * Z / count
    centre = (mean + weight / 2) / (1 + weight)
    half = (weight * (mean * (1 - mean) + weight / 4)) ** 0.5 / (1 + weight)
    return max(centre - half, 0.0), min(centre + half, 1.0)


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher the second of two runs scores on the same questions."""

    value: float
    low: float
    high: float
    """95 % interval, percentiles of the bootstrap."""
    p: float
    """Two-sided: twice the share of draws on the other side of 0, at most 1."""
    samples: int
    clusters: int


def paired_bootstrap(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    draws: int = DRAWS,
    seed: int = SEED,
) -> Difference:
    """The difference of two means over the same questions, by drawing whole clusters.

    Args:
        first: scores of one run.
        second: those of the other, in the same order.

    Raises:
        ValueError: there are no scores.
    """
    if not first:
        raise ValueError("no question was answered by both runs; compare runs of the same tasks")
    gains = np.asarray(second, float) - np.asarray(first, float)
    groups = _numbered(clusters)
    sums, sizes = np.bincount(groups, gains), np.bincount(groups)
    drawn = _bootstrap(sums, sizes, draws, seed)
    below, above = np.mean(drawn <= 0), np.mean(drawn >= 0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    # One draw more on either side: no number of draws shows that p is 0.
    p = min(1.0, 2 * (min(below, above) * draws + 1) / (draws + 1))
    return Difference(float(gains.mean()), float(low), float(high), float(p), len(gains), len(sums))


def _bootstrap(sums: np.ndarray, sizes: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Means of as many clusters as there are, drawn with replacement."""
    random, many = np.random.default_rng(seed), len(sums)
    pieces, left = [], draws
    while left:
        count = min(left, max(_TOGETHER // many, 1))
        chosen = random.integers(0, many, (count, many))
        pieces.append(sums[chosen].sum(1) / sizes[chosen].sum(1))
        left -= count
    return np.concatenate(pieces)


def _numbered(names: Sequence[Hashable]) -> np.ndarray:
    """Names as numbers from 0, in the order in which they first come."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], int)
