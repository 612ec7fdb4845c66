"""What an ideal agent says in the needle world.

The texts are as short as the protocol allows, because two CPU cores have to learn them. The
thought of a turn names the plan and the calls follow it, so that reinforcement learning finds
the number of calls as one early decision instead of many late ones. The thought before the answer
repeats what the question names and goes on with what was found ("I find the circle red."): to look
up the last word among several reports is learned in a hundred steps, while "I saw a red circle."
was not learned in six hundred (`docs/log.md`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from paravt_jax.protocol import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    CALL_CLOSE,
    CALL_OPEN,
    GROUNDING_TOOL,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL_NAME,
    TURN_END,
    call_syntax,
)
from paravt_jax.records import Clip, QuestionType, Shown
from pipelines.arrays import Seconds, Tokens
from pipelines.needle.questions import Asked, NeedleQuestion
from pipelines.needle.world import Event, NeedleWorld
from pipelines.render import ChatRenderer, PromptTexts

PREFIX = f"{THINK_OPEN}\n"
"""Forced at the head of every turn of the main agent; not learned."""

NEEDLE_TEXTS = PromptTexts(system="", tools="", subagent="Report {start:g} to {end:g} seconds.")
"""The words around frames and questions: next to none."""
GROUNDING_TEXTS = dataclasses.replace(NEEDLE_TEXTS, tools="Tool: <grounding>", describe_tools=True)
"""Those of an agent that calls by `<grounding>`, which chat templates do not know."""

Part = tuple[list[int], int]
"""Tokens, and the number of the turn that they belong to; -1 for those that the agent does not
write (forced prefixes, tool responses)."""

FRAME_REQUEST = "Name it."
"""Request of the single-frame task."""


@dataclasses.dataclass(frozen=True)
class AnswerTurn:
    """The last turn of an episode: a thought, then the answer."""

    thought: str
    text: str


def caption(event: Event | None) -> str:
    """What one frame shows."""
    return f"A {event.name}." if event else "Nothing."


def report(events: Sequence[Event], start: float, end: float) -> str:
    """What a sub-agent says about the window [start, end): one sentence per visible event."""
    spans = [(event, event.visible(start, end)) for event in events]
    sentences = [f"A {e.name} appears from {v[0]} to {v[1]} seconds." for e, v in spans if v]
    return " ".join(sentences) or "Nothing happens."


def call(start: float, end: float) -> str:
    """One crop call as the model writes it."""
    arguments = {"start_time": start, "end_time": end}
    body = json.dumps({"name": TOOL_NAME, "arguments": arguments})
    return f"{CALL_OPEN}\n{body}\n{CALL_CLOSE}"


def look(tool: str, syntax: str, start: float, end: float) -> str:
    """One call of any tool that looks at a window, as the model writes it."""
    form = call_syntax(syntax)
    body: dict[str, Any] = {"start_time": start, "end_time": end}
    if tool == GROUNDING_TOOL:
        body = {"temporal_segment": [start, end], "sampling_strategy": "medium"}
    if not form.tool:
        body = {"name": tool, "arguments": body}
    return f"{form.open}{json.dumps(body)}{form.close}"


def look_turn(call: str) -> str:
    """The turn that looks once, after its forced prefix."""
    return f"I look closer.\n{THINK_CLOSE}\n{call}{TURN_END}"


def call_turn(windows: Sequence[tuple[int, int]]) -> str:
    """The turn that crops, after its forced prefix: the plan, then the calls."""
    parts = "1 part" if len(windows) == 1 else f"{len(windows)} parts"
    calls = "\n".join(call(start, end) for start, end in windows)
    return f"I look at {parts}.\n{THINK_CLOSE}\n{calls}{TURN_END}"


def answer_turn(answer: AnswerTurn) -> str:
    """The turn that answers, after its forced prefix."""
    return f"{answer.thought}\n{THINK_CLOSE}\n{ANSWER_OPEN}{answer.text}{ANSWER_CLOSE}{TURN_END}"


def decide(
    question: NeedleQuestion,
    world: NeedleWorld,
    times: Seconds,
    windows: Sequence[tuple[int, int]],
    rng: np.random.Generator,
) -> AnswerTurn:
    """Answer from what the overview (frames at `times` seconds) and the cropped windows show.

    Without evidence the answer is a uniform guess from the right vocabulary.
    """
    target = question.target
    cropped = [span for start, end in windows if (span := target.visible(start, end))]
    glimpses = [time for time in times if target.start <= time < target.end]
    if cropped:
        span = (cropped[0][0], cropped[-1][1])
    elif glimpses:
        span = _around(glimpses, world)
    else:
        thought = " ".join(statement(question.asked, target, None)) if windows else "I guess."
        return AnswerTurn(thought, _guess(question, world, rng))
    thought = " ".join(statement(question.asked, target, span)) if windows else "I can see it."
    return AnswerTurn(thought, _spoken(question, span))


def statement(target: Asked, event: Event, span: tuple[int, int] | None) -> tuple[str, str]:
    """What a question names of a thing, and what was found: `I find the circle`, `red.`

    `span` is when it was seen, None if it was not.
    """
    names = {"colour": event.shape, "shape": event.colour, "time": event.name}
    subject = f"I find the {names[target]}"
    if span is None:
        return subject, "nowhere."
    answers = {"colour": event.colour, "shape": event.shape, "time": f"from {_seconds(*span)}"}
    return subject, f"{answers[target]}."


def trace(
    question: NeedleQuestion,
    world: NeedleWorld,
    renderer: ChatRenderer,
    times: Seconds,
    windows: Sequence[tuple[int, int]],
    rng: np.random.Generator,
) -> list[Part]:
    """An ideal episode that crops `windows` in its first turn (none: it answers at once):
    everything after the prompt, tool responses included."""
    if not windows:
        answer = answer_turn(decide(question, world, times, windows, rng))
        return [(renderer.encode(PREFIX), -1), (renderer.encode(answer), 0)]
    calls = [(renderer.encode(PREFIX), -1), (renderer.encode(call_turn(windows)), 0)]
    return [*calls, *conclusion(question, world, renderer, times, windows, rng)]


def conclusion(
    question: NeedleQuestion,
    world: NeedleWorld,
    renderer: ChatRenderer,
    times: Seconds,
    windows: Sequence[tuple[int, int]],
    rng: np.random.Generator,
) -> list[Part]:
    """The last turn of an episode, after the reports on the cropped windows."""
    reports = renderer.tool_turn([report(question.events, start, end) for start, end in windows])
    answer = answer_turn(decide(question, world, times, windows, rng))
    return [(reports, -1), (renderer.encode(PREFIX), -1), (renderer.encode(answer), 1)]


def looks(
    renderer: ChatRenderer, calls: Sequence[str], clips: Sequence[Clip], answer: AnswerTurn
) -> tuple[list[Part], tuple[Shown, ...]]:
    """An ideal episode that makes these calls, one a turn, is shown these clips, and answers; and
    the frames of each look."""
    prefix = renderer.encode(PREFIX)
    parts: list[Part] = [(prefix, -1)]
    shown = []
    for number, (call, clip) in enumerate(zip(calls, clips, strict=True)):
        parts.append((renderer.encode(look_turn(call)), number))
        block = renderer.frames_turn([clip])
        shown.append(Shown(sum(len(ids) for ids, _ in parts), block))
        parts += [(block.tokens.tolist(), -1), (prefix, -1)]
    parts.append((renderer.encode(answer_turn(answer)), len(calls)))
    return parts, tuple(shown)


def join(parts: Sequence[Part]) -> tuple[Tokens, Tokens]:
    """Tokens one after the other, and the turn of each."""
    tokens = np.concatenate([np.asarray(ids, np.int32) for ids, _ in parts])
    turns = np.repeat([turn for _, turn in parts], [len(ids) for ids, _ in parts])
    return tokens, turns.astype(np.int32)


def _spoken(question: NeedleQuestion, span: tuple[int, int]) -> str:
    """The answer as the agent words it; `span` is what it knows of the times."""
    if question.row.question_type == QuestionType.GROUNDING:
        return _seconds(*span)
    return question.row.answer


def _guess(question: NeedleQuestion, world: NeedleWorld, rng: np.random.Generator) -> str:
    if question.vocabulary:
        return str(rng.choice(question.vocabulary))
    length = int(rng.integers(world.visible[0], world.visible[1] + 1))
    start = int(rng.integers(world.duration - length + 1))
    return _seconds(start, start + length)


def _around(glimpses: Sequence[float], world: NeedleWorld) -> tuple[int, int]:
    """Glimpses tell roughly when: a span of mean length centred on them."""
    length = sum(world.visible) // 2
    start = int(np.mean(glimpses)) - length // 2
    start = int(np.clip(start, 0, world.duration - length))
    return start, start + length


def _seconds(start: int, end: int) -> str:
    return f"{start} to {end} seconds"
