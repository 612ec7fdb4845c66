"""Supervised tasks of the cold start, made from real frames and ground truth.

They build on one another: name what a frame shows, tell things apart that a text names, report
what happens in a crop, answer from reports, and then whole episodes. Every task stays in every mix,
because a model this small forgets what it no longer sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from paravt_jax.interfaces import FrameReader
from paravt_jax.protocol import TOOL_NAME
from paravt_jax.records import Clip, Example, Prompt, Shown, VideoRef
from pipelines.arrays import Seconds
from pipelines.needle import traces
from pipelines.needle.questions import Asked, NeedleQuestion, ask
from pipelines.needle.world import SHAPES, NeedleVideo, NeedleWorld, draw_events
from pipelines.render import ChatRenderer

Window = tuple[int, int]

RECALLED = 12
"""Statements of an example of `recall`."""


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


def recall(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """Read which things there are, then say again and again which colour the circle or which shape
    the red thing has, or that there is none. No frames.

    What is named is drawn by dice and not learned; what is found of it is.
    """
    events = _imagine(kit, len(SHAPES), rng).events
    things = [events[i] for i in rng.permutation(len(events))]
    count = int(rng.integers(1, len(things)))
    listed = " ".join(map(traces.caption, things[:count]))
    parts, encode = list[traces.Part](), kit.renderer.encode
    for _ in range(RECALLED):
        is_listed = rng.random() < 0.7
        thing = things[rng.integers(count) if is_listed else rng.integers(count, len(things))]
        target: Asked = "colour" if rng.random() < 0.5 else "shape"
        span = (thing.start, thing.end) if is_listed else None
        subject, answer = traces.statement(target, thing, span)
        parts += [(encode(subject), -1), (encode(f" {answer}\n"), 0)]
    return _example(kit.renderer.prompt(None, listed), parts)


def qa(kit: TaskKit, question: NeedleQuestion, rng: np.random.Generator) -> Example:
    """Answer from tool responses that nobody asked for, without frames, about a video of up to four
    events. Four times in five all of them are reported, so that the question has to decide."""
    video = _imagine(kit, int(rng.integers(1, len(SHAPES) + 1)), rng)
    questions = ask([video], [question.row.question_type])
    question = questions[rng.integers(len(questions))]
    windows = _choose(kit, int(rng.integers(1, len(kit.world.windows) + 1)), rng)
    if rng.random() < 0.8:
        full = {w for w in kit.world.windows if any(e.visible(*w) for e in video.events)}
        windows = sorted(full.union(windows))
    prompt, unseen = kit.renderer.main_prompt(question.row, None, tools=True), np.zeros(0)
    parts = traces.conclusion(question, kit.world, kit.renderer, unseen, windows, rng)
    return _example(prompt, parts)


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
    return _example(prompt, *traces.looks(kit.renderer, calls, clips, answer))


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
    "recall": recall,
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
) -> tuple[Prompt, Seconds]:
    frames = kit.reader.overview(question.row.video, int(rng.choice(kit.budgets)))
    return kit.renderer.main_prompt(question.row, frames, tools), frames.times


def _episode(
    kit: TaskKit,
    question: NeedleQuestion,
    prompt: Prompt,
    times: Seconds,
    windows: Sequence[Window],
    rng: np.random.Generator,
) -> Example:
    """The oracle's episode."""
    return _example(prompt, traces.trace(question, kit.world, kit.renderer, times, windows, rng))


def _example(
    prompt: Prompt, parts: Sequence[traces.Part], shown: tuple[Shown, ...] = ()
) -> Example:
    """A stream of which everything is learned that the agent writes."""
    tokens, turns = traces.join(parts)
    return Example(prompt, tokens, (turns >= 0).astype(np.float32), shown)


def _reply(kit: TaskKit, prompt: Prompt, text: str) -> Example:
    """One assistant turn without a thought, all of it learned."""
    tokens = np.asarray(kit.renderer.encode(text + traces.TURN_END), np.int32)
    return Example(prompt, tokens, np.ones(len(tokens), np.float32))


def _imagine(kit: TaskKit, events: int, rng: np.random.Generator) -> NeedleVideo:
    """A video that is never written, with so many events: for tasks that show no frames."""
    world = dataclasses.replace(kit.world, events=(events, events))
    drawn = draw_events(world, "train", int(rng.integers(1 << 31)))
    return NeedleVideo("imagined", VideoRef("imagined", float(world.duration)), drawn)


def _choose(kit: TaskKit, count: int, rng: np.random.Generator) -> list[Window]:
    """`count` aligned windows in order of time."""
    chosen = rng.choice(len(kit.world.windows), count, replace=False)
    return [kit.world.windows[i] for i in sorted(chosen)]


def _window_of(kit: TaskKit, question: NeedleQuestion) -> Window:
    """The aligned window that holds the event asked about."""
    return next(w for w in kit.world.windows if question.target.visible(*w))
