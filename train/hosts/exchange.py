"""Values that hosts tell one another by name, over connections of their own (ADR 39).

One host does a piece of work and tells what came of it; the others expect it. Values arrive while
devices compute, in any order, and go to all hosts, but for pixels, which go to those that ask
(`train.hosts.loans`). The JAX key-value store says where hosts listen, and holds the key without
which nobody is listened to.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import json
import pickle
import queue
import secrets
import selectors
import socket
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np

from paravt_jax.deadlines import OutOfTime, within_seconds
from train.hosts.channel import Channel
from train.hosts.loans import Loan, Loans
from train.hosts.watch import WATCH

KEY, AT = "paravt/exchange/key", "paravt/exchange/at/"
CONNECT_SECONDS = 50.0
"""How long hosts that have joined wait until each of them has reached all others."""
Name = tuple[Hashable, ...]
"""Of a value, the same on all hosts, and of no other one."""
Failure = tuple[str, str]
"""Kind and words of an error."""


class MessageKind(enum.Enum):
    """Of a message, and what comes with it."""

    TOLD = enum.auto()
    """A name, and its value as `Loans.dumps` has it."""
    FAILED = enum.auto()
    """A name, and a `Failure`."""
    ASKED = enum.auto()
    """A name to answer under, and the number of an array that is kept."""
    GIVEN = enum.auto()
    """The name of an array, and the array."""
    RETURNED = enum.auto()
    """No name; the number of an array for which this host will not ask."""


Message = tuple[MessageKind, Name, Any]


class Exchange:
    """One host among several; without `begin` this process is alone."""

    def __init__(self, lost: Callable[[int], object] = WATCH.lost) -> None:
        """`lost` is called, by a thread of its own, with the number of a host that has gone."""
        self.number, self.count, self._lost = 0, 1, lost
        self._sent = 0
        self._kinds: dict[str, type[Exception]] = {}
        self._names: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._values: dict[Name, Future[Any]] = {}
        """What is expected and what has arrived; the second of the two takes it out of here."""
        self._peers: dict[int, Channel] = {}
        self._outgoing: queue.SimpleQueue[tuple[bytes, int | None]] = queue.SimpleQueue()
        """Messages, each for one host or for all others."""
        self.loans = Loans(self._borrow, self._return)

    def begin(self, number: int, count: int, client: Any, coordinator: str) -> None:
        """Be host `number` of `count`, and reach all others. `client` is that of JAX's key-value
        store, which lives at `coordinator`, HOST:PORT.

        Raises:
          ValueError: not all could be reached in time.
        """
        self.number, self.count = number, count
        self.loans.begin(number, count)
        try:
            within_seconds(lambda: self._connect(client, coordinator), CONNECT_SECONDS)
        except OutOfTime as error:
            others = set(range(self.count)) - {self.number} - set(self._peers)
            raise ValueError(
                f"host {self.number} of {self.count}: no connection with host "
                f"{', '.join(map(str, sorted(others)))} within {CONNECT_SECONDS:g} s; hosts must "
                "reach one another on all TCP ports, as far as firewalls between them go"
            ) from error
        for work in (self._send, self._receive):
            threading.Thread(target=work, daemon=True).start()

    def knows(self, kinds: dict[str, type[Exception]]) -> None:
        """Errors whose kind makes a difference to who expects a value; others arrive as
        RuntimeError."""
        self._kinds = kinds

    def next_name(self) -> Name:
        """A name for what all hosts ask for in the same order, from threads of the same name."""
        thread = threading.current_thread().name
        self._names[thread] += 1
        return thread, self._names[thread]

    def tell(self, name: Name, value: Any) -> None:
        """Send a value to all other hosts, its pixels to those that look at them; returns before
        it is sent."""
        self._put(MessageKind.TOLD, name, self.loans.dumps(value))

    def tell_error(self, name: Name, error: BaseException) -> None:
        """Send the reason why there is no value."""
        self._put(MessageKind.FAILED, name, self._described(error))

    def tell_outcome(self, name: Name, done: Future[Any]) -> None:
        """Send what came of work that is done."""
        error = CancelledError() if done.cancelled() else done.exception()
        if error is None:
            self.tell(name, done.result())
        else:
            self.tell_error(name, error)

    def expect(self, name: Name) -> Future[Any]:
        """What another host tells, or has told; its errors say by which `host`."""
        return self._meet(name)

    def _meet(self, name: Name) -> Future[Any]:
        """The future of a name: whoever comes first leaves it here for the other."""
        with self._lock:
            future = self._values.pop(name, None)
            if future is None:
                future = self._values[name] = Future()
        return future

    def forget(self, first: Hashable) -> None:
        """Drop values whose names begin so: nobody will ask for them any more."""
        with self._lock:
            for name in [name for name in self._values if name[0] == first]:
                self._values.pop(name).cancel()

    def take_sent(self) -> int:
        """Bytes that other hosts, all of them together, were sent since this was last asked."""
        sent, self._sent = self._sent, 0
        return sent

    def _put(self, kind: MessageKind, name: Name, value: Any, to: int | None = None) -> None:
        self._outgoing.put((pickle.dumps((kind, name, value), protocol=5), to))

    def _borrow(self, loan: Loan) -> np.ndarray:
        host, number = loan
        name: Name = ("pixels", host, number)
        given = self._meet(name)
        self._put(MessageKind.ASKED, name, number, host)
        return given.result()

    def _return(self, loan: Loan) -> None:
        host, number = loan
        self._put(MessageKind.RETURNED, (), number, host)

    def _described(self, error: BaseException) -> Failure:
        kinds = (name for name, kind in self._kinds.items() if isinstance(error, kind))
        return next(kinds, ""), str(error) or type(error).__name__

    def _connect(self, client: Any, coordinator: str) -> None:
        """Connect with the hosts of lower numbers, and wait for those of higher ones."""
        patience = int(1000 * CONNECT_SECONDS)
        if self.number == 0:
            client.key_value_set(KEY, secrets.token_hex(32))
        key = client.blocking_key_value_get(KEY, patience).encode()
        with Listener(("", 0), backlog=self.count, authkey=key) as listener:
            address = _reachable_at(coordinator, self.number), listener.address[1]
            client.key_value_set(f"{AT}{self.number}", json.dumps(address))
            for host in range(self.number):
                at = json.loads(client.blocking_key_value_get(f"{AT}{host}", patience))
                peer = _client(tuple(at), key)
                peer.send_bytes(str(self.number).encode())
                self._peers[host] = Channel(peer)
            while len(self._peers) < self.count - 1:
                # Whoever lacks the key is no host.
                with contextlib.suppress(AuthenticationError, EOFError, OSError):
                    peer = listener.accept()
                    number = int(peer.recv_bytes(8))
                    self._peers[number] = Channel(peer)

    def _send(self) -> None:
        while True:
            message, to = self._outgoing.get()
            for peer in self._peers.values() if to is None else [self._peers[to]]:
                self._sent += len(message)
                # That it is gone is noticed where it is listened to.
                with contextlib.suppress(OSError):
                    peer.send(message)

    def _receive(self) -> None:
        room = bytearray()
        with selectors.DefaultSelector() as heard:
            for number, peer in self._peers.items():
                heard.register(peer, selectors.EVENT_READ, number)
            while heard.get_map():
                for key, _ in heard.select():
                    number = key.data
                    try:
                        self._arrived(number, _loaded(self._peers[number], room))
                    except (EOFError, OSError):
                        heard.unregister(key.fileobj)
                        threading.Thread(target=self._lost, args=(number,), daemon=True).start()

    def _arrived(self, host: int, message: Message) -> None:
        kind, name, value = message
        match kind:
            case MessageKind.TOLD:
                self._meet(name).set_result(self.loans.loads(value))
            case MessageKind.FAILED:
                self._meet(name).set_exception(self._error(host, *value))
            case MessageKind.ASKED:
                self._put(MessageKind.GIVEN, name, self.loans.hand_out(value), host)
            case MessageKind.GIVEN:
                self._meet(name).set_result(value)
            case MessageKind.RETURNED:
                self.loans.hand_out(value)

    def _error(self, host: int, kind: str, words: str) -> Exception:
        error = self._kinds.get(kind, RuntimeError)(words)
        error.host = host  # pyright: ignore[reportAttributeAccessIssue]
        return error


def _reachable_at(coordinator: str, number: int) -> str:
    """Where others reach this host: host 0 where they found the key-value store, the others at the
    address from which they reach that."""
    host = coordinator.rpartition(":")[0].strip("[]")
    if number == 0:
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing
        return probe.getsockname()[0]


def _client(address: Any, key: bytes) -> Connection:
    """A connection with a host that listens already."""
    peer = Client(address, authkey=key)
    assert isinstance(peer, Connection)
    return peer


def _loaded(peer: Channel, room: bytearray) -> Any:
    """The next message of a host; `room` may grow again once nothing looks at it any more."""
    with peer.receive(room) as message:
        return pickle.loads(message)


EXCHANGE = Exchange()
"""A process is one host; so there is one of these."""
