"""Messages between two hosts over TCP, read straight into memory that is kept for them.

`multiprocessing.connection` opens the connection, as it checks the key; it reads long messages in
small pieces that it copies twice, which takes a processor four times as long (docs/log.md).
"""

from __future__ import annotations

import os
import socket
from multiprocessing.connection import Connection

LENGTH = 8
"""Bytes that say how long a message is."""


class Channel:
    """One end of a connection; `multiprocessing.connection.wait` takes it."""

    def __init__(self, connection: Connection) -> None:
        """Takes over a connection on which both ends have read what was sent before."""
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        connection.close()
        self._socket.settimeout(None)
        # Small messages are sent at once; many of them are waited for.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Returns once the system has taken all of it.

        Raises:
          OSError: the other end is gone.
        """
        self._socket.sendall(len(message).to_bytes(LENGTH, "big"))
        self._socket.sendall(message)

    def receive(self, room: bytearray) -> memoryview:
        """The next message, once all of it is here: a part of `room`, which grows as it must.

        Raises:
          EOFError: the other end has closed the connection.
          OSError: it is broken.
        """
        count = int.from_bytes(self._fill(memoryview(bytearray(LENGTH))), "big")
        # Memory that is new for each message costs more than what is read into it.
        room.extend(bytes(max(0, count - len(room))))
        return self._fill(memoryview(room)[:count])

    def close(self) -> None:
        """The other end reads to the end of what was sent."""
        self._socket.close()

    def _fill(self, room: memoryview) -> memoryview:
        at = 0
        while at < len(room):
            taken = self._socket.recv_into(room[at:])
            if not taken:
                raise EOFError
            at += taken
        return room
