"""A way to a node on which one request is late: its client sees the connection cut and asks again,
and the node gets the first one when the test says so.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

TXN_OFFSET_COMMIT, END_TXN = 28, 26
"""Keys of requests, as the protocol numbers them."""


class LateLink:
    """Passes on whole requests from ``port`` to the node. `hold` keeps the next one of a kind."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.node_port = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        self._wanted: int | None = None
        self._held: tuple[socket.socket, bytes] | None = None
        self._is_held, self._is_answered = threading.Event(), threading.Event()
        self._open: list[socket.socket] = [self._listener]
        self._closing = threading.Lock()
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self, key: int) -> None:
        """Keep the next request of this kind, and cut its client's connection."""
        self._is_held.clear()
        self._is_answered.clear()
        self._wanted = key

    def release(self) -> None:
        """Give the node what was kept; returns when it has answered that."""
        assert self._is_held.wait(30), "nothing was kept"
        assert self._held is not None
        node, frame = self._held
        node.sendall(frame)
        assert self._is_answered.wait(30), "the node does not answer"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._kept(self._listener.accept()[0])
                node = self._kept(socket.create_connection(("127.0.0.1", self.node_port)))
                for work in (self._requests, self._answers):
                    threading.Thread(target=work, args=(client, node), daemon=True).start()

    def _kept(self, one: socket.socket) -> socket.socket:
        with self._closing:
            self._open.append(one)
            if self._is_closed:
                one.close()
        return one

    def _requests(self, client: socket.socket, node: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while frame := _frame(client):
                (key,) = struct.unpack_from(">h", frame, 4)
                if key == self._wanted:
                    self._wanted, self._held = None, (node, frame)
                    client.shutdown(socket.SHUT_RDWR)
                    self._is_held.set()
                    return
                node.sendall(frame)

    def _answers(self, client: socket.socket, node: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while frame := _frame(node):
                if self._held is not None and node is self._held[0]:
                    self._is_answered.set()
                    return
                client.sendall(frame)

    def close(self) -> None:
        with self._closing:
            self._is_closed = True
            for each in self._open:
                each.close()


def _frame(source: socket.socket) -> bytes:
    """One request or answer with its length; empty at the end."""
    size = _exactly(source, 4)
    return size + _exactly(source, struct.unpack(">i", size)[0]) if size else b""


def _exactly(source: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = source.recv(count - len(found))
        if not piece:
            return b""
        found += piece
    return found


@contextlib.contextmanager
def late_link(port: int, node_port: int) -> Iterator[LateLink]:
    """One, for a node whose clients are told to come by ``port``."""
    link = LateLink(port)
    link.node_port = node_port
    try:
        yield link
    finally:
        link.close()
