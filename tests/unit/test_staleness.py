"""Rollouts drawn ahead of the learner: under which weights, beside what, and after a resume."""

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
from tests.support.rollout_law import WindowReader
from tests.support.trajectories import rewarded
from train.checks import notes
from train.recipes import get_recipe
from train.report.steps import Clock
from train.rl.loop import RolloutBatch, Rollouts, version_of
from train.rl.staleness import RolloutsAhead, Stop, Stopped, WorkTimes
from train.settings.override import override

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


def ahead_of(source, staleness=1, parts=None, clock=None, stop=None, metrics=(), steps=STEPS):
    return RolloutsAhead(
        source,
        parts or {},
        metrics,
        steps=steps,
        staleness=staleness,
        trained=set(weights_after(0)) - {"embed"},
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


def weights_after(steps):
    params = ToyPolicy().init()
    for _ in range(steps):
        params = {**moved({k: x for k, x in params.items() if k != "embed"}), **frozen(params)}
    return params


def frozen(params):
    return {"embed": params["embed"]}


def learn(agent, staleness, first=0, saved=None):
    """The batches of each step, and what a checkpoint before each holds. As the learner does, the
    loop destroys what trains as soon as it has rollouts."""
    prompts, clock, params = Prompts(), Clock(), weights_after(0) if saved is None else saved.params
    ahead = ahead_of(source_of(agent, prompts, staleness, clock), staleness, {"prompts": prompts})
    if saved is not None:
        ahead.go_on(first, saved.older)
        ahead.resumable["prompts"].set_state(saved.position)
    batches, checkpoints = {}, {}
    for step in range(first, STEPS):
        position = ahead.resumable["prompts"].get_state()
        kept = jax.tree.map(np.asarray, (params, ahead.older(step)))
        checkpoints[step] = Saved(*jax.tree.map(jax.numpy.asarray, kept), position)
        batches[step] = ahead.draw(params, step)
        after = moved({k: x for k, x in params.items() if k != "embed"})
        for name, x in params.items():
            if name != "embed":
                x.delete()
        params = {**after, **frozen(params)}
    ahead.close()
    return batches, checkpoints


def drawn(batch: RolloutBatch):
    """Tokens and log-probabilities to the bit, and the version that is written."""
    rollouts = [t for group in batch.groups for t in group.trajectories]
    return [(t.policy_version, t.tokens.tobytes(), t.log_probs.tobytes()) for t in rollouts]


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
        rollout = rewarded(1.0)
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


def test_a_run_is_told_that_nothing_makes_up_for_older_weights():
    """But for one that measures ratios from the sampler."""
    none, bypass = "objective.correction.weights=none", "objective.correction.proximal=sampler"
    cases = [(("rl.staleness=1", none), 1), (("rl.staleness=1", bypass), 0), ((none,), 0)]
    for settings, count in cases:
        config = override(get_recipe("needle_rl"), list(settings))
        assert sum("rl.staleness" in note for note in notes(config)) == count


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
    ahead.idle()
    assert source.log == [0, 1, 2, 3]
    ahead.close()


def test_work_is_counted_where_it_lies_within(monkeypatch):
    times = iter([1.0, 4.0, 6.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    work = WorkTimes()
    with work.noted():
        pass
    with work.noted():
        monkeypatch.undo()
        assert work.within(2.0, 8.0) == 2.0 + 2.0
        assert work.within(5.0, 6.0) == 0.0
