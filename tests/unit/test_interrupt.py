"""Signals: at once where nothing is to be saved, at the next check elsewhere, twice is at once."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAD = f"""
import sys
sys.path[0] = {str(ROOT)!r}
import hashlib, time
from train.hosts import interrupt
interrupt.GRACE_SECONDS = 0.3
signals = interrupt.Signals()
signals.install()
say = lambda text: print(text, flush=True)
busy = lambda: hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)  # minutes, deaf to signals
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
except interrupt.Interrupted as error:  # it came before
    sys.exit(error.code)
"""
STEPS = """
with signals.deferred():
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
@pytest.mark.parametrize("body", [FREE, STUCK, STEPS], ids=["free", "stuck", "steps"])
def test_one_signal_ends_with_its_code(body, number, code):
    process = started(body)
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == code
    name = signal.Signals(number).name
    assert errors == (f"{name}: ending; once more ends at once\n" if body == STEPS else "")
    assert body != STEPS or out.endswith("step\nsaved\n")


def test_a_second_signal_ends_at_once():
    process = started(STEPS.replace("signals.check()", "time.sleep(60)"))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


def test_a_process_ends_although_a_thread_hangs():
    process = started(HANGING)
    assert process.wait(timeout=30) == 7


def test_hosts_end_together():
    from train.hosts.interrupt import Interrupted, Signals

    signals = Signals()
    signals.check()
    signals.sync_by(lambda number: max(number, signal.SIGTERM))
    with pytest.raises(Interrupted) as told:
        signals.check()
    assert told.value.code == 0 and told.value.number == signal.SIGTERM
