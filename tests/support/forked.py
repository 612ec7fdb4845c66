"""Runs commands of this project in forked children of a process that has imported all of it.

A child is the real command but for the start of the interpreter and the freeing of its memory at
the end, which take seconds: `runpy` runs the door's file as `__main__`, with `sys.argv`, working
folder, environment and file descriptors of its own, threads are waited for and exit handlers run.
No backend of JAX may be there before the fork: its threads would not come along.

Reads one request per line, and answers each with two: the number of the child's process, and how
it ended (`Outcome`). All are JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "train.run",
    "train.compile.measure",
    "pipelines.describe",
    "models.convert",
    "tensorboardX",
    "transformers",
)
OF_TRANSFORMERS = ("AutoTokenizer", "Qwen3VLConfig")
"""What it imports when it is named; torch would come along, which users do not have."""
PATIENCE = 900
"""Seconds after which a command hangs."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Exit status; that of a signal is negative."""
    stdout: str
    stderr: str
    seconds: float
    """Processor time of the command and its children."""


class Running:
    """A command that has been started and not yet been waited for."""

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self.pid = int(answers.readline())

    @property
    def ended(self) -> bool:
        """Whether it has come to its end."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Outcome:
        """How it ended."""
        return Outcome(*json.loads(self._answers.readline()))


class Server:
    """The process that forks, as the tests see it. It ends with them."""

    def __init__(self, environment: Mapping[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forked"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._end)

    def _end(self) -> None:
        """Nobody asks any more."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        self._process.kill()

    def start(
        self,
        door: str,
        arguments: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        work: int = PATIENCE,
        together: bool = False,
    ) -> Running:
        """Run `python door arguments...` in a folder, with these variables and no others. One at a
        time: it must be waited for before the next.

        Args:
          work: seconds of processor time after which the command works for nothing.
          together: whether what it says on stderr is put into `stdout` as well.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        request = [door, list(arguments), str(cwd), dict(environment), work, together]
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Running(self._process.stdout)


def run_fresh(
    door: str, arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> Outcome:
    """The same as by a `Server` in a process of its own, started as a user starts it."""
    began = os.times()
    done = subprocess.run(
        [sys.executable, str(ROOT / door), *arguments],
        cwd=cwd,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    ended = os.times()
    seconds = ended.children_user + ended.children_system
    seconds -= began.children_user + began.children_system
    return Outcome(done.returncode, done.stdout, done.stderr, seconds)


def _serve() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]
    for module in IMPORTED:
        importlib.import_module(module)
    for name in OF_TRANSFORMERS:
        getattr(importlib.import_module("transformers"), name)
    importlib.import_module("train.recipes").get_recipe("needle_rl")  # imports schemes of rewards
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "an import has started a backend of JAX"
    gc.freeze()  # or every child would copy all of it, just to look for garbage
    for line in sys.stdin:
        door, arguments, cwd, environment, work, together = json.loads(line)
        outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        child = os.fork()
        if not child:
            resource.setrlimit(resource.RLIMIT_CPU, (work, work))
            written = outputs[:1] * 2 if together else outputs
            _become(ROOT / door, arguments, cwd, environment, written)
        print(child, flush=True)
        code, seconds = _wait(child)
        said = [_read(output) for output in outputs]
        print(json.dumps(Outcome(code, *said, seconds)), flush=True)


def _become(
    door: Path, arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[int]
) -> None:
    """The command itself, to the end of this process."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, output in enumerate(outputs, start=1):
        os.dup2(output, descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(door), *arguments]
    sys.path[0] = str(door.parent)
    code = 0
    try:
        runpy.run_path(str(door), run_name="__main__")
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int) -> tuple[int, float]:
    """Exit status and processor time; a child that hangs is killed with all its children."""
    end = time.monotonic() + PATIENCE
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)


def _read(output: int) -> str:
    with os.fdopen(output, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")


if __name__ == "__main__":
    _serve()
