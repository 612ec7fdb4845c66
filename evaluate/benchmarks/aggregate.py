"""Scores of a task to figures. Errors are counted, never scored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from evaluate.benchmarks.rules import ScoringRules
from evaluate.benchmarks.sample import ERROR, MANY, OK, Kind, SampleResult
from paravt_jax.estimates import Difference, Estimate, estimate, paired_bootstrap

THRESHOLDS = (0.3, 0.5, 0.7)


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number of a report."""

    name: str
    """The harness's name of it; `NAME/GROUP=VALUE` for a part of the questions."""
    value: float
    stderr: float
    low: float
    high: float
    samples: int
    clusters: int
    note: str = ""
    """What a reader must know of it: `5 of 7 categories`."""

    @classmethod
    def of(cls, name: str, mean: Estimate, scale: float, note: str = "") -> Figure:
        """An estimate in the units of the harness."""
        value, error = scale * mean.value, scale * mean.stderr
        low, high = scale * mean.low, scale * mean.high
        return cls(name, value, error, low, high, mean.samples, mean.clusters, note)


@dataclasses.dataclass(frozen=True)
class TaskFigures:
    """What came of a task."""

    headline: Figure | None
    """The figure that the harness reports; None above the limit of errors."""
    figures: tuple[Figure, ...]
    """All others: parts, the other mean, thresholds."""
    samples: int
    """Questions, errors included."""
    errors: Mapping[str, int]
    """Errors by what happened."""
    drawn: int
    """Answers that were drawn because nothing could be read."""
    judged: int
    notes: tuple[str, ...]


def aggregate(
    rules: ScoringRules, results: Iterable[SampleResult], faults: Sequence[str] = ()
) -> TaskFigures:
    """The figures of one task.

    Args:
        results: one of each question, in any order.
        faults: rows that are no question; they count as errors.
    """
    every = collapsed(results) if rules.collapse else list(results)
    every = sorted(every, key=lambda result: result.doc_id)
    scored = [result for result in every if result.status == OK and result.score is not None]
    errors = _counted(
        [r.error for r in every if r.status == ERROR] + ["malformed row"] * len(faults)
    )
    total = len(every) + len(faults)
    too_many = sum(errors.values()) > rules.error_limit * total
    headline, others, notes = None, [], []
    if scored:
        headline, *others = _figures(rules, scored)
    kinds = {str(result.kind) for result in scored}
    if Kind.GROUNDING in kinds and len(kinds) > 1:
        notes.append(
            "the headline is a mean of accuracies and of overlaps: read those of the kinds"
        )
    if too_many and headline is not None:
        notes.append(
            f"no headline figure: {sum(errors.values())} of {total} questions are errors, more "
            f"than {rules.error_limit:.0%}"
        )
        others.insert(0, dataclasses.replace(headline, name=f"{headline.name}/without_errors"))
    if rules.count_errors and errors and scored:
        others.append(_with_errors(rules, scored, sum(errors.values())))
    return TaskFigures(
        None if too_many else headline,
        tuple(others),
        total,
        errors,
        sum(result.method == "drawn" for result in scored),
        sum(result.method == "judge" for result in scored),
        tuple(notes),
    )


def collapsed(results: Iterable[SampleResult]) -> list[SampleResult]:
    """Of questions with the same annotation the last, as lmms-eval keeps Charades-STA's in a
    dictionary."""
    return list({result.annotation: result for result in results}.values())


def _counted(reasons: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _figures(rules: ScoringRules, scored: Sequence[SampleResult]) -> list[Figure]:
    """The headline, then the others."""
    if all(result.kind == Kind.GROUNDING for result in scored):
        return _grounding(rules, scored)
    listed = _of_known_categories(rules, scored)
    others = len(scored) - len(listed)
    micro = _mean(rules, rules.metric, listed)
    if others:
        note = f"without {others} questions of other categories"
        micro = dataclasses.replace(micro, note=note)
    figures = [micro]
    if rules.aggregate != "micro":
        figures = [_macro(rules, scored), dataclasses.replace(micro, name=f"{rules.metric}/micro")]
    if others:
        figures.append(_mean(rules, f"{rules.metric}/all", scored))
    return figures + _parts(scored, lambda name, part: _mean(rules, f"{rules.metric}/{name}", part))


def _of_known_categories(
    rules: ScoringRules, scored: Sequence[SampleResult]
) -> Sequence[SampleResult]:
    """Those of the protocol's categories, where it lists any and there are such."""
    listed = [r for r in scored if r.groups.get(rules.by) in rules.categories]
    return listed or scored


def _grounding(rules: ScoringRules, scored: Sequence[SampleResult]) -> list[Figure]:
    stem = f"{rules.metric}_" if rules.metric != "accuracy" else ""
    names = [f"{stem}mIOU", *(f"{stem}IOU@{round(10 * level)}" for level in THRESHOLDS)]
    figures = [_mean(rules, names[0], scored)]
    for name, level in zip(names[1:], THRESHOLDS, strict=True):
        reached = [dataclasses.replace(r, score=float(_score(r) >= level)) for r in scored]
        figures.append(_mean(rules, name, reached))
    return figures + _parts(scored, lambda name, part: _mean(rules, f"{names[0]}/{name}", part))


def _mean(rules: ScoringRules, name: str, scored: Sequence[SampleResult]) -> Figure:
    mean = estimate([_score(r) for r in scored], [r.cluster for r in scored])
    figure = Figure.of(name, mean, rules.scale)
    # Exactly the harness's arithmetic: the sum first.
    value = sum(_score(r) for r in scored) * rules.scale / len(scored)
    return dataclasses.replace(figure, value=value)


def _macro(rules: ScoringRules, scored: Sequence[SampleResult]) -> Figure:
    """The mean over categories: those that have rows, or all, of which those without count 0."""
    parts = _grouped(scored, rules.by)
    categories = rules.categories or tuple(parts)
    present = [result for result in scored if result.groups.get(rules.by) in categories]
    if not present:
        present, categories = list(scored), ("",)
    mean = estimate(
        [_score(r) for r in present],
        [r.cluster for r in present],
        [r.groups.get(rules.by, "") for r in present],
    )
    having = sum(name in parts for name in categories)
    share = having / len(categories) if rules.aggregate == "macro-all" else 1.0
    means = [_mean(rules, "", parts[name]).value for name in categories if name in parts]
    divisor = len(categories) if rules.aggregate == "macro-all" else max(len(means), 1)
    note = f"{having} of {len(categories)} categories"
    if share < 1:
        note += ", the others count 0"
    figure = Figure.of(rules.metric, mean, rules.scale * share, note)
    return dataclasses.replace(figure, value=sum(means) / divisor) if means else figure


def _with_errors(rules: ScoringRules, scored: Sequence[SampleResult], errors: int) -> Figure:
    figure = _mean(rules, f"{rules.metric}/errors_as_wrong", scored)
    share = len(scored) / (len(scored) + errors)
    numbers = {name: getattr(figure, name) * share for name in ("value", "stderr", "low", "high")}
    return dataclasses.replace(figure, note="errors count as wrong, as in the harness", **numbers)


def _parts(
    scored: Sequence[SampleResult], figure: Callable[[str, Sequence[SampleResult]], Figure]
) -> list[Figure]:
    """A figure of each kind, where there are several, and of each value of each group."""
    parts: dict[str, list[SampleResult]] = {}
    kinds = {result.kind for result in scored}
    for result in scored:
        if len(kinds) > 1:
            parts.setdefault(str(result.kind), []).append(result)
        for name, values in result.groups.items():
            for value in values.split(MANY):
                parts.setdefault(f"{name}={value}", []).append(result)
    return [figure(name, parts[name]) for name in sorted(parts)]


def _grouped(scored: Iterable[SampleResult], by: str) -> dict[str, list[SampleResult]]:
    parts: dict[str, list[SampleResult]] = {}
    for result in scored:
        parts.setdefault(result.groups.get(by, ""), []).append(result)
    return parts


def _score(result: SampleResult) -> float:
    assert result.score is not None, "errors were left out"
    return result.score


def usage(results: Iterable[SampleResult]) -> dict[str, float]:
    """How questions were answered: tools and tokens, over those without errors."""
    done = [result for result in results if result.status == OK]
    if not done:
        return {}
    calls, turns = sum(r.calls for r in done), sum(r.turns for r in done)
    figures = {
        "tool/samples_with_call": sum(r.calls > 0 for r in done) / len(done),
        "tool/calls_per_turn": calls / max(turns, 1),
        "tool/calls_per_sample": calls / len(done),
        "tool/failed_share": sum(r.failed_calls for r in done) / max(calls, 1),
        "parse/unread_share": sum(r.prediction in (None, "") for r in done) / len(done),
        "turns_per_sample": turns / len(done),
        "tokens/prompt": sum(r.prompt_tokens for r in done) / len(done),
        "tokens/generated": sum(r.generated_tokens for r in done) / len(done),
        "frames_per_sample": sum(r.frames for r in done) / len(done),
    }
    return figures


def sight(results: Iterable[SampleResult]) -> Difference | None:
    """How much likelier the frames make what is said of them, in nats a token; None where nobody
    measured it. About 0 is a model that does not see, whatever it scores."""
    measured = [r for r in results if r.seeing is not None and r.blind is not None]
    if not measured:
        return None
    blind, seeing = zip(*((r.blind, r.seeing) for r in measured), strict=True)
    return paired_bootstrap(blind, seeing, [r.cluster for r in measured])


def timing(results: Iterable[SampleResult]) -> dict[str, float]:
    """Seconds that answers took. Not in a report, which is the same at every evaluation."""
    seconds = sorted(result.seconds for result in results if result.status == OK)
    if not seconds:
        return {}
    return {
        "seconds/mean": sum(seconds) / len(seconds),
        "seconds/most": seconds[-1],
    }
