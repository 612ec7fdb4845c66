"""Which version of the weights draws what, and what a run is told about older ones."""

import pytest

from train.checks import notes
from train.recipes import get_recipe
from train.rl.versions import Schedule, WorkTimes
from train.settings.override import override


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


@pytest.mark.parametrize(
    ("schedule", "step", "versions"),
    [
        (Schedule(1), 3, [2, 2, 2, 2, 2, 2]),
        (Schedule(1, updates=1, calls=2), 0, [0, 0, 0, 0, 0, 0]),
        (Schedule(1, updates=1, calls=2), 3, [2, 2, 3, 3, 3, 3]),
        (Schedule(3, updates=1, calls=2), 7, [4, 4, 5, 5, 5, 5]),
        (Schedule(3, updates=2, calls=1), 1, [0, 1, 1, 1, 1, 1]),
        (Schedule(3, updates=3, calls=1), 7, [4, 5, 6, 7, 7, 7]),
    ],
)
def test_which_version_draws_follows_from_step_and_call(schedule, step, versions):
    assert [schedule.version(step, call) for call in range(6)] == versions


def test_a_run_is_told_that_nothing_bounds_what_older_weights_teach():
    """But for one whose clip acts: from the sampler, or in a second update."""
    none, bypass = "objective.correction.weights=none", "objective.correction.proximal=sampler"
    twice = "rl.minibatches=2"
    cases = {
        ("rl.staleness=1",): 1,
        ("rl.staleness=1", none): 1,
        ("rl.staleness=1", twice, none): 1,
        ("rl.staleness=1", twice): 0,
        ("rl.staleness=1", bypass): 0,
        (none,): 0,
    }
    for settings, count in cases.items():
        config = override(get_recipe("needle_rl"), list(settings))
        assert sum("rl.staleness" in note for note in notes(config)) == count
