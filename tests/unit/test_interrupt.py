"""Signals: at once where nothing is to be saved, at the next check elsewhere, twice is at once."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HEAD = f"""
import sys
sys.path[0] = {str(ROOT)!r}
import hashlib, time
from train.hosts import interrupt
interrupt.GRACE_SECONDS = 0.3
signals = interrupt.Signals()
signals.install()
signals.remedy = "continue with --workdir runs/a"
say = lambda text: print(text, flush=True)
busy = lambda: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # minutes, deaf to signals
"""
DETAILS = """
signals.details = lambda: "compiling jit_step, 7 s so far"
"""
FREE = """
try:
    say("ready")
    time.sleep(60)
except interrupt.Interrupted as error:
    sys.exit(error.code)
"""
STUCK = """
try:
    say("ready")
    busy()
except interrupt.Interrupted as error:
    say("it came before")
    sys.exit(error.code)
"""
SLOW = """
try:
    say("ready")
    time.sleep(60)
except interrupt.Interrupted as error:
    print("interrupted", file=sys.stderr, flush=True)
    signals.told = True
    busy()
"""
STEPS = """
with signals.deferred("the next pause in step 3"):
    say("ready")
    try:
        while True:
            for _ in range(10):
                time.sleep(0.02)
            say("step")
            signals.check()
    except interrupt.Interrupted as error:
        say("saved")
        sys.exit(error.code)
"""
HANGING = """
import threading
threading.Thread(target=busy).start()
say("ready")
interrupt.end_process(7, seconds=0.3)
sys.exit(7)
"""


def started(body):
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + body],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("body", [FREE, STUCK, SLOW, STEPS], ids=["free", "stuck", "slow", "steps"])
def test_one_signal_ends_with_its_code(body, number, code):
    process = started(body)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == code
    name = signal.Signals(number).name
    told = {
        FREE: "",
        SLOW: "interrupted\n",
        STUCK: f"{name}: ended at once; continue with --workdir runs/a\n",
        STEPS: f"{name}: waiting for the next pause in step 3, then the run ends; once more ends "
        "it at once\n",
    }
    assert errors == ("" if "it came before" in out else told[body])
    assert body != STEPS or out.endswith("step\nsaved\n")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("deaf", ["time.sleep(60)", "busy()"], ids=["waiting", "compiling"])
def test_a_second_signal_ends_at_once_and_says_so(deaf, second):
    process = started(DETAILS + STEPS.replace("for _ in range(10):", f"{deaf}\n            if 1:"))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(second)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + second and time.monotonic() - began < 20
    waits, ended = errors.splitlines()
    assert "waiting for the next pause in step 3 (compiling jit_step, 7 s so far)" in waits
    assert ended == (
        f"{second.name}: ended at once during the next pause in step 3 (compiling jit_step, 7 s so "
        "far); continue with --workdir runs/a"
    )


def test_a_process_ends_although_a_thread_hangs():
    with started(HANGING) as process:
        assert process.wait(timeout=30) == 7


def test_hosts_end_together():
    from train.hosts.interrupt import Interrupted, Signals

    signals = Signals()
    signals.check()
    signals.sync_by(lambda number: max(number, signal.SIGTERM))
    with pytest.raises(Interrupted) as told:
        signals.check()
    assert told.value.code == 0 and told.value.number == signal.SIGTERM
