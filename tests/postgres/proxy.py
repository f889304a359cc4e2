"""A proxy on loopback between duly and the server: cuts, and delays, as a network does."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, Self

Cut = Literal["before", "after"]


class Proxy:
    """Passes on what comes, until told to cut.

    ``delay_s`` is how long every piece is under way in each direction. `cut_at` waits for a
    piece that a client sends with these words in it and then ends the connection: ``before``
    the server has seen it, or ``after`` the server answered and before the client hears of it.
    ``requests`` counts the pieces that clients sent, ``turns`` how often one of them spoke after
    the server had.
    """

    def __init__(self, port: int, *, delay_s: float = 0.0) -> None:
        self._target = port
        self._delay_s = delay_s
        self._words: bytes | None = None
        self._when: Cut = "before"
        self.cuts = 0
        self.requests = 0
        self.turns = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listening.getsockname()[1])
        self._open: list[socket.socket] = []
        self._muted: set[int] = set()
        self._to_server_goes, self._to_client_goes = threading.Event(), threading.Event()
        self.go_on()
        self._dead = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def url(self, url: str) -> str:
        """The same database, by way of this proxy."""
        return url.replace(f":{self._target}/", f":{self.port}/")

    def cut_at(self, words: bytes, when: Cut) -> None:
        """Cut the next connection on which a client sends these words, once."""
        self._when, self._words = when, words

    def mute(self, *, to_server: bool = True, to_client: bool = True) -> None:
        """From now on nothing passes on the connections that there are, or nothing in one
        direction: nor does that an end of it has closed.
        """
        clients, servers = self._open[::2], self._open[1::2]
        self._muted.update(map(id, (*(clients * to_server), *(servers * to_client))))

    def stall(self, *, to_server: bool = False, to_client: bool = False) -> None:
        """Hold what comes, until told to `go_on`: whoever sends it may do so until every buffer on
        the way is full.
        """
        if to_server:
            self._to_server_goes.clear()
        if to_client:
            self._to_client_goes.clear()

    def go_on(self) -> None:
        """Pass it on after all."""
        self._to_server_goes.set()
        self._to_client_goes.set()

    def close(self) -> None:
        """End everything."""
        self._dead = True
        self.go_on()
        # Closing alone would not wake up who waits for a connection, and might let one more in.
        _end(self._listening)
        self._accepting.join(30)
        for end in self._open:
            _end(end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._dead:
            try:
                client, _ = self._listening.accept()
            except OSError:
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _end(client)
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open.append(end)
            link = _Link(client, server)
            self._start(self._to_server, link)
            self._start(self._to_client, link)

    def _start(self, call: Callable[[Any], None], link: _Link) -> None:
        threading.Thread(target=call, args=(link,), daemon=True).start()

    def _to_server(self, link: _Link) -> None:
        with contextlib.suppress(OSError), _Late(link.server, self._delay_s) as late:
            while piece := link.client.recv(1 << 20):
                self._to_server_goes.wait()
                self.requests += 1
                self.turns += link.answered
                link.answered = False
                if self._words is not None and self._words in piece:
                    self._words = None
                    if self._when == "before":
                        self.cuts += 1
                        break
                    link.doomed = True
                if id(link.client) not in self._muted:
                    late.send(piece)
        if id(link.client) not in self._muted:
            link.end()

    def _to_client(self, link: _Link) -> None:
        with contextlib.suppress(OSError), _Late(link.client, self._delay_s) as late:
            while piece := link.server.recv(1 << 20):
                self._to_client_goes.wait()
                link.answered = True
                if link.doomed:
                    self.cuts += 1
                    break
                if id(link.server) not in self._muted:
                    late.send(piece)
        if id(link.server) not in self._muted:
            link.end()


class _Link:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.doomed = False
        self.answered = True

    def end(self) -> None:
        for end in (self.client, self.server):
            _end(end)


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


class _Late:
    """Sends pieces so much later, without holding back those that come meanwhile."""

    def __init__(self, to: socket.socket, delay_s: float) -> None:
        self._to = to
        self._delay_s = delay_s
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if self._delay_s:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def send(self, piece: bytes) -> None:
        if not self._delay_s:
            self._to.sendall(piece)
            return
        with self._changed:
            self._pieces.append((time.monotonic() + self._delay_s, piece))
            self._changed.notify()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._pieces or self._ended)
                    if not self._pieces:
                        return
                    due, piece = self._pieces.popleft()
                _never.wait(max(0.0, due - time.monotonic()))
                self._to.sendall(piece)


_never = threading.Event()
