"""What all rewards share: their rules, their result and its ranges."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Annotated, Literal

from paravt_jax.plugins import Own, is_reference
from paravt_jax.ranges import at_least
from paravt_jax.rewards.attempt import Attempt
from paravt_jax.rewards.judge import JudgeSettings
from paravt_jax.settings import OneOf, Refused, Settings

THINK_MIN_CHARS = 10
"""Shortest stripped thought that counts as one."""


_SCHEMES = "paravt_jax.rewards.schemes"
READ_BY_ALL = ("scheme", "format_weight", "judge")
"""Settings that all schemes read; of the others, those that `Scheme.reads` names."""


def scheme_names() -> tuple[str, ...]:
    """The schemes of this package."""
    return _modules_below(tuple(importlib.import_module(_SCHEMES).__path__))


@functools.cache
def _modules_below(folders: tuple[str, ...]) -> tuple[str, ...]:
    # Once: rules are made for every rollout that is scored, and folders are slow to list.
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders)))


@dataclasses.dataclass(frozen=True)
class RewardRules(Settings):
    """Weights and switches of the reward. The defaults are the PARA-GRPO recipe, corrected."""

    compat: Literal["fixed", "reference"] = "fixed"
    """The corrected rewards, "fixed", or those of the release, "reference"."""
    scheme: Annotated[str | Own | Callable[..., Mapping[str, float]], OneOf(scheme_names)] = (
        "paravt"
    )
    """Whose rewards: a module of `paravt_jax.rewards.schemes`, which says what it reads, or a
    function of your own (`reward_terms`), as `path/to/file.py:name` or `package.module:name`."""
    answer_suffix: bool = True
    """Whether the answer carries more of the format score than the thinking."""
    anchor_weight: float | int = 0.5
    """Weight of the anchor (lambda) inside the format score; 0 is vanilla GRPO."""
    format_weight: float | int = 1.0
    """Weight of the format score in the total."""
    mode: Literal["f1", "precise", "exact", "llm"] = "f1"
    """How an open answer that differs from the ground truth is judged: "f1", "precise", "exact" or
    "llm". By F1, the source's, a list of all six colours earns 0.286, and naming one 0.167 on
    average; "precise" is F1 times the share of words that are right, by which naming several
    answers that share no words earns less than naming one. Only for compat="fixed"."""
    judge: JudgeSettings = dataclasses.field(default_factory=JudgeSettings)
    """The judge of mode="llm"."""
    tool_base: float | int = 0.1
    """Credit for at least one executed call. Only for compat="fixed"."""
    tool_bonus: float | int = 0.5
    """Further credit, times accuracy, if a call was executed. Only for compat="fixed"."""
    fresh_seconds: Annotated[float | int, at_least(0)] = 0.0
    """Seconds of the video that a call must look at, and no earlier call did, to count as a use of
    the tool. Credit is multiplied by the share of calls that count; scheme="vital" pays for those
    alone. 0, the source's rule, counts whatever ran: a crop of 0.001 s, the same crop five times.
    Only for compat="fixed"."""
    window_term: Literal["iou", "recall", "tool", "none"] = "iou"
    """What scheme="longvt" gives for its last crop: "iou" with the evidence, "recall" of it, "tool"
    for having used it and being right, or "none"."""
    iou_scale: tuple[float, float] = (0.2, 0.8)
    """IoU at which scheme="vital" begins to give credit, and at which it gives all of it."""
    grounded: bool = False
    """Whether answers in words or options also name the window, judged against the evidence. For
    scheme="vital", "deepvideo_r1" and "visd"."""

    def check_together(self) -> None:
        """Refuse rules that no release has beside it, and weights without a meaning."""
        try:
            self.definition  # noqa: B018  a function that declares no terms is refused
        except ValueError as error:
            raise Refused(self, "{scheme:name}={why}", why=error) from error
        if not (len(self.iou_scale) == 2 and 0 <= self.iou_scale[0] < self.iou_scale[1] <= 1):
            raise Refused(self, "{iou_scale}: give two rising numbers in [0, 1]")
        fixed_only = (("mode", self.mode == "precise"), ("fresh_seconds", self.fresh_seconds))
        for name in (name for name, used in fixed_only if used and self.compat == "reference"):
            raise Refused(
                self,
                f"{{{name}}} is no rule of any release, which {{compat}} repeats; set "
                "{compat:=fixed}",
            )
        for name in ("anchor_weight", "format_weight", "tool_base", "tool_bonus"):
            if self.compat == "fixed" and getattr(self, name) < 0:
                raise Refused(self, f"{{{name}}} must not be negative; 0 switches it off")

    @property
    def definition(self) -> Scheme:
        """How a rollout is scored."""
        return find_scheme(str(self.scheme))

    @property
    def anchor_share(self) -> float:
        """Weight of the anchor in the total; 0 for schemes that have none."""
        anchored = "anchor_weight" in self.definition.reads
        return self.anchor_weight * self.format_weight if anchored else 0.0


@dataclasses.dataclass(frozen=True)
class RewardBreakdown:
    """Reward of one rollout by term."""

    total: float
    """accuracy + format_weight * format + tool, and what the scheme adds."""
    accuracy: float
    """How right the answer is, in [0, 1]."""
    format: float
    """How well the text keeps to the tags, the anchor included; in [0, 1] if "fixed"."""
    tool: float
    """Credit for using the tool."""
    anchor: float = 0.0
    """The anchor alone, before its weight, in [-0.3, 0.7]; mean over turns if "fixed"."""
    task: float = 0.0
    """The total with the anchor left out of the format term. Where the anchor is applied at
    structural positions only, this is what all the other tokens are given."""
    terms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What else the scheme computes, by name; its module says what is part of the total."""

    def as_dict(self) -> dict[str, float]:
        """All terms by name, the further ones beside the others."""
        fields = dataclasses.asdict(self)
        return fields | fields.pop("terms")


Ranges = dict[str, tuple[float, float]]
"""Least and greatest value of each term of a breakdown, by the names of `as_dict`."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Whose rewards: how a rollout is scored by them."""

    score: Callable[[Attempt, RewardRules], RewardBreakdown]
    ranges: Callable[[RewardRules], Ranges]
    """Least and greatest value that `score` can give each term."""
    reads: tuple[str, ...] = ()
    """The settings of `RewardRules` that act here, besides those that act everywhere."""
    call_syntax: str | None = None
    """The only syntax whose calls it judges, a name of `protocol.SYNTAXES`; None takes any."""


@functools.cache
def find_scheme(name: str) -> Scheme:
    """The scheme of a name, or of a function that `plugins.load` finds.

    Raises:
        ValueError: there is none.
    """
    if is_reference(name):
        # Imported here: the adapter of such functions is made of what this module defines.
        return importlib.import_module("paravt_jax.rewards.own").scheme_of(name)
    return importlib.import_module(f"{_SCHEMES}.{name}").SCHEME


def readers_of(setting: str) -> tuple[str, ...]:
    """The schemes of this package that read a setting of `RewardRules`."""
    return tuple(name for name in scheme_names() if setting in find_scheme(name).reads)


UNIT = (0.0, 1.0)
"""The range of a share."""
ANCHOR = (-0.3, 0.7)
"""The range of `TurnAnchor.total`."""


def breakdown(
    rules: RewardRules,
    *,
    accuracy: float,
    format: float,
    tool: float = 0.0,
    added: Mapping[str, float] | None = None,
    shown: Mapping[str, float] | None = None,
) -> RewardBreakdown:
    """A reward without an anchor: accuracy + format_weight * format + tool + all of `added`."""
    added = added or {}
    total = accuracy + rules.format_weight * format + tool + sum(added.values())
    terms = {**added, **(shown or {})}
    return RewardBreakdown(total, accuracy, format, tool, task=total, terms=terms)


def total_range(rules: RewardRules, added: Mapping[str, tuple[float, float]]) -> Ranges:
    """The ranges of a reward without an anchor, from those of the parts of its total, among them
    accuracy, format and tool."""
    weight = {"format": rules.format_weight}
    scaled = [sorted(weight.get(name, 1.0) * end for end in ends) for name, ends in added.items()]
    total = (sum(low for low, _ in scaled), sum(high for _, high in scaled))
    return {"total": total, "task": total, "anchor": (0.0, 0.0), **added}


@dataclasses.dataclass(frozen=True)
class TurnAnchor:
    """The anchor of one turn, in the parts that its tags are about.

    R_anchor = 0.4 [closed, thinks] - 0.3 [opened, not closed] + 0.3 [closed, thinks, acts] with the
    coefficients alpha, gamma and beta of ParaVT's selective anchoring.
    """

    thinking: float
    """What ending the thought earns or costs, in [-0.3, 0.4]."""
    acting: float
    """What calling or answering after it earns, in [0, 0.3]."""

    @property
    def total(self) -> float:
        """In [-0.3, 0.7]."""
        return self.thinking + self.acting


def turn_anchor(opened: bool, closed: bool, thinks: bool, acts: bool) -> TurnAnchor:
    """The anchor of a text that has `<think>` or not, `</think>` or not, thoughts of substance or
    not, and a call or an answer or not."""
    thinking = 0.4 * (closed and thinks) - 0.3 * (opened and not closed)
    return TurnAnchor(thinking, 0.3 * (closed and thinks and acts))
