"""Prompts rolled out as they come: each like in a batch, no more at a time than there are slots."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from evaluate.runner import OneTurn
from paravt_jax.records import Row
from rollout.agent import Agent
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine
from rollout.engine.session import Session
from rollout.limits import AgentConfig, slot_pools, token_budget
from rollout.workers import Workers
from tests.support.rollout_fakes import IM_END, PAD, VOCAB, SentinelReader, ToyPolicy
from tests.support.scripted_episode import (
    ANSWER,
    CROP_TOKENS,
    END,
    RENDERER,
    VIDEO,
    call,
    calls_turn,
    scripted_engine,
)

CONFIG = AgentConfig(turn_tokens=1000, answer_tokens=80, response_tokens=150)
CALLING, SAYING = (calls_turn(call(0, 8), call(8, 16)), ANSWER), (ANSWER,)


def items(count: int):
    frames = SentinelReader().overview(VIDEO, 4)
    rows = [Row(f"row{number}", VIDEO, f"What {number}?", "red") for number in range(count)]
    return [(row, 4, RENDERER.main_prompt(row, frames, tools=True)) for row in rows]


def agent_of(engine, kind=Agent, config=CONFIG) -> Agent:
    return kind(engine.session, RENDERER, SentinelReader(), config=config, crop_tokens=CROP_TOKENS)


class Feed:
    """Gives an item each time, or every second time where one is not always ready."""

    def __init__(self, given, hesitant=False):
        self.left, self.hesitant, self.asked = list(given), hesitant, 0

    def __call__(self, wait):
        self.asked += 1
        if not self.left or (self.hesitant and not wait and self.asked % 2):
            return None
        return self.left.pop(0)


def scripted(count: int, slots: int):
    """An engine of so many slots; streams are opened in the order of the items."""
    engine = scripted_engine(CONFIG, [(CALLING, SAYING)[n % 2] for n in range(count)])
    main = dataclasses.replace(engine.pools["main"], prompts=slots)
    engine.pools = {**engine.pools, "main": main}
    return engine


def test_a_stream_rolls_out_what_a_batch_does():
    asked = items(7)
    batch = agent_of(scripted(7, 7)).run({}, asked, copies=1, seed=5)
    for hesitant in (False, True):
        engine = scripted(7, 2)
        found = list(agent_of(engine).stream({}, Feed(asked, hesitant), most=2, seed=5))
        assert sorted(row.row_id for row, _, _ in found) == [f"row{n}" for n in range(7)]
        by_id = {row.row_id: trajectory for row, trajectory, _ in found}
        for group in batch:
            (own,) = group.trajectories
            assert by_id[group.row.row_id].full_text == own.full_text
            np.testing.assert_array_equal(by_id[group.row.row_id].tokens, own.tokens)
        (session,) = engine.sessions
        assert session.most_live["main"] == 2


def test_the_short_overtakes_the_long():
    found = list(agent_of(scripted(4, 2)).stream({}, Feed(items(4)), most=2, seed=5))
    assert [row.row_id for row, _, _ in found] != [f"row{n}" for n in range(4)]
    assert all(seconds > 0 for _, _, seconds in found)


def test_a_stream_gives_its_caches_back_also_where_it_is_left_early():
    config = AgentConfig(turn_tokens=4, answer_tokens=4, max_tool_rounds=0)
    pools = slot_pools(config, RENDERER, prompts=2, copies=1, prompt_tokens=64, crop_tokens=8)
    policy = ToyPolicy()
    automata = TokenAutomata([b""] * VOCAB, (IM_END,))
    engine = Engine(policy, pools, automata=automata, pad_id=PAD)
    agent = Agent(
        functools.partial(Session, engine),
        *(RENDERER, SentinelReader()),
        config=config,
        after_run=engine.caches.release,
    )
    held = []
    for taken in (3, 1):
        stream = agent.stream(policy.init(), Feed(items(3)), most=2, seed=5)
        for _ in range(taken):
            next(stream)
            held.append(len(engine.caches.states))
        stream.close() if taken == 1 else list(stream)
        assert len(engine.caches.states) == 0
    assert held == [1] * 4


def test_an_empty_stream_ends_at_once():
    assert list(agent_of(scripted(1, 1)).stream({}, Feed([]), most=1, seed=0)) == []


def test_the_demand_follows_the_responses_of_the_last_round_alone():
    demand = "Answer now."
    rules = {"turn_tokens": 900, "answer_tokens": 80, "response_tokens": 150}
    config = AgentConfig(**rules, max_tool_rounds=2, demand=demand)
    script = [calls_turn(call(0, 8)), calls_turn(call(8, 16)), ANSWER]
    engine = scripted_engine(config, [script])
    (group,) = agent_of(engine, config=config).run({}, items(1), copies=1, seed=0)
    (own,) = group.trajectories
    said = f"</tool_response>{END}\n<|im_start|>user\n{demand}{END}\n<|im_start|>assistant\n<think>"
    assert own.full_text.count(demand) == 1
    assert own.full_text.rpartition("</tool_response>")[2].startswith(said[16:])
    plain = AgentConfig(**rules, max_tool_rounds=2)
    more = len(RENDERER.tool_turn([""], demand)) - len(RENDERER.tool_turn([""]))
    widths = [token_budget(rules, RENDERER).response for rules in (config, plain)]
    assert widths[0] - widths[1] == more > 0


def test_who_is_offered_no_tools_has_one_turn():
    config = AgentConfig(turn_tokens=900, answer_tokens=80, max_tool_rounds=0)
    script = [(calls_turn(call(0, 8)), ANSWER)]
    (group,) = agent_of(scripted_engine(config, script), OneTurn, config).run({}, items(1), 1, 0)
    (turn,) = group.trajectories[0].turns
    assert not turn.calls and "<tool_call>" in turn.text


def test_workers_forget_what_is_old():
    with Workers(1, max_jobs=2) as workers:
        done = [workers.submit(key, lambda key=key: [key], 5).result() for key in "abcbca"]
    assert [key for (key,) in done] == list("abcbca")
    assert workers.jobs == 4 and workers.submitted == 6
    assert done[1] is done[3] and done[0] is not done[5]
