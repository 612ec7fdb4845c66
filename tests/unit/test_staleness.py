"""Rollouts drawn ahead of the learner: under which weights, beside what, and after a resume."""

import dataclasses
import threading
from typing import NamedTuple

import jax
import numpy as np
import pytest

from paravt_jax.mesh import make_mesh, parse_mesh
from paravt_jax.records import RolloutGroup, Row, VideoRef
from pipelines.loader import PromptItem, PromptStream
from rollout.agent import Agent
from rollout.engine.automaton import TokenAutomata
from rollout.engine.engine import Engine
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.limits import AgentConfig, slot_pools
from tests.support.rollout_fakes import PAD, VOCAB, ToyPolicy, ToyRenderer, text_prompt
from tests.support.rollout_law import Learnable, Shape, WindowReader, World, calls_of
from tests.support.trajectories import rewarded
from train.batch import stream_of
from train.report.steps import Clock
from train.rl.loop import RolloutBatch, Rollouts, version_of
from train.rl.staleness import RolloutsAhead, Stop, Stopped
from train.rl.versions import Schedule, Versions

MESH = make_mesh(parse_mesh("data:1", 1), jax.devices()[:1])
STEPS = 5
SECONDS = 30.0
"""More than anything here takes."""
RULES = AgentConfig(
    max_tool_rounds=0, turn_tokens=8, answer_tokens=8, sampling=SamplingConfig(temperature=0.8)
)


class Prompts(PromptStream):
    """A question for each step, endlessly; the position can be saved."""

    def __init__(self):
        self.taken = 0

    def __next__(self):
        self.taken += 1
        row = Row(f"row-{self.taken}", VideoRef("/v.mp4", 64.0), "What?", "x")
        return [PromptItem(row, 0, text_prompt(f"what is {self.taken}?"))]

    def get_state(self):
        return self.taken

    def set_state(self, state):
        self.taken = state


@pytest.fixture(scope="module")
def agent():
    """The toy policy behind the real agent and engine."""
    renderer = ToyRenderer()
    sizes = {"prompts": 1, "copies": 2, "prompt_tokens": 32, "crop_tokens": 32}
    engine = Engine(
        ToyPolicy(),
        slot_pools(RULES, renderer, **sizes),
        automata=TokenAutomata([bytes([n % 128]) for n in range(VOCAB)], renderer.eos_ids),
        pad_id=PAD,
    )
    return Agent(lambda params: Session(engine, params), renderer, WindowReader(), config=RULES)


def source_of(agent, prompts, staleness=0, clock=None):
    def sample(params, prompts, copies, seed, step):
        return agent.run(params, prompts, copies, seed, version_of(step, staleness))

    return Rollouts(prompts, sample, group_size=2, seed=3, clock=clock or Clock())


def ahead_of(source, staleness=1, parts=None, clock=None, stop=None, metrics=(), versions=None):
    return RolloutsAhead(
        source,
        parts or {},
        metrics,
        steps=STEPS,
        versions=versions or Versions(Schedule(staleness)),
        trained=TRAINED,
        mesh=MESH,
        clock=clock or Clock(),
        stop=stop or Stop(),
    )


class Saved(NamedTuple):
    """What a checkpoint holds between two steps."""

    params: dict
    older: dict
    position: dict


@jax.jit
def moved(trained):
    return jax.tree.map(lambda x: 1.1 * x + 0.01, trained)


TRAINED = {"q", "k", "v", "see", "head"}


def learned(params, trained=TRAINED):
    """What a step makes of them."""
    return {**params, **moved({name: params[name] for name in trained})}


def weights_after(steps, trained=TRAINED):
    params = ToyPolicy().init()
    for _ in range(steps):
        params = learned(params, trained)
    return params


def learn(agent, staleness, first=0, saved=None, versions=None, trained=TRAINED):
    """The batches of each step, and what a checkpoint before each holds. As the learner does, the
    loop destroys what trains as soon as it has rollouts."""
    prompts, clock, params = Prompts(), Clock(), weights_after(0) if saved is None else saved.params
    source, parts = source_of(agent, prompts, staleness, clock), {"prompts": prompts}
    ahead = ahead_of(source, staleness, parts, versions=versions)
    if saved is not None:
        ahead.go_on(first, saved.older)
        ahead.resumable["prompts"].set_state(saved.position)
    batches, checkpoints = {}, {}
    for step in range(first, STEPS):
        position = ahead.resumable["prompts"].get_state()
        kept = jax.tree.map(np.asarray, (params, ahead.older(step)))
        checkpoints[step] = Saved(*jax.tree.map(jax.numpy.asarray, kept), position)
        batches[step] = ahead.draw(params, step)
        before, params = params, learned(params, trained)
        for name in trained:
            before[name].delete()
    ahead.close()
    return batches, checkpoints


def everyone(batch: RolloutBatch):
    """Rollouts and their sub-agents."""
    rollouts = [t for group in batch.groups for t in group.trajectories]
    return [*rollouts, *(own for t in rollouts for own in t.subagents)]


def drawn(batch: RolloutBatch):
    """Tokens and log-probabilities to the bit, and the versions that are written."""
    return [
        (t.policy_version, t.tokens.tobytes(), t.log_probs.tobytes(), t.drawn_by.tobytes())
        for t in everyone(batch)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_rollouts_are_those_of_the_version_that_is_written(agent, staleness):
    """Tokens and log-probabilities to the bit: drawn again, one step at a time, under the weights
    of that version."""
    batches, _ = learn(agent, staleness)
    prompts = Prompts()
    plain = source_of(agent, prompts, staleness)
    for step, batch in batches.items():
        prompts.set_state(step)
        version = max(0, step - staleness)
        again = drawn(plain.draw(weights_after(version), step))
        assert [own[0] for own in again] == [version] * 2
        assert drawn(batch) == again
        newer = drawn(plain.draw(weights_after(version + 1), step + 1))
        assert [own[2] for own in newer] != [own[2] for own in again], "weights make a difference"


@pytest.mark.slow
@pytest.mark.parametrize(("staleness", "first"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_a_resumed_run_draws_what_the_uninterrupted_one_does(agent, staleness, first):
    whole, checkpoints = learn(agent, staleness)
    assert len(checkpoints[first].older) == min(first, staleness)
    resumed, _ = learn(agent, staleness, first, checkpoints[first])
    for step in range(first, STEPS):
        assert drawn(resumed[step]) == drawn(whole[step])


class Source:
    """Batches without tokens. What `draws` says of a step happens while it is drawn."""

    def __init__(self, draws=lambda step: None, version=lambda step: max(0, step - 1)):
        self.draws, self.version, self.log = draws, version, []

    def draw(self, params, step, number=0):
        self.log.append(step)
        self.draws(step)
        rollout = rewarded(1.0, length=1)
        object.__setattr__(rollout, "policy_version", self.version(step))
        row = Row("a", VideoRef("v.mp4", 8.0), "What?", "red")
        return RolloutBatch(own := [RolloutGroup(row, 4, (rollout,))], own)


def test_rollouts_and_learner_run_at_the_same_time():
    """Neither ends before the other has begun: one after the other they would wait for ever."""
    drawing, learning = ([threading.Event() for _ in range(STEPS + 1)] for _ in range(2))

    def meet(step):
        drawing[step].set()
        assert step == 0 or learning[step - 1].wait(SECONDS)

    ahead = ahead_of(Source(meet))
    for step in range(STEPS):
        ahead.draw({}, step)
        told = ahead.metrics()
        learning[step].set()
        assert step == STEPS - 1 or drawing[step + 1].wait(SECONDS)
    ahead.close()
    assert told["time/overlap"] > 0


def test_metrics_and_positions_are_those_of_the_batch_not_of_the_thread():
    ended = [threading.Event() for _ in range(STEPS)]
    source, prompts = Source(), Prompts()
    inner = source.draw

    def draw(params, step):
        next(prompts)
        return inner(params, step)

    def told():
        ended[prompts.taken - 1].set()
        return {"data/epoch": float(prompts.taken)}

    source.draw = draw
    ahead = ahead_of(source, parts={"prompts": prompts}, metrics=[told])
    part = ahead.resumable["prompts"]
    for step in range(STEPS):
        assert part.get_state() == step
        ahead.draw({}, step)
        assert step == STEPS - 1 or ended[step + 1].wait(SECONDS), "the thread is one further"
        assert ahead.metrics()["data/epoch"] == part.get_state() == step + 1
        assert ahead.metrics()["rollout/staleness"] == (step > 0)
    ahead.close()


@pytest.mark.parametrize("staleness", [1, 3, 9])
def test_nothing_is_drawn_beyond_the_last_step(staleness):
    source = Source(version=lambda step: step)
    ahead = ahead_of(source, staleness)
    for step in range(STEPS):
        ahead.draw({"head": jax.numpy.ones(2)}, step)
        assert len(ahead.older(step + 1)) == min(step + 1, staleness)
    ahead.close()
    assert source.log == [*range(STEPS)]


def test_older_rollouts_than_allowed_are_refused():
    ahead = ahead_of(Source(version=lambda step: 0))
    ahead.draw({}, 0)
    ahead.draw({}, 1)
    with pytest.raises(ValueError, match=r"2 steps old, more than rl\.staleness=1"):
        ahead.draw({}, 2)
    ahead.close()


def test_what_fails_in_the_thread_fails_in_the_loop():
    def fail(step):
        if step == 1:
            raise ValueError("the video is gone")

    ahead = ahead_of(Source(fail))
    ahead.draw({}, 0)
    with pytest.raises(ValueError, match="the video is gone"):
        ahead.draw({}, 1)
    ahead.close()


def test_the_end_of_a_run_ends_what_is_under_way():
    stop, begun, ended = Stop(), threading.Event(), []

    def endless(step):
        if step == 1:
            begun.set()
            try:
                while True:
                    stop.check()
                    threading.Event().wait(0.001)
            except Stopped:
                ended.append(step)
                raise

    ahead = ahead_of(source := Source(endless), staleness=3, stop=stop)
    ahead.draw({}, 0)
    assert begun.wait(SECONDS)
    ahead.close()
    assert ended == [1] and source.log == [0, 1], "and what waits is not begun"


def test_an_evaluation_waits_until_nothing_is_drawn():
    ahead = ahead_of(source := Source(lambda step: threading.Event().wait(0.01)), staleness=3)
    ahead.draw({}, 0)
    ahead.idle(1, {})
    assert source.log == [0, 1, 2, 3]
    ahead.close()


IN_FLIGHT = Schedule(2, updates=2, calls=2)
"""Episodes take 14 calls and more of the engine below: turns of 20 tokens, 4 a call."""


@pytest.fixture(scope="module")
def calling():
    """Agents with tools and sub-agents on one engine, each with versions of its own."""
    policy = Learnable()
    world = World(policy, policy.init(), values=3, evidence="text", copies=2)
    engine = world.engine(Shape(prompts=1, crops=2, steps_per_call=4))

    def agent(versions):
        return Agent(
            lambda params: Session(engine, params, newest=versions),
            world.renderer,
            WindowReader(),
            config=world.config,
        )

    return world, agent


def learn_in_flight(calling, first=0, saved=None, trained=TRAINED):
    versions = Versions(IN_FLIGHT)
    agent = calling[1](versions)
    return learn(agent, IN_FLIGHT.staleness, first, saved, versions, trained)


def learner_rows(world, batch):
    """Rollouts and sub-agents, each as the learner gets it, and at which temperature it spoke."""
    rules = world.config
    for t in everyone(batch):
        spoke = rules.sampling if t.turns[0].prefix.size else rules.subagent_sampling
        (row,) = world.batches([stream_of(t)], 1, 1)
        yield t, row, spoke.temperature


@pytest.mark.slow
def test_log_probs_are_those_of_the_version_of_each_token(calling, turns_that_call):
    """Of main agents and sub-agents. Only the head trains here: keys, values and hidden states,
    which stay as older weights made them, are then those of any version."""
    world, ages, gaps = calling[0], set(), []
    batches, _ = learn_in_flight(calling, trained={"head"})
    params = [weights_after(version, {"head"}) for version in range(STEPS)]
    for step, batch in batches.items():
        for rollout, row, temperature in learner_rows(world, batch):
            told, drawn_by = rollout.log_probs[rollout.generated], rollout.drawn_by
            for version in set(drawn_by.tolist()):
                values = np.asarray(world.log_probs(params[version], row, temperature))
                gap = np.abs(values[np.asarray(row.loss_weights) > 0] - told)
                assert gap[drawn_by == version].max() < 1e-4
                gaps.append(gap[drawn_by != version].max(initial=0))
                ages.add(step - version)
    assert ages == {0, 1, 2} and max(gaps) > 0.1, "versions make a difference"
    assert len(everyone(batches[2])) > 2, "sub-agents were asked"


@pytest.fixture(scope="module")
def whole(calling):
    """The uninterrupted run, and what its checkpoints hold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rollout.agent.parse_tool_calls", calls_of)
        return learn_in_flight(calling)


@pytest.mark.slow
def test_what_is_under_way_goes_on_with_the_next_versions(calling, whole, turns_that_call):
    """At the calls that the schedule says and up to its bound; what was drawn before the first
    update is what would have been drawn without."""
    prompts = Prompts()
    plain = source_of(calling[1](None), prompts, IN_FLIGHT.staleness)
    for step, batch in whole[0].items():
        oldest, own = max(0, step - 2), everyone(batch)
        versions = np.concatenate([t.drawn_by for t in own])
        assert {*versions.tolist()} == {*range(oldest, step + 1)}
        assert all((np.diff(t.drawn_by) >= 0).all() for t in own)
        # Two calls of four tokens at most each, then the next version.
        counts = [np.sum(t.drawn_by == at) for t in own for at in range(oldest, step)]
        assert max(counts, default=8) == 8
        prompts.set_state(step)
        without = plain.draw(weights_after(oldest), step).groups[0].trajectories
        for t, other in zip(batch.groups[0].trajectories, without, strict=True):
            assert t.policy_version == t.drawn_by[0] == other.policy_version == oldest
            count = np.flatnonzero(t.versions == oldest)[-1] + 1
            assert t.tokens[:count].tobytes() == other.tokens[:count].tobytes()
            assert t.log_probs[:count].tobytes() == other.log_probs[:count].tobytes()
            assert step == 0 or t.log_probs.tobytes() != other.log_probs.tobytes()


def in_flight_source(schedule):
    """A source without tokens that takes three versions a step, and notes which."""
    versions, taken = Versions(schedule), []
    source = Source(lambda step: taken.append([versions().version for _ in range(3)]))
    return ahead_of(source, versions=versions), taken


def test_an_evaluation_waits_neither_for_itself_nor_for_later_weights():
    """The rollouts of a step may wait for the very weights that are evaluated before it."""
    ahead, taken = in_flight_source(Schedule(2, updates=2))
    for step in range(STEPS):
        ahead.idle(step, {"head": jax.numpy.ones(2)})
        ahead.draw({"head": jax.numpy.ones(2)}, step)
        assert sorted(ahead.older(step + 1)) == [*map(str, range(1, min(step + 1, 2) + 1))]
    ahead.close()
    assert taken == [[0, 0, 0], [0, 1, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert ahead.metrics()["time/weights_wait"] >= 0


def test_the_end_of_a_run_ends_what_waits_for_weights():
    stop = Stop()
    versions = Versions(Schedule(1, updates=1), stop.check_here)
    ahead = ahead_of(
        Source(lambda step: [versions() for _ in range(2)]), versions=versions, stop=stop
    )
    ahead.draw({}, 0)
    while not versions.awaited:
        threading.Event().wait(0.001)
    ahead.close()
    assert not versions.awaited


def test_ages_are_those_of_tokens():
    """Also of sub-agents' tokens; and none may be older than allowed."""
    source, rollout = Source(), rewarded(1.0, length=2)
    inner = source.draw

    def draw(params, step):
        (group,) = inner(params, step).groups
        versions = np.array([step - 1, step, -1, -1], np.int32)
        oldest = np.array([max(0, step - 2), step, -1, -1], np.int32)
        subagent = dataclasses.replace(rollout, versions=oldest)
        mixed = dataclasses.replace(rollout, versions=versions, subagents=(subagent,))
        own = [dataclasses.replace(group, trajectories=(mixed,))]
        return RolloutBatch(own, own)

    source.draw = draw
    ahead = ahead_of(source)
    ahead.draw({}, 0)
    ahead.draw({}, 1)
    assert ahead.metrics()["rollout/staleness"] == (1 + 0 + 1 + 0) / 4
    assert ahead.metrics()["rollout/staleness_max"] == 1
    with pytest.raises(ValueError, match=r"2 steps old, more than rl\.staleness=1"):
        ahead.draw({}, 2)
    ahead.close()


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_resumed_run_goes_on_with_the_same_versions(calling, whole, first, turns_that_call):
    batches, checkpoints = whole
    resumed, _ = learn_in_flight(calling, first, checkpoints[first])
    for step in range(first, STEPS):
        assert drawn(resumed[step]) == drawn(batches[step])
