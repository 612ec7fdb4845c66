"""ROUGE (Lin 2004, https://aclanthology.org/W04-1013): how much of the wording two texts share.

Own code because the usual package brings nltk and absl along. Words are runs of letters and digits
in one case; there is no stemming, which the systems that use ROUGE as a reward switch on: for
English the figures here can be lower than theirs where only an ending differs.
"""

from __future__ import annotations

import re
from collections import Counter

from paravt_jax.rewards.metrics import f1

_WORD = re.compile(r"[^\W_]+")
_MOST_WORDS = 400
"""Words of a text that are compared; the time of ROUGE-L grows with their square."""


def rouge_mean(prediction: str, answer: str) -> float:
    """Mean of the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, in [0, 1]."""
    parts = rouge_n(prediction, answer, 1), rouge_n(prediction, answer, 2)
    return (sum(parts) + rouge_l(prediction, answer)) / 3


def rouge_n(prediction: str, answer: str, n: int) -> float:
    """F1 of the two multisets of runs of `n` words; 0 where one text has none."""
    predicted, expected = (Counter(_runs(words(text), n)) for text in (prediction, answer))
    return f1((predicted & expected).total(), predicted.total(), expected.total())


def rouge_l(prediction: str, answer: str) -> float:
    """F1 of the longest common subsequence of words; 0 where one text has none."""
    predicted, expected = words(prediction), words(answer)
    return f1(_common_subsequence(predicted, expected), len(predicted), len(expected))


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text[: 20 * _MOST_WORDS].casefold())[:_MOST_WORDS]


def _runs(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, row by row of the usual table."""
    above = [0] * (len(b) + 1)
    for word in a:
        row = [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return above[-1]
