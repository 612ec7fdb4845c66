"""The engine's thread: requests come and go, one that fails goes alone, and no row is lost."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest

from evaluate.serving.errors import ApiError
from evaluate.serving.worker import Worker
from paravt_jax.blocks import text_block
from paravt_jax.records import StopReason
from rollout.engine.sampler import SamplingConfig
from rollout.engine.session import Session
from rollout.engine.slots import Generated, StreamId, Written
from rollout.tasks import Generate, Parallel, Shared

STEPS = 3
"""Steps of a turn."""


class FakeSession(Session):
    """Writes token 7 in every stream at every step; fails when it is told to."""

    def __init__(self, wrote) -> None:
        self.wrote, self.left, self.opened, self.streams = wrote, {}, 0, set()
        self.fails = False

    open_streams = property(lambda self: len(self.streams))
    generating = property(lambda self: len(self.left))

    def open(self, pool, prompt, seeds):
        made = [StreamId(self.opened + number) for number, _ in enumerate(seeds)]
        self.opened += len(made)
        self.streams.update(made)
        return made

    def generate(self, stream, given, sampling, max_tokens, listed=False, grammar=None):
        self.left[stream] = STEPS

    def written(self, stream):
        count = STEPS - self.left.get(stream, 0)
        return Written(np.full(count, 7, np.int32), np.zeros(count, np.float32), None)

    def close(self, stream):
        self.streams.remove(stream)
        self.left.pop(stream, None)

    def step(self):
        time.sleep(0.001)
        if self.fails:
            raise RuntimeError("the device is gone")
        ended = []
        for stream in list(self.left):
            self.left[stream] -= 1
            self.wrote(stream, np.full(1, 7, np.int32))
            if not self.left[stream]:
                del self.left[stream]
                tokens = np.full(STEPS, 7, np.int32)
                log_probs = np.zeros(STEPS, np.float32)
                ended.append((stream, Generated(tokens, log_probs, StopReason.END)))
        return ended


class Asked:
    """A request of some programs, and what came of it."""

    def __init__(self, programs, stops: int = 99) -> None:
        self._programs, self._stops = programs, stops
        self.heard, self.came, self.ended = 0, None, threading.Event()

    def programs(self, lease):
        return [program(lease) for program in self._programs]

    def grew(self, stream, tokens, lease) -> bool:
        self.heard += len(tokens)
        return self.heard >= self._stops

    def done(self, results) -> None:
        self.came = results
        self.ended.set()

    def failed(self, error) -> None:
        self.came = error
        self.ended.set()

    def result(self):
        assert self.ended.wait(10)
        return self.came


def turn(lease, close: bool = True):
    """One turn of a stream of its own."""
    (stream,) = lease.open("main", text_block([1]), [0])
    generated = yield Generate(stream, [1], SamplingConfig(), 8)
    if close:
        lease.close(stream)
    return len(generated.tokens)


def careless(lease):
    """Never closes what it opens."""
    return (yield from turn(lease, close=False))


def failing(lease):
    yield from turn(lease, close=False)
    raise RuntimeError("a tool with a fault")


def side_by_side(lease):
    return (yield Parallel([turn(lease), turn(lease)]))


@pytest.fixture
def worker():
    sessions = []

    def open_session(wrote):
        sessions.append(FakeSession(wrote))
        return sessions[0]

    worker = Worker(open_session)
    worker.sessions = sessions
    worker.start()
    yield worker
    worker.close()


def submitted(worker, *requests):
    for request in requests:
        worker.submit(request)
    return requests


def empty(worker) -> bool:
    for _ in range(1000):
        if not worker.requests and not worker.busy and not worker.streams:
            return True
        time.sleep(0.005)
    return False


def test_requests_share_steps_and_end_with_their_results(worker):
    one, two, three = submitted(
        worker, Asked([turn, turn]), Asked([careless]), Asked([side_by_side])
    )
    assert one.result() == [3, 3] and two.result() == [3] and three.result() == [[3, 3]]
    assert (one.heard, two.heard, three.heard) == (6, 3, 6)
    assert empty(worker) and Asked([]).ended.is_set() is False
    assert submitted(worker, Asked([]))[0].result() == []


def test_programs_of_a_request_share_one(worker):
    """Both get what one turn gave, and so does who asks when it has ended."""

    def sharing(lease):
        shared = Shared(turn(lease))

        def asking():
            return (yield shared)

        return [*(yield Parallel([asking(), asking()])), (yield shared)]

    (request,) = submitted(worker, Asked([sharing]))
    assert request.result() == [[STEPS] * 3] and request.heard == STEPS


def test_a_turn_ends_where_its_request_says(worker):
    (one,) = submitted(worker, Asked([turn], stops=2))
    assert one.result() == [2] and empty(worker)


def test_a_request_that_fails_fails_alone(worker):
    good, bad, wrong = submitted(worker, Asked([turn]), Asked([failing, turn]), Asked([None]))
    assert good.result() == [3]
    for own in (bad, wrong):
        assert isinstance(own.result(), ApiError) and own.result().status == 500
        assert "fault" not in own.result().message
    assert empty(worker) and worker.error is None


def test_nobody_waits_for_the_host_work_of_another(worker):
    job = Future()

    def working(lease):
        return (yield job)

    slow, quick = submitted(worker, Asked([working]), Asked([turn]))
    assert quick.result() == [3] and not slow.ended.is_set()
    job.set_result("found")
    assert slow.result() == ["found"]
    failed = Future()
    failed.set_exception(ValueError("no such window"))

    def caring(lease):
        try:
            yield failed
        except ValueError as error:
            return str(error)

    assert submitted(worker, Asked([caring]))[0].result() == ["no such window"]


def test_what_is_given_up_at_any_time_leaves_nothing(worker):
    dice, kinds = random.Random(0), [turn, careless, failing, side_by_side]
    for _ in range(100):
        own = Asked(dice.choices(kinds, k=dice.randrange(1, 4)))
        submitted(worker, own)
        time.sleep(dice.uniform(0, 0.004))
        worker.cancel(own)
        worker.cancel(own)
    assert empty(worker) and submitted(worker, Asked([turn]))[0].result() == [3]


def test_an_engine_that_fails_tells_everybody(worker):
    assert submitted(worker, Asked([turn]))[0].result() == [3]
    worker.sessions[0].fails = True
    for own in submitted(worker, Asked([turn])):
        assert own.result().status == 503 and "gone" not in own.result().message
    with pytest.raises(ApiError, match="the engine has failed"):
        submitted(worker, Asked([turn]))
