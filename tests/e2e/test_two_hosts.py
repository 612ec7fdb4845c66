"""Two processes on loopback, four CPU devices each, are one run: the figures of one process."""

import json
import socket
import subprocess

import numpy as np
import pytest

from tests.command import command, environment, run

pytestmark = pytest.mark.slow
SETTINGS = [
    "data.train_videos=8",
    "data.held_out_videos=2",
    "data.frame_budgets=4",
    "rl.prompts_per_step=4",
    "rl.group_size=2",
    "agent.turn_tokens=40",
    "agent.subagent_batch=8",
    "evaluation.rows=0",
    "model.folder=none",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def one_step(workdir, cache):
    mesh = ["--mesh", "data:2,fsdp:2,tensor:2", "--steps", "1"]
    return command(workdir, *mesh, sets=[*SETTINGS, f"data.cache_dir={cache}"])


def test_two_processes_give_the_run_of_one(tmp_path):
    alone, together, cache = tmp_path / "alone", tmp_path / "together", tmp_path / "cache"
    done = run(one_step(alone, cache), tmp_path, devices=8)
    assert done.returncode == 0, done.stderr[-3000:]
    address = f"127.0.0.1:{free_port()}"
    hosts = [
        subprocess.Popen(
            one_step(together, cache),
            env=environment(
                4, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i)
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [host.communicate(timeout=600) for host in hosts]
    for host, (_, errors) in zip(hosts, outputs, strict=True):
        assert host.returncode == 0, errors[-3000:]
    assert "step 1/1" in outputs[0][0] and "step" not in outputs[1][0]
    one, two = (json.loads((folder / "metrics.jsonl").read_text()) for folder in (alone, together))
    for name in ("loss", "grad_norm", "reward/total", "tool/calls_per_rollout"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)
    assert (together / "hf" / "model.safetensors").exists()
