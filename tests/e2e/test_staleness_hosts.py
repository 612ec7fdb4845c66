"""Rollouts drawn ahead on two hosts, on devices of their own: the run of one host, also when it is
ended in the midst and resumed."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.command import TIMED, logged, metrics, run, saved
from tests.support.hosts import Hosts, on_hosts, steps_of

pytestmark = pytest.mark.study
STEPS = 4
APART = ("--rollout-devices", "2")
AHEAD = ("rl.staleness=1", "output.export_hf=false")
IN_FLIGHT = ("rl.in_flight_updates=1", "rl.in_flight_calls=2")


def ahead(workdir: Path, cache: Path, in_flight: bool, *settings: str) -> list[str]:
    """The command of a run."""
    sets = [*AHEAD, *IN_FLIGHT * in_flight, *settings]
    return steps_of(workdir, cache, *APART, steps=STEPS, settings=sets)


def agrees(one: Path, other: Path) -> None:
    for ours, theirs in zip(metrics(one), metrics(other), strict=True):
        for name in ours:
            if not name.startswith((*TIMED, "hosts/", "rollout/cache")):
                near = 1e-4 if name.startswith("logprob/gap") else 1e-6
                np.testing.assert_allclose(ours[name], theirs[name], 1e-4, near, err_msg=name)


@pytest.mark.parametrize("in_flight", [False, True], ids=["", "in flight"])
def test_hosts_draw_ahead_as_one_does_and_resume(tmp_path, cache, in_flight):
    alone, whole, cut = (tmp_path / name for name in ("alone", "whole", "cut"))
    done = run(ahead(alone, cache, in_flight), cache, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    on_hosts(ahead(whole, cache, in_flight), devices=2)
    agrees(alone, whole)
    records = metrics(whole)
    assert [record["rollout/staleness_max"] for record in records] == [0, 1, 1, 1]
    assert all(record["time/hand_over"] > 0 for record in records)
    assert any(record["time/overlap"] > 0 for record in records)

    hosts = Hosts(ahead(cut, cache, in_flight, "output.checkpoint_every=1"), devices=2)
    while logged(cut) < 2:
        assert all(process.poll() is None for process in hosts.processes)
        time.sleep(0.05)
    hosts.processes[1].send_signal(signal.SIGTERM)
    ends = hosts.end()
    print("\nSIGTERM to host 1: " + ", ".join(f"{end.seconds:.1f} s" for end in ends))
    assert [end.code for end in ends] == [0, 0], ends[0].errors[-3000:] + ends[1].errors[-3000:]
    assert 2 <= logged(cut) < STEPS
    on_hosts(ahead(cut, cache, in_flight), devices=2)
    agrees(whole, cut)
    assert saved(whole, STEPS) == saved(cut, STEPS), "the same weights, to the bit"
