"""One rollout as rewards see it."""

from __future__ import annotations

import dataclasses

from paravt_jax.protocol import TURN_END, Window
from paravt_jax.records import ToolCall
from paravt_jax.rewards.answers import accuracy_score, extract_answer, judged_accuracy
from paravt_jax.rewards.judge import Judge
from paravt_jax.rewards.overlap import stale_calls


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What a rollout said and did, and what it should have found."""

    turns: tuple[str, ...]
    """Assistant turns, forced prefixes included."""
    completion: str
    """The same as one text."""
    answer: str
    """Ground truth: words, an option letter, or an interval in seconds."""
    question_type: str = "oe"
    """"oe", "mcq" or "tvg"; a scheme may know more."""
    question: str = ""
    """Put to the judge."""
    evidence: tuple[Window, ...] = ()
    """Windows in seconds where the answer can be seen."""
    calls: tuple[ToolCall, ...] = ()
    """Calls that ran, in order."""
    call_syntax: str = "tool_call"
    """How calls are written, a name of `protocol.SYNTAXES`."""
    executed_calls: int = 0
    """Tool calls that ran to a result, counted by the workflow."""
    progress: float = 1.0
    """Share of the training that is done, in [0, 1]."""
    mode: str = "f1"
    """How an open answer that differs from the ground truth is judged, see `RewardRules.mode`."""
    judge: Judge | None = None
    """Asked about open answers if the mode is "llm"."""

    @property
    def text(self) -> str:
        """All turns as one text, without their ends."""
        return "".join(turn.replace(TURN_END, "") for turn in self.turns)

    @property
    def prediction(self) -> str:
        """The answer of the last turn, or ""."""
        return extract_answer(self.turns)

    def counted_calls(self, fresh_seconds: float | int) -> int:
        """Calls that ran and count as uses of the tool, see `RewardRules.fresh_seconds`."""
        if not fresh_seconds:
            return self.executed_calls
        return self.executed_calls - stale_calls(self.calls[: self.executed_calls], fresh_seconds)

    def accuracy(self, mode: str | None = None, question_type: str | None = None) -> float:
        """How right the answer is, in [0, 1]; by default as the settings of the rewards ask for,
        and as the question is typed."""
        mode = self.mode if mode is None else mode
        kind = self.question_type if question_type is None else question_type
        if mode == "llm" and kind not in ("mcq", "tvg"):
            return judged_accuracy(self.judge, self.question, self.prediction, self.answer)
        return accuracy_score(self.prediction, self.answer, kind, mode)
