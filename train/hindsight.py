"""What a teacher is told about a rollout that its student could not know: the hint, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paravt_jax.records import Row, Trajectory

Attempt = tuple[Row, Trajectory]
"""A question and a scored rollout."""

Feedback = Callable[[Sequence[Attempt]], list[str]]
"""A few sentences on what each rollout did right and wrong."""

_HINT = """\
[Note to a reviewer; who wrote the reply below has not seen it]
Verified answer: {answer}
{evidence}Feedback on the reply: {feedback}"""


def hindsight(row: Row, feedback: str) -> str:
    """The hint of VISD's teacher (arXiv 2605.06094): the verified answer, where it can be seen, and
    corrective feedback on one rollout."""
    windows = ", ".join(f"{start:g} to {end:g}" for start, end in row.evidence)
    evidence = f"Verified evidence: seconds {windows}\n" if windows else ""
    return _HINT.format(answer=row.answer, evidence=evidence, feedback=feedback)


def feedback_from_rewards(attempts: Sequence[Attempt]) -> list[str]:
    """Feedback without a judge: what accuracy and format of each rollout say, as a sentence."""
    return [_sentence(trajectory.rewards) for _, trajectory in attempts]


def _sentence(rewards: dict[str, float]) -> str:
    accuracy = rewards["accuracy"]
    verdict = "wrong" if accuracy <= 0 else "right" if accuracy >= 1 else "partly right"
    return (
        f"The answer is {verdict}, and the form is {'' if rewards['format'] >= 1 else 'not '}kept."
    )
