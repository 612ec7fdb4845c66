"""What an observer hears: turns, tokens and calls in the order in which they happen."""

from __future__ import annotations

import numpy as np
import pytest

from evaluate.watch import Watcher, readable
from paravt_jax.records import Row
from rollout.agent import Agent
from rollout.engine.engine import SlotPool
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.engine.slots import StreamId
from rollout.limits import AgentConfig
from rollout.observer import Observer
from tests.support.rollout_fakes import SentinelReader, text_prompt
from tests.support.scripted_episode import (
    ANSWER,
    CROP_TOKENS,
    RENDERER,
    VIDEO,
    call,
    calls_turn,
    scripted_engine,
)
from tests.unit.test_engine import PARAMS, make_engine


class Noted(Observer):
    def __init__(self):
        self.heard = []

    def turn_begins(self, stream, prefix):
        self.heard.append(("turn", RENDERER.decode(prefix)))

    def called(self, stream, number, call):
        self.heard.append(("called", number, call.arguments.get("start_time")))

    def answered(self, stream, number, call, result):
        self.heard.append(("answered", number, result.response))


def run(observer: Observer, *turns: str) -> None:
    config = AgentConfig(turn_tokens=1000, answer_tokens=80, response_tokens=150)
    engine = scripted_engine(config, [turns])
    reader = SentinelReader()
    agent = Agent(
        engine.session, RENDERER, reader, config=config, crop_tokens=CROP_TOKENS, observer=observer
    )
    row = Row("row", VIDEO, "What colour?", "red")
    prompt = RENDERER.main_prompt(row, reader.overview(VIDEO, 4), tools=True)
    agent.run({}, [(row, 4, prompt)], copies=1, seed=0)


def test_turns_and_calls_are_heard_in_their_order():
    noted = Noted()
    run(noted, calls_turn(call(0, 8), call(8, 16)), ANSWER)
    assert noted.heard == [
        ("turn", "<think>\n"),
        ("called", 0, 0),
        ("called", 1, 8),
        ("answered", 0, "seen."),
        ("answered", 1, "seen."),
        ("turn", "<think>\n"),
    ]


def test_a_call_that_fails_is_heard_like_any_other():
    noted = Noted()
    run(noted, calls_turn(call(90, 99)), ANSWER)
    number, response = noted.heard[2][1:]
    assert number == 0 and response.startswith("Error: start_time 90 is beyond")


def test_tokens_are_told_as_they_are_generated_and_sum_up_to_the_turns():
    written: dict = {}

    def wrote(stream, tokens):
        written.setdefault(stream, []).append(tokens)

    pool = SlotPool(prompts=2, copies=1, prompt_tokens=32, suffix=64)
    session = Session(make_engine(pool, eos_ids=()), PARAMS, wrote)
    sampling = SamplingConfig(temperature=1.0)
    for text, limit in (("one", 40), ("two", 7)):
        (stream,) = session.open("main", text_prompt(text), [len(text)])
        session.generate(stream, [1, 2], sampling, limit)
    turns: dict = {}
    while session.generating:
        turns |= dict(session.step())
    assert {len(turn.tokens) for turn in turns.values()} == {40, 7}
    for stream, turn in turns.items():
        np.testing.assert_array_equal(np.concatenate(written[stream]), turn.tokens)
        assert all(len(piece) for piece in written[stream])
    assert max(map(len, written.values())) > 1, "all at once is no streaming"


def test_a_watcher_shows_what_is_new_and_stops_at_the_calls():
    said: list[tuple[str, str]] = []
    watcher = Watcher(RENDERER, lambda text, kind: said.append((text, kind)))
    text = calls_turn(call(0, 8))
    watcher.turn_begins(StreamId(1), RENDERER.encode("<think>\n"))
    tokens = RENDERER.encode(text)
    for at in range(0, len(tokens), 5):
        watcher.wrote(StreamId(1), np.array(tokens[at : at + 5]))
        watcher.wrote(StreamId(2), np.array(RENDERER.encode("a report")))
    assert "".join(piece for piece, _ in said) == "<think>\nI look.\n</think>\n"
    assert len(said) > 3 and {kind for _, kind in said} == {"text"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("I see <", "I see "),
        ("I see <tool_c", "I see "),
        ("I see <answ", "I see <answ"),
        ("3 < 4", "3 < 4"),
        ("half \ufffd", "half "),
        ("<answer>red</answer><|im_end|>", "<answer>red</answer>"),
        ("so.\n<tool_call>\n{}</tool_call>", "so."),
    ],
)
def test_what_is_not_there_for_good_is_held_back(text, shown):
    assert readable(text) == shown
