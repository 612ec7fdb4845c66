"""What is fetched for strangers: nothing private, nothing too large, nothing that never ends."""

from __future__ import annotations

import http.server
import itertools
import socket
import threading
import time
from typing import ClassVar

import pytest

from evaluate.serving.fetching import NotFetched, _is_public, fetch

BODY = bytes(range(256)) * 40
HERE = frozenset({"127.0.0.1"})


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers that are right, large, endless, slow, or elsewhere."""

    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        own = getattr(self, f"_{self.path.split('?')[0].strip('/').replace('-', '_')}", None)
        own() if own else self._told(200, BODY)

    def _told(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def _gone(self):
        self._told(404)

    def _round(self):
        self._told(302, Location="/round")

    def _moved(self):
        self._told(301, Location="/image.png?size=1 2")

    def _inward(self):
        self._told(302, Location=f"http://localhost:{self.server.server_address[1]}/secret")

    def _file(self):
        self._told(302, Location="file:///etc/passwd")

    def _endless(self):
        self.send_response(200)
        self.end_headers()
        for _ in itertools.repeat(None, 1000):
            self.wfile.write(BODY)

    def _drip(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(1500):
            self.wfile.write(b"x")
            time.sleep(0.02)

    def _slow_head(self):
        for byte in b"HTTP/1.0 200 OK\r\n" + b"X-More: " + b"1" * 1500:
            self.wfile.write(bytes([byte]))
            time.sleep(0.02)

    def _cut(self):
        self._told(200, b"half", **{"Content-Length": 4000})

    def log_message(self, *_):
        pass


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Clients hang up: that is what is tested."""


@pytest.fixture(scope="module")
def address():
    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_what_a_named_host_holds(address):
    assert fetch(f"{address}/a/b.png", 10**6, HERE) == BODY
    Handler.asked.clear()
    assert fetch(f"{address}/moved", 10**6, HERE) == BODY
    assert Handler.asked == ["/moved", "/image.png?size=1%202"]
    assert fetch(f"{address}/é", len(BODY), HERE) == BODY


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("gone", "answers 404"),
        ("round", "more than 4 redirects"),
        ("inward", "from named hosts alone"),
        ("file", "no http"),
        ("endless", "larger than 100000 bytes"),
        ("drip", "too long"),
        ("slow-head", "too long"),
        ("cut", "cannot be fetched"),
    ],
)
def test_what_is_refused(address, path, why):
    began = time.monotonic()
    with pytest.raises(NotFetched, match=why):
        fetch(f"{address}/{path}", 100_000, HERE, seconds=0.5)
    assert time.monotonic() - began < 15
    assert "/secret" not in Handler.asked


def test_a_length_that_is_too_large_is_not_read(address):
    with pytest.raises(NotFetched, match="larger than 100 bytes"):
        fetch(f"{address}/x", 100, HERE)


def test_nobody_points_the_server_at_its_own_network(address):
    port = address.rpartition(":")[2]
    Handler.asked.clear()
    names = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0.0.0.0", "[::1]"]
    for name in [*names, "[::ffff:127.0.0.1]"]:
        with pytest.raises(NotFetched, match=r"not a public|cannot be fetched"):
            fetch(f"http://{name}:{port}/secret", 10**6, frozenset(), seconds=2)
    assert Handler.asked == []


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(address, monkeypatch):
    """A name that means a public address first and one of here a moment later."""
    port, asked = int(address.rpartition(":")[2]), []

    def found(host, port, **_):
        asked.append(host)
        own = "203.0.113.7" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (own, port))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    monkeypatch.setattr("evaluate.serving.fetching._is_public", lambda own: own == "203.0.113.7")
    Handler.asked.clear()
    with pytest.raises(NotFetched):
        fetch(f"http://rebound.example:{port}/secret", 10**6, frozenset(), seconds=0.3)
    assert asked == ["rebound.example"] and Handler.asked == []


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "http://", "http://[", "http://me:key@x/", "http://x:99999/", "https:///a"]
)
def test_no_address(url):
    with pytest.raises(NotFetched):
        fetch(url, 10, frozenset())


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("64:ff9b::808:808", True),
        ("10.0.0.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("224.0.0.1", False), ("fd00::1", False), ("fe80::1%eth0", False), ("fec0::1", False),
        ("::ffff:10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:a00:1::1", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address, public):
    assert _is_public(address) == public
