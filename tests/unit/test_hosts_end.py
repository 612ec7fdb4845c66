"""What ends one host ends all of them, with one line that names it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from train.hosts import watch
from train.hosts.cluster import _first_of
from train.hosts.watch import ALIVE, FAILED, GONE, HostLost, Watch

ROOT = Path(__file__).resolve().parents[2]


class Store:
    """JAX's key-value store, as far as hosts use it."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        assert allow_overwrite or key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def blocking_key_value_get(self, key, milliseconds):
        if key in self.values:
            return self.values[key]
        time.sleep(milliseconds / 1000)
        raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")

    def wait_at_barrier(self, name, milliseconds):
        pass


@pytest.fixture
def exits(monkeypatch):
    """Exit codes of processes that would have ended."""
    codes = []
    monkeypatch.setattr(Watch, "_exit", lambda self, code: codes.append(code))
    for name, seconds in (("BEAT", 0.02), ("CAUSE", 0.3), ("LINGER", 0.0), ("SILENT", 0.2)):
        monkeypatch.setattr(watch, f"{name}_SECONDS", seconds)
    return codes


def host(number, store, watches=True) -> tuple[Watch, threading.Thread]:
    own = Watch()
    own.number, own.count, own._client = number, 2, store
    own._thread = thread = threading.Thread(target=own._watch, daemon=True)
    if watches:
        thread.start()
    return own, thread


def test_a_failure_ends_the_other_host_with_its_line_and_code(exits, capfd):
    store = Store()
    _, thread = host(0, store)
    host(1, store, watches=False)[0].report(ValueError("the disk is full"), 2)
    thread.join(5)
    assert exits == [2]
    assert capfd.readouterr().err == "error on host 1: the disk is full\n" * 2


def test_one_line_where_both_fail(exits, capfd):
    """A host that is telling why it ends is not told by another."""
    store = Store()
    both = [host(number, store, watches=False)[0] for number in range(2)]
    for own in both:
        own.report(ValueError("no such file"), 1)
    assert json.loads(store.values[FAILED])[0] == "error on host 0: no such file"
    both[1]._end("of the other", 1)
    assert exits == [] and "of the other" not in capfd.readouterr().err


def test_a_host_without_a_sign_of_life(exits, capfd):
    store = Store()
    store.values[f"{ALIVE}1"] = "7"
    _, thread = host(0, store)
    thread.join(5)
    assert exits == [1] and "error: host 1 is gone (no sign" in capfd.readouterr().err
    assert "host 1 is gone" in store.values[FAILED]


@pytest.mark.parametrize(("beat", "dead"), [("7", True), (GONE, False)])
def test_a_connection_that_ends(beat, dead, exits, capfd):
    """Of a host that was killed; of one that has left."""
    store = Store()
    store.values[f"{ALIVE}1"] = beat
    host(0, store, watches=False)[0].lost(1)
    assert exits == [1] * dead and ("error: host 1 is gone: " in capfd.readouterr().err) == dead


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError("--steps 0: ask for more"), False),
    ],
)
def test_a_broken_operation_is_blamed_on_the_host_that_is_gone(error, lost, exits, capfd):
    store = Store()
    store.values[f"{ALIVE}1"] = "7"
    own, _ = host(0, store, watches=False)
    found = own._cause(error)
    assert isinstance(found, HostLost) == lost
    assert own._prefix(found) == ("error" if lost else "error on host 0")


def test_a_host_at_its_end_is_not_gone(exits):
    store = Store()
    store.values[f"{ALIVE}1"] = GONE
    own, _ = host(0, store)
    time.sleep(0.5)
    own.finish()
    assert exits == [] and store.values[f"{ALIVE}0"] == GONE
    own.leave(0)
    assert exits == []


def test_a_process_alone_says_nothing_of_hosts(exits, capfd):
    own = Watch()
    own.report(ValueError("no such file"), 1)
    own.finish()
    own.leave(1)
    assert exits == [] and capfd.readouterr().err == "error: no such file\n"


def test_a_process_alone_may_fail_again(monkeypatch, capfd):
    """As `main` called twice from a notebook: nobody else tells, so nothing is waited for."""
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    own = Watch()
    for _ in range(2):
        own.report(ValueError("steps=-1"), 2)
    assert capfd.readouterr().err.count("error: steps=-1") == 2


def test_an_error_that_some_hosts_were_spared_names_one():
    told = [None, ("ValueError", "own.mp4 is damaged")]
    assert getattr(_first_of(told), "host", None) == 1
    assert getattr(_first_of(told[1:]), "host", None) is None


ONE = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from train.hosts.joining import join
from train.hosts.watch import WATCH
code = 0
try:
    join()
    print("joined", flush=True)
    if sys.argv[1:] == ["raise"]:
        raise OSError("the disk is gone")
    if sys.argv[1:] == ["end"]:
        WATCH.finish()
    else:
        time.sleep(60)
except Exception as error:
    code = 1
    WATCH.report(error, code)
WATCH.leave(code)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(port, number, count, *arguments, seconds=30):
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
        "PARAVT_JOIN_SECONDS": str(seconds),
    }
    return subprocess.Popen(
        [sys.executable, "-c", ONE, *arguments],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def ends():
    """Exit codes and errors of processes that were started side by side."""
    ports = [free_port() for _ in range(4)]
    started = {
        "absent": [start(ports[0], 1, 2, seconds=2)],
        # Two have the number 1, and nobody has 2.
        "numbers": [start(ports[1], number, 3, seconds=4) for number in (0, 1, 1)],
        "raise": [start(ports[2], n, 2, word) for n, word in enumerate(("raise", "wait"))],
        "end": [start(ports[3], number, 2, "end") for number in range(2)],
    }
    return {
        name: [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
        for name, processes in started.items()
    }


@pytest.mark.slow
def test_a_coordinator_that_is_absent(ends):
    ((errors, code),) = ends["absent"]
    assert code == 1 and len(errors.splitlines()) == 1
    assert "host 1 of 2: the others did not join within 2 s" in errors
    assert "nothing listens at 127.0.0.1" in errors


@pytest.mark.slow
def test_a_wrong_number(ends):
    """A line each, beside JAX's words where host 0 is at its end much earlier than others."""
    for errors, code in ends["numbers"]:
        told = [line for line in errors.splitlines() if line.startswith("error")]
        assert code == 1 and len(told) == 1
        assert "others did not join" in told[0]


@pytest.mark.slow
def test_a_host_that_fails(ends):
    """The other waits, and ends with its line."""
    assert ends["raise"] == [("error on host 0: the disk is gone\n", 1)] * 2


@pytest.mark.slow
def test_hosts_that_end_well(ends):
    assert ends["end"] == [("", 0)] * 2


@pytest.mark.slow
def test_a_host_that_is_killed_with_the_store():
    """Of host 0 nobody else can tell: JAX ends the others, and the last line says why."""
    port = free_port()
    both = [start(port, number, 2) for number in range(2)]
    for process in both:
        assert process.stdout is not None and "joining" in process.stdout.readline()
        assert process.stdout.readline() == "joined\n"
    both[0].send_signal(signal.SIGKILL)
    _, errors = both[1].communicate(timeout=60)
    assert both[1].returncode == 1 and "host 0 is gone" in errors
    both[0].communicate()
