"""What a language model that judges is asked, and how its reply is read."""

from __future__ import annotations

import re
from collections.abc import Callable

from paravt_jax.protocol import after_thinking

Judge = Callable[[str], str]
"""Takes a user message, returns the reply of a language model."""

_NUMBER = re.compile(r"-?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})")
_LONGEST_REPLY = 4000
"""Characters at the end of a reply that are read."""


def judge_message(question: str, prediction: str, answer: str) -> str:
    """The user message with which a language model is asked for a verdict."""
    return (
        f"Question: {question}\n"
        f"Ground truth answer: {answer}\n"
        f"Model prediction: {prediction}\n\n"
        "Is the prediction semantically equivalent to the ground truth? "
        "Reply with a single number: 1.0 if correct, 0.5 if partially correct, 0.0 if wrong."
    )


def verdict(reply: str) -> float | None:
    """The first number of a reply, after its thinking if the judge thinks; None if there is none,
    or if it lies outside [0, 1]."""
    match = _NUMBER.search(after_thinking(reply[-_LONGEST_REPLY:]))
    value = float(match.group()) if match else -1.0
    return value if 0.0 <= value <= 1.0 else None
