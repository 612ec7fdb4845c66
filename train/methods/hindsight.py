"""What a teacher is told about a rollout that its student could not know: the hint, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from paravt_jax.protocol import after_thinking
from paravt_jax.records import Row, Trajectory
from paravt_jax.rewards import JudgeSettings, LlmJudge, open_judge
from train.hosts.cluster import from_first, is_first

Attempt = tuple[Row, Trajectory]
"""A question and a scored rollout."""

Feedback = Callable[[Sequence[Attempt]], list[str]]
"""A few sentences on what each rollout did right and wrong."""

_OBJECT = re.compile(r"\{.*\}", re.DOTALL)
_MOST_CHARACTERS = 1000

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


def open_feedback(settings: JudgeSettings) -> Feedback:
    """Who says what went right and wrong: a language model if one is named, else the rewards.

    Raises:
        ValueError: the settings name a judge that cannot be asked.
    """
    if not settings.url:
        return feedback_from_rewards
    judge = open_judge(settings, read_feedback)

    def ask(attempts: Sequence[Attempt]) -> list[str]:
        # Several hosts could be told several things: one asks, the others are told.
        return from_first(feedback_from_judge(judge, attempts) if is_first() else [])

    return ask


def feedback_from_judge(judge: LlmJudge, attempts: Sequence[Attempt]) -> list[str]:
    """What a judge that knows answer and evidence says of each reply; where it fails, the rewards
    say it. All are asked side by side."""

    def ask(attempt: Attempt) -> str:
        try:
            return read_feedback(judge(feedback_message(*attempt))) or ""
        except Exception:  # somebody else's service: its failure must not stop a run
            return ""

    with ThreadPoolExecutor(judge.settings.concurrency) as threads:
        replies = list(threads.map(ask, attempts))
    ours = feedback_from_rewards(attempts)
    return [reply or from_rewards for reply, from_rewards in zip(replies, ours, strict=True)]


def feedback_message(row: Row, trajectory: Trajectory) -> str:
    """What a judge is asked. It sees words only: the frames are not shown to it."""
    windows = ", ".join(f"{start:g} to {end:g}" for start, end in row.evidence)
    return (
        f"Question about a video: {row.question}\n"
        f"Verified answer: {row.answer}\n"
        f"Verified evidence, in seconds: {windows or 'not marked'}\n"
        f"Reply to be assessed:\n{trajectory.scored_text}\n\n"
        "Say in two to four sentences whether the answer is right, whether the reasoning leads to "
        "it and fits the evidence, and, if something is wrong, the one cause behind it. Respond "
        'with a JSON object of one field: {"feedback": "..."}'
    )


def read_feedback(reply: str) -> str | None:
    """The feedback in a judge's reply, cut to 1000 characters as in VISD; None if there is none."""
    match = _OBJECT.search(after_thinking(reply))
    try:
        feedback = json.loads(match.group())["feedback"] if match else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return feedback.strip()[:_MOST_CHARACTERS] or None if isinstance(feedback, str) else None


def feedback_from_rewards(attempts: Sequence[Attempt]) -> list[str]:
    """Feedback without a judge: what accuracy and format of each rollout say, as a sentence."""
    return [_sentence(trajectory.rewards) for _, trajectory in attempts]


def _sentence(rewards: dict[str, float]) -> str:
    accuracy = rewards["accuracy"]
    verdict = "wrong" if accuracy <= 0 else "right" if accuracy >= 1 else "partly right"
    return (
        f"The answer is {verdict}, and the form is {'' if rewards['format'] >= 1 else 'not '}kept."
    )
