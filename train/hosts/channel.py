"""Messages between two hosts over TCP, read straight into memory of their length.

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

    def receive(self) -> bytearray:
        """The next message, once all of it is here.

        Raises:
          EOFError: the other end has closed the connection.
          OSError: it is broken.
        """
        return self._read(int.from_bytes(self._read(LENGTH), "big"))

    def close(self) -> None:
        """The other end reads to the end of what was sent."""
        self._socket.close()

    def _read(self, count: int) -> bytearray:
        read = bytearray(count)
        view, at = memoryview(read), 0
        while at < count:
            taken = self._socket.recv_into(view[at:])
            if not taken:
                raise EOFError
            at += taken
        return read
