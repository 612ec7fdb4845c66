"""Processes on loopback that are the hosts of one run."""

import socket
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.support.command import command, environment

SETTINGS = (
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
)
"""Small steps."""


class Ended(NamedTuple):
    """How a host ended."""

    code: int
    output: str
    errors: str
    seconds: float
    """Until then, since it was waited for."""


class Hosts:
    """The hosts of a run, from their start on."""

    def __init__(self, *commands: Sequence[str], count: int = 2, devices: int = 1) -> None:
        """Run a command on all at once, or one on each, with so many devices each."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
        self.processes = [
            subprocess.Popen(
                commands[number % len(commands)],
                env=environment(devices, JAX_PROCESS_ID=str(number), **shared),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def end(self) -> list[Ended]:
        """How each has ended, once all have."""
        began = time.monotonic()

        def ended(process: subprocess.Popen[str]) -> Ended:
            output, errors = process.communicate(timeout=600)
            return Ended(process.returncode, output, errors, time.monotonic() - began)

        with ThreadPoolExecutor(len(self.processes)) as threads:
            return list(threads.map(ended, self.processes))


def on_hosts(
    *commands: Sequence[str], code: int = 0, count: int = 2, devices: int = 1
) -> list[Ended]:
    """`Hosts` to their end, with this exit code."""
    ends = Hosts(*commands, count=count, devices=devices).end()
    for own in ends:
        assert own.code == code, own.errors[-3000:]
    return ends


def steps_of(
    workdir: Path,
    cache: Path,
    *arguments: str,
    mesh: str = "data:2",
    steps: int = 1,
    settings: Sequence[str] = (),
) -> list[str]:
    """A command of so many small steps on a mesh."""
    run = ["--mesh", mesh, "--steps", str(steps)]
    sets = [*SETTINGS, f"data.cache_dir={cache}", *settings]
    return command(workdir, *run, *arguments, sets=sets)
