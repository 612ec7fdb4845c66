"""Notices of a machine's end, from a metadata server that stands in for Google's."""

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from train.hosts import notice

PROGRAM = """
import signal, time
from train.hosts import notice
notice.SECONDS = 0.05
signal.signal(signal.SIGTERM, lambda *_: exit(7))
notice.watch_for_notices()
print("waits", flush=True)
time.sleep(30)
"""


@pytest.fixture
def metadata():
    """Values by key, as the server tells them to who says that it knows whom it asks."""
    values = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/")
            known = key in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 403)
            self.end_headers()
            self.wfile.write(values.get(key, "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield values, f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("preempted", "TRUE", "is being preempted"),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "will be stopped"),
    ],
)
def test_a_notice_is_a_sigterm(metadata, key, value, words):
    values, address = metadata
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={"GCE_METADATA_HOST": address, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "waits\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    values[key] = value
    assert process.communicate(timeout=20)[1] == f"notice: this machine {words}\n"
    assert process.returncode == 7


def test_a_server_that_does_not_answer_is_no_notice(monkeypatch):
    monkeypatch.setenv(notice.HOST, "127.0.0.1:9")
    assert notice._value("preempted") == ""


def test_other_machines_ask_nobody(monkeypatch, tmp_path):
    monkeypatch.delenv(notice.HOST, raising=False)
    monkeypatch.setattr(notice, "MACHINE", tmp_path / "product_name")
    before = threading.active_count()
    notice.watch_for_notices()
    assert threading.active_count() == before
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    asked = threading.Event()
    monkeypatch.setattr(notice, "_watch", lambda act: asked.set())
    notice.watch_for_notices()
    assert asked.wait(5)
