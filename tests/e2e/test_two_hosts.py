"""Two and four processes on loopback, four CPU devices together, are one run: that of one."""

import sys

import numpy as np
import pytest

from rollout.tools import ToolError
from tests.support.command import ROOT, TIMED, metrics, run
from tests.support.hosts import on_hosts, steps_of
from tests.support.videos import write_video

pytestmark = pytest.mark.slow
OF_TEXT = (
    "reward/",
    "tool/",
    "format/",
    "length/",
    "episode/",
    "group/",
    "data/bad",
    "frames/budget",
)
"""Beginnings of the names of figures that follow from what is said."""


WITHOUT_TOOLS = ("agent.max_tool_rounds=0",)


@pytest.fixture(scope="module", params=[WITHOUT_TOOLS, pytest.param((), marks=pytest.mark.study)])
def alone(tmp_path_factory, cache, request) -> tuple[dict[str, float], tuple[str, ...]]:
    """What a step of one process said, and its settings."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    done = run(steps_of(workdir, cache, mesh="data:1", settings=request.param), cache)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = metrics(workdir)
    return line, request.param


@pytest.mark.parametrize(
    ("count", "mesh"), [(2, "data:4"), pytest.param(4, "data:2,fsdp:2", marks=pytest.mark.study)]
)
def test_processes_give_the_run_of_one(tmp_path, cache, alone, count, mesh):
    workdir, (alone, settings) = tmp_path / "run", alone
    command = steps_of(workdir, cache, mesh=mesh, settings=settings)
    first, *others = on_hosts(command, count=count, devices=4 // count)
    assert "step 1/1" in first.output and not any("step" in own.output for own in others)
    (together,) = metrics(workdir)
    for name, value in alone.items():
        if name.startswith(OF_TEXT):
            assert together[name] == value, name
        elif not name.startswith((*TIMED, "hosts/", "rollout/cache")):
            # Gaps are rounding alone, on one device and on four.
            near = 1e-4 if name.startswith("logprob/gap") else 1e-6
            np.testing.assert_allclose(together[name], value, rtol=1e-4, atol=near, err_msg=name)
    assert (alone["hosts/overviews"], alone["hosts/rewards"]) == (4, 8)
    assert (together["hosts/overviews"], together["hosts/rewards"]) == (4 / count, 8 / count)
    jobs = alone["tool/jobs"]
    assert jobs == alone["hosts/tools"] and bool(jobs) == (settings != WITHOUT_TOOLS)
    assert not jobs or jobs > together["hosts/tools"] >= jobs / count
    assert together["hosts/sent_mib"] > alone["hosts/sent_mib"] == 0
    print(f"\n{count} hosts: " + str({n: v for n, v in together.items() if n.startswith("hosts/")}))
    assert (workdir / "hf" / "model.safetensors").exists()


DISAGREE = """
import jax, sys
sys.path.insert(0, {root!r})
from rollout.tools import ToolError
from rollout.workers import Workers
from train.hosts import cluster, share

cluster.start()
late, none = TimeoutError("late"), None
mine = [[none, late, none, ToolError("no"), late], [none, none, OSError("x"), late, late]]
faults = mine[jax.process_index()]
print([repr(f) for f in cluster.sync_errors(faults)])
print(cluster.sync_errors([none, none]))
number = jax.process_index()
print(share.from_all("red" * number), cluster.max_over_hosts([1, -number]))
cluster.require_same([b"a", b"same"], "the prompts of step 3")
print(share.by_share("abc", lambda own: [x + str(jax.process_index()) for x in own]))


def job(place):  # fails on the second host
    with Workers(1, share=share.shared_job) as workers:
        done = workers.submit("crop", lambda: 1.0 / (1.0 - jax.process_index()), 5.0, (place, 2))
        return str(done.exception() or done.result())


print(job(0), "and", job(1), "after", share.WORK.take()["hosts/tools"])
print(cluster.on_all_hosts(lambda: "read"))


def different():
    own = b"b" if faults[1] is none else b"c"
    cluster.require_same([b"a", own], "the prompts of step 3")


def unreadable():
    if jax.process_index():
        raise ValueError("own.mp4 is damaged")


for fails in (different, lambda: cluster.on_all_hosts(unreadable)):
    try:
        fails()
    except ValueError as error:
        print(error)
"""


def test_hosts_agree_on_what_failed_and_notice_different_data():
    """Tools and files that one host alone has trouble with."""
    ends = on_hosts([sys.executable, "-c", DISAGREE.format(root=str(ROOT))])
    one, two = (end.output.splitlines()[-8:] for end in ends)  # gloo greets before
    assert one == two
    faults, nothing, texts, shares, jobs, read, different, unreadable = one
    timed, no = repr(TimeoutError("late")), repr(ToolError("no"))
    assert faults == str(["None", timed, repr(RuntimeError("x")), no, timed])
    assert (nothing, texts) == ("[None, None]", "['', 'red'] [1, 0]")
    assert shares == str(["a0", "b0", "c1"])
    assert jobs == "1.0 and float division by zero after 1.0", "each host runs its own job only"
    assert (read, unreadable) == ("read", "own.mp4 is damaged")
    assert different.startswith(
        "the prompts of step 3 differ between hosts (hosts [1] from host 0)"
    )


def test_hosts_with_different_questions_stop(tmp_path):
    """All of them, before anything is written: one answer differs."""
    write_video(tmp_path / "own.mp4")
    commands = []
    for answer in ("red", "blue"):
        own = tmp_path / f"{answer}.csv"
        own.write_text(f"video,question,answer,question_type\nown.mp4,What?,{answer},oe\n")
        commands.append(steps_of(tmp_path / "run", tmp_path / answer, "--data", str(own)))
    for end in on_hosts(*commands, code=1):
        assert "the questions differ between hosts (hosts [1] from host 0)" in end.errors
    assert not (tmp_path / "run").exists()
