"""Seconds of a step from the figures of its programs: sums, shares of the peak, an expectation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

SHARES = (1.0, 0.25, 0.125)
"""Shares of the limits of a rollout for which seconds of a step are told."""
REACHED = {"decode": 0.4, "other": 0.5}
"""Shares of the roofline that are expected of decoding and of everything else: what is asked of
them, not what was measured."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One program's part of a step."""

    name: str
    part: str
    """`rollout` or `learner`."""
    calls: float
    """In a step, on the limits of the settings."""
    seconds: float
    """Of a call, at the roofline."""
    spoken: bool
    """Whether rollouts that say less need fewer calls."""
    tokens: int
    model_flops: float

    def called(self, share: float) -> float:
        """Calls where rollouts take a share of what they may."""
        return self.calls * (share if self.spoken else 1.0)

    def expected(self, share: float) -> float:
        """Seconds in a step that reaches `REACHED`."""
        reached = REACHED["decode" if self.name.startswith("decode") else "other"]
        return self.called(share) * self.seconds / reached


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a run on chips that are all alike."""

    terms: Sequence[Term]
    chips: int
    flops: float
    """Peak of a chip, per second."""
    rollouts: int
    """0 without any."""
    generated: int
    """Most tokens that each of them generates."""

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Step:
        """From what `Report.json` makes, of which all programs must have been compiled."""
        names = [field.name for field in dataclasses.fields(Term) if field.name != "name"]
        terms = [
            Term(program, **{name: entry[name] for name in names})
            for program, entry in figures["programs"].items()
            if "seconds" in entry
        ]
        return cls(
            terms,
            **{name: figures[name] for name in ("chips", "rollouts", "generated")},
            flops=figures["chip"]["flops"],
        )

    def seconds(self, share: float = 1.0, part: str = "") -> float:
        """Roofline of a step, or of the rollouts or the learner alone, in which rollouts take a
        share of what they may."""
        return sum((term.called(share) * term.seconds for term in self._of(part)), 0.0)

    def utilisation(self, share: float = 1.0, part: str = "") -> float:
        """Share of the chips' peak that the model's own products take: MFU, at the roofline."""
        seconds = self.seconds(share, part)
        flops = sum((term.called(share) * term.model_flops for term in self._of(part)), 0.0)
        return flops / (seconds * self.chips * self.flops) if seconds else 0.0

    def expected(self, share: float = 1.0) -> dict[str, float]:
        """Seconds of each program in a step that reaches `REACHED`, the longest first."""
        seconds = {term.name: term.expected(share) for term in self.terms}
        return dict(sorted(seconds.items(), key=lambda item: -item[1]))

    def summary(self, share: float) -> dict[str, Any]:
        """All of it where rollouts take a share of what they may."""
        seconds, expected = self.seconds(share), self.expected(share)
        each = max(seconds, 1e-12) * self.chips
        learned = sum(term.tokens * term.calls for term in self.terms if term.name == "step")
        return {
            "seconds": seconds,
            "rollout": self.seconds(share, "rollout"),
            "learner": self.seconds(share, "learner"),
            "learned_per_second_and_chip": learned / each,
            "generated_per_second_and_chip": share * self.generated * self.rollouts / each,
            "mfu": self.utilisation(share),
            "learner_mfu": self.utilisation(share, "learner"),
            "expected_seconds": sum(expected.values()),
            "expected_by_program": expected,
        }

    def _of(self, part: str) -> list[Term]:
        return [term for term in self.terms if part in ("", term.part)]


def step_by_share(
    figures: Mapping[str, Any], shares: Sequence[float] = SHARES
) -> dict[float, dict[str, Any]]:
    """`Step.summary` for shares of the limits; none where something is not known that it takes."""
    measured = {name for name, entry in figures["programs"].items() if "seconds" in entry}
    needed = {name for name, calls in figures["calls"].items() if calls}
    if figures["chip"] is None or needed - measured:
        return {}
    step = Step.of(figures)
    return {share: step.summary(share) for share in shares}
