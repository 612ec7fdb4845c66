"""Two processes on loopback, two CPU devices each, are one run: the figures of one process."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from rollout.tools import ToolError
from tests.support.command import ROOT, TIMED, command, environment, run
from tests.support.videos import write_video

pytestmark = pytest.mark.slow
SETTINGS = [
    "data.train_videos=8",
    "data.held_out_videos=2",
    "data.frame_budgets=4",
    "rl.prompts_per_step=4",
    "rl.group_size=2",
    "agent.turn_tokens=80",
    "agent.max_tool_rounds=1",
    "agent.subagent_batch=8",
    "evaluation.rows=0",
    "output.report=false",
]
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_step(workdir, cache, *arguments):
    mesh = ["--mesh", "data:2,fsdp:2", "--steps", "1"]
    return command(workdir, *mesh, *arguments, sets=[*SETTINGS, f"data.cache_dir={cache}"])


def on_two_hosts(*commands, code: int = 0, devices: int = 2) -> list[tuple[str, str]]:
    """Run a command on both at once, or one on each, to an end with this exit code; what each
    printed, and its errors. Each host has so many devices."""
    address = f"127.0.0.1:{free_port()}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    hosts = [
        subprocess.Popen(
            commands[i % len(commands)],
            env=environment(devices, JAX_PROCESS_ID=str(i), **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [host.communicate(timeout=600) for host in hosts]
    for host, (_, errors) in zip(hosts, ends, strict=True):
        assert host.returncode == code, errors[-3000:]
    return ends


def test_two_processes_give_the_run_of_one(tmp_path):
    alone, together, cache = tmp_path / "alone", tmp_path / "together", tmp_path / "cache"
    done = run(one_step(alone, cache), tmp_path, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, _), (second, _) = on_two_hosts(one_step(together, cache))
    assert "step 1/1" in first and "step" not in second
    one, two = (json.loads((folder / "metrics.jsonl").read_text()) for folder in (alone, together))
    for name in one:
        if name.startswith(OF_TEXT):
            assert two[name] == one[name], name
        elif not name.startswith((*TIMED, "hosts/", "rollout/cache")):
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert (one["hosts/overviews"], one["hosts/rewards"]) == (4, 8)
    assert (two["hosts/overviews"], two["hosts/rewards"]) == (2, 4), "half of them each"
    assert one["tool/jobs"] == one["hosts/tools"] > two["hosts/tools"] >= one["tool/jobs"] / 2
    assert two["hosts/sent_mib"] > one["hosts/sent_mib"] == 0
    assert (together / "hf" / "model.safetensors").exists()


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
print(cluster.texts_from_all("red" * jax.process_index()))
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
    ends = on_two_hosts([sys.executable, "-c", DISAGREE.format(root=str(ROOT))])
    one, two = (output.splitlines()[-8:] for output, _ in ends)  # gloo greets before
    assert one == two
    faults, nothing, texts, shares, jobs, read, different, unreadable = one
    timed, no = repr(TimeoutError("late")), repr(ToolError("no"))
    assert faults == str(["None", timed, repr(RuntimeError("x")), no, timed])
    assert (nothing, texts) == ("[None, None]", "['', 'red']")
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
        commands.append(one_step(tmp_path / "run", tmp_path / answer, "--data", str(own)))
    for _, errors in on_two_hosts(*commands, code=1):
        assert "the questions differ between hosts (hosts [1] from host 0)" in errors
    assert not (tmp_path / "run").exists()
