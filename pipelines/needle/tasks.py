"""Supervised tasks of the cold start, made from real frames and ground truth.

They build on one another: name what a frame shows, report what happens in a crop, answer from
reports, and then whole episodes. Every task stays in every mix, because a model this small
forgets what it no longer sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from paravt_jax.interfaces import FrameReader
from paravt_jax.protocol import TOOL_NAME
from paravt_jax.records import Clip, Example, Prompt
from pipelines.needle import traces
from pipelines.needle.questions import NeedleQuestion
from pipelines.needle.world import NeedleWorld
from pipelines.render import ChatRenderer

Window = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TaskKit:
    """What the tasks are made of."""

    world: NeedleWorld
    questions: Sequence[NeedleQuestion]
    reader: FrameReader
    renderer: ChatRenderer
    budgets: tuple[int, ...] = (4,)
    """Choices of the number of overview frames, drawn uniformly."""
    plan: tuple[float, ...] = (0.25, 0.25, 0.2, 0.1, 0.2)
    """Probability of cropping 0, 1, 2, ... windows in a trace."""
    event_share: float = 0.5
    """Share of examples of `clip` that show an event; `frame` shows one in 3 of 4."""
    tool: str = TOOL_NAME
    """What `looks` calls."""
    syntax: str = "tool_call"
    """How it writes calls."""
    quota: int | None = None
    """Most vision tokens of a clip of `looks`."""
    most_looks: int = 2
    """How often `looks` looks at most."""

    def __post_init__(self) -> None:
        if not np.isclose(sum(self.plan), 1.0) or min(self.plan) < 0:
            raise ValueError(f"plan={self.plan}: probabilities must be >= 0 and sum to 1")
        if len(self.plan) > len(self.world.windows) + 1:
            raise ValueError(
                f"plan={self.plan}: the video has only {len(self.world.windows)} windows"
            )
        if not self.questions:
            raise ValueError("questions is empty: a task needs at least one question")


Task = Callable[[TaskKit, NeedleQuestion, np.random.Generator], Example]


def frame(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """Name what one frame shows: `A red circle.` or `Nothing.`"""
    target, video = question.target, question.row.video
    time = int(rng.integers(kit.world.duration))
    if rng.random() < 0.75:
        time = int(rng.integers(target.start, target.end))
    shown = next((e for e in question.events if e.visible(time, time + 1)), None)
    frames = kit.reader.clip(video, time, time + 1)
    prompt = kit.renderer.prompt(frames, traces.FRAME_REQUEST)
    return _reply(kit, prompt, traces.caption(shown))


def clip(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """Report what happens in an aligned window, as a sub-agent."""
    empty = [w for w in kit.world.windows if not any(e.visible(*w) for e in question.events)]
    window = _window_of(kit, question)
    if empty and rng.random() >= kit.event_share:
        window = empty[rng.integers(len(empty))]
    frames = kit.reader.clip(question.row.video, *window)
    prompt = kit.renderer.subagent_prompt(frames, *window)
    return _reply(kit, prompt, traces.report(question.events, *window))


def qa(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """Answer from tool responses alone, without frames. Only the last turn is learned.

    Nine times in ten one of the responses reports the event asked about.
    """
    windows = _choose(kit, int(rng.integers(1, len(kit.world.windows) + 1)), rng)
    needed = _window_of(kit, question)
    if needed not in windows and rng.random() < 0.9:
        windows = sorted([*windows[1:], needed])
    prompt = kit.renderer.main_prompt(question.row, None, tools=True)
    return _episode(kit, question, prompt, np.zeros(0), windows, rng, learn_from=1)


def trace(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """A whole episode of the main agent with as many crops as the plan draws."""
    prompt, times = _overview(kit, question, rng, tools=True)
    windows = _choose(kit, int(rng.choice(len(kit.plan), p=kit.plan)), rng)
    return _episode(kit, question, prompt, times, windows, rng)


def looks(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """A whole episode that looks at one window a turn, sees its frames, and answers once it has
    seen what the question is about; the plan draws how often it looks at most."""
    prompt, times = _overview(kit, question, rng, tools=True)
    count = min(int(rng.choice(len(kit.plan), p=kit.plan)), kit.most_looks)
    windows, needed = _choose(kit, count, rng), _window_of(kit, question)
    if needed in windows:
        windows = windows[: windows.index(needed) + 1]
    calls = [traces.look(kit.tool, kit.syntax, *window) for window in windows]
    clips = [_clip(kit, question, window) for window in windows]
    answer = traces.decide(question, kit.world, times, windows, rng)
    episode = traces.looks(kit.renderer, calls, clips, answer)
    weights = (episode.turns >= 0).astype(np.float32)
    return Example(prompt, episode.tokens, weights, episode.shown)


def _clip(kit: TaskKit, question: NeedleQuestion, window: Window) -> Clip:
    start, end = float(window[0]), float(window[1])
    frames = kit.reader.clip(question.row.video, start, end, kit.quota)
    return kit.renderer.clip(frames, start, end)


def direct(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """Answer from the overview when no tool is offered."""
    prompt, times = _overview(kit, question, rng, tools=False)
    return _episode(kit, question, prompt, times, [], rng)


TASKS: dict[str, Task] = {
    "frame": frame,
    "clip": clip,
    "qa": qa,
    "trace": trace,
    "looks": looks,
    "direct": direct,
}
"""Tasks by name."""


def needle_examples(kit: TaskKit, task: str, seed: int) -> grain.MapDataset:
    """An endless data set of one task, shuffled anew each time round.

    Element `i` depends on `kit`, `task`, `seed` and `i` alone, so a run resumes by counting:
    index it, slice it, or make it an iterator with `to_iter_dataset()`.

    Raises:
        ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")
    make = TASKS[task]
    source = grain.MapDataset.source(kit.questions).seed(seed).shuffle().repeat()
    return source.random_map(lambda question, rng: make(kit, question, rng))


def _overview(
    kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator, tools: bool
) -> tuple[Prompt, np.ndarray]:
    frames = kit.reader.overview(question.row.video, int(rng.choice(kit.budgets)))
    return kit.renderer.main_prompt(question.row, frames, tools), frames.times


def _episode(
    kit: TaskKit,
    question: NeedleQuestion,
    prompt: Prompt,
    times: np.ndarray,
    windows: Sequence[Window],
    rng: np.random.Generator,
    learn_from: int = 0,
) -> Example:
    """The oracle's episode; turns from number `learn_from` on are learned."""
    tokens, turns = traces.trace(question, kit.world, kit.renderer, times, windows, rng)
    return Example(prompt, tokens, (turns >= learn_from).astype(np.float32))


def _reply(kit: TaskKit, prompt: Prompt, text: str) -> Example:
    """One assistant turn without a thought, all of it learned."""
    tokens = np.asarray(kit.renderer.encode(text + traces.TURN_END), np.int32)
    return Example(prompt, tokens, np.ones(len(tokens), np.float32))


def _choose(kit: TaskKit, count: int, rng: np.random.Generator) -> list[Window]:
    """`count` aligned windows in order of time."""
    chosen = rng.choice(len(kit.world.windows), count, replace=False)
    return [kit.world.windows[i] for i in sorted(chosen)]


def _window_of(kit: TaskKit, question: NeedleQuestion) -> Window:
    """The aligned window that holds the event asked about."""
    return next(w for w in kit.world.windows if question.target.visible(*w))
