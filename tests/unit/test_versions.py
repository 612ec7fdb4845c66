"""Which version of the weights draws what, and what a run is told about older ones."""

import jax.numpy as jnp
import pytest

from train.checks import notes
from train.hosts.exchange import EXCHANGE
from train.recipes import get_recipe
from train.rl.staleness import Stop, Stopped
from train.rl.versions import Schedule, Versions, WorkTimes
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


def test_each_version_is_prepared_once_by_whoever_keeps_it():
    """Older ones of a checkpoint too; the thread that draws gets them as they were made."""
    made = []

    def prepare(params):
        made.append({name: float(x) for name, x in params.items()})
        return {"prepared": jnp.float32(len(made))}

    versions = Versions(Schedule(2, updates=2, calls=1), prepare=prepare)
    versions.go_on(3, {"1": {"w": jnp.float32(0.2)}, "2": {"w": jnp.float32(0.1)}})
    weights = {"w": jnp.float32(0.3), "frozen": jnp.float32(9.0)}
    versions.keep(3, weights, {"w"})
    versions.keep(3, weights, {"w"})
    assert [round(own["w"], 1) for own in made] == [0.2, 0.1, 0.3]
    assert all(own["frozen"] == 9.0 for own in made)
    versions.begin(3, versions[1])
    assert [versions().params["prepared"] for _ in range(3)] == [2.0, 1.0, 3.0]
    versions.forget(before=2)
    assert sorted(versions.older(4)) == ["1", "2"]
    with pytest.raises(KeyError):
        versions[1]


def test_on_several_hosts_rollouts_end_only_where_no_device_waits(monkeypatch):
    stop = Stop()
    stop.ask()
    with pytest.raises(Stopped):
        stop.check()
    monkeypatch.setattr(EXCHANGE, "count", 2)
    stop.check()
    with pytest.raises(Stopped):
        stop.check_here()
