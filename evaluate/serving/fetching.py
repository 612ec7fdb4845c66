"""Media behind http(s) addresses, fetched for strangers: from public addresses, or from hosts that
the operator has named, and never more or longer than the limits say.

Who asks a server to fetch can point it at what only the server can reach: metadata services of
clouds, administration pages of the own network. So each connection, also those of redirects, goes
to an address that has been looked at, not to a name that may mean another one a moment later.
Proxies of the environment are not used: they would look names up themselves.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, quote, urljoin, urlsplit

SECONDS = 30.0
"""Longest that one medium may take, redirects included."""
REDIRECTS = 4
MOVED = (301, 302, 303, 307, 308)
AGENT = "paravt_jax"
WRITTEN = "%/:=&?~+!$,;'@()*[]"
"""Of an address, what is sent as it is written."""
TLS = ssl.create_default_context()


class NotFetched(Exception):
    """Why, in words for whoever asked."""


def fetch(url: str, most: int, hosts: frozenset[str], seconds: float = SECONDS) -> bytes:
    """What an address holds.

    Args:
      most: bytes.
      hosts: the only ones that are asked, wherever they are; empty: any at a public address.
      seconds: in all.

    Raises:
      NotFetched: it cannot be had, is too large, takes too long, or is not for strangers.
    """
    end = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        target = _parsed(url, hosts)
        with _answer(target, end, not hosts) as answer:
            if answer.status in MOVED and (location := answer.headers.get("Location")):
                url = urljoin(url, location)
                continue
            if answer.status != 200:
                raise NotFetched(f"the other server answers {answer.status}")
            content = _read(answer, most)
            # Where no length is told, what the end of the time has cut off looks whole.
            if time.monotonic() >= end:
                raise NotFetched("it takes too long")
            return content
    raise NotFetched(f"more than {REDIRECTS} redirects")


def _parsed(url: str, hosts: frozenset[str]) -> SplitResult:
    try:
        target = urlsplit(url)
        named, _ = target.hostname, target.port
    except ValueError:
        raise NotFetched("no address") from None
    if target.scheme not in ("http", "https") or not named:
        raise NotFetched("no http(s) address")
    if target.username is not None:
        raise NotFetched("addresses with a user name are not fetched")
    if hosts and named not in hosts:
        raise NotFetched("this server fetches from named hosts alone (--fetch-hosts)")
    return target


@contextlib.contextmanager
def _answer(target: SplitResult, end: float, public: bool) -> Iterator[http.client.HTTPResponse]:
    """The head of an answer, and its body until the time is over."""
    host, secure = target.hostname or "", target.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    path = quote(target._replace(scheme="", netloc="", fragment="").geturl() or "/", safe=WRITTEN)
    with contextlib.ExitStack() as stack:
        try:
            connection = kind(host, target.port)
            plain = _connected(host, connection.port, end, public)
            stack.callback(plain.close)
            # Each read may wait for a byte; all of them together may not wait beyond the end.
            watched = stack.enter_context(plain.dup())
            timer = threading.Timer(max(end - time.monotonic(), 0), _hang_up, [watched])
            timer.daemon = True
            timer.start()
            stack.callback(timer.cancel)
            connection.sock = TLS.wrap_socket(plain, server_hostname=host) if secure else plain
            stack.callback(connection.close)
            connection.request("GET", path, headers={"User-Agent": AGENT})
            yield connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            late = time.monotonic() >= end
            raise NotFetched("it takes too long" if late else "cannot be fetched") from error


def _connected(host: str, port: int, end: float, public: bool) -> socket.socket:
    """A connection to the first address of a host that answers, each looked at before."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if public and not all(_is_public(str(own[4][0])) for own in found):
        raise NotFetched(
            "its address is not a public one; the operator may name such hosts (--fetch-hosts)"
        )
    failure: OSError = OSError("no address")
    for family, kind, protocol, _, address in found:
        own = socket.socket(family, kind, protocol)
        own.settimeout(max(end - time.monotonic(), 0.01))
        try:
            own.connect(address)
            return own
        except OSError as error:
            own.close()
            failure = error
    raise failure


def _is_public(address: str) -> bool:
    """Whether everybody can reach it. Of IPv6 addresses that hold one of IPv4, that one decides."""
    own = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(own, ipaddress.IPv6Address):
        inner = own.ipv4_mapped or own.sixtofour or (own.teredo and own.teredo[1])
        if inner:
            return _is_public(str(inner))
        if own in NAT64:
            return _is_public(str(ipaddress.IPv4Address(int(own) & 0xFFFFFFFF)))
        if own.is_site_local:
            return False
    return own.is_global and not own.is_multicast


NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _read(answer: http.client.HTTPResponse, most: int) -> bytes:
    if (answer.length or 0) > most:
        raise NotFetched(f"is larger than {most} bytes")
    content = answer.read(most + 1)
    if len(content) > most:
        raise NotFetched(f"is larger than {most} bytes")
    if answer.length:
        raise http.client.IncompleteRead(content, answer.length)
    return content
