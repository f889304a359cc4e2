"""The link between processes and their server, which can be cut around what matters: a COMMIT, or
what a broker is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import threading
from collections.abc import Callable, Collection
from random import Random
from typing import Literal, Protocol

Cut = Literal[
    "before COMMIT",
    "after COMMIT",
    "before publish",
    "after publish",
    "before ack",
    "after ack",
    "before transaction",
    "after transaction",
]

# As duly sends it behind its check, and as a driver does alone: the end of a simple query.
_COMMIT = re.compile(rb"(?i)\bcommit;?\s*\0")
# A statement that commits by itself says so (`duly.sql.postgres.autocommit`): it comes with its
# text, or is prepared under a name and from then on called by that.
_ALONE = re.compile(rb"P.{4}(\w*)\0[^\0]*/\* and commits \*/", re.DOTALL)
# A frame of AMQP with a method of class 60 in it: 40 publishes, 80 acknowledges.
_PUBLISH = re.compile(rb"\x01.{6}\x00\x3c\x00\x28", re.DOTALL)
_ACK = re.compile(rb"\x01.{6}\x00\x3c\x00\x50", re.DOTALL)
# Requests of Kafka's protocol, by the number that each begins with, behind its length.
_REQUESTS = {0: "publish", 8: "ack", 26: "transaction"}
_PIECE = 1 << 18


def _what(cut: Cut) -> str:
    """What a cut waits for."""
    return cut.partition(" ")[2]


class Listens(Protocol):
    """Makes out on one connection what its client asks for."""

    def to(self, piece: bytes) -> Collection[str]:
        """What is in this piece: COMMIT, publish, ack, transaction."""
        ...


class Commits:
    """What a client of PostgreSQL asks for."""

    def __init__(self) -> None:
        self._prepared: set[bytes] = set()

    def to(self, piece: bytes) -> Collection[str]:
        """See `Listens`. Also a statement that commits by itself is a COMMIT."""
        with_text = False
        for name in _ALONE.findall(piece):
            with_text |= not name
            if name:
                self._prepared.add(name)
        called = any(b"\0" + name + b"\0" in piece for name in self._prepared)
        return ["COMMIT"] if with_text or called or _COMMIT.search(piece) is not None else []


class Frames:
    """What a client of RabbitMQ asks for."""

    def to(self, piece: bytes) -> Collection[str]:
        """See `Listens`."""
        kinds = {"publish": _PUBLISH, "ack": _ACK}
        return [kind for kind, frame in kinds.items() if frame.search(piece) is not None]


class Requests:
    """What a client of Kafka asks for: Produce, OffsetCommit, EndTxn. A request may come in pieces,
    and a piece may have many.
    """

    def __init__(self) -> None:
        self._head = b""
        self._skip = 0

    def to(self, piece: bytes) -> Collection[str]:
        """See `Listens`. A request is seen where it begins."""
        found: list[str] = []
        at = 0
        while at < len(piece):
            if self._skip:
                passed = min(self._skip, len(piece) - at)
                self._skip -= passed
                at += passed
                continue
            more = piece[at : at + 6 - len(self._head)]
            self._head += more
            at += len(more)
            if len(self._head) == 6:
                length, number = struct.unpack(">ih", self._head)
                self._head, self._skip = b"", length - 2
                found += [_REQUESTS[number]] if number in _REQUESTS else []
        return found


class Link:
    """Passes on what comes to a port of the loopback interface, on a thread of its own.

    `cut` waits for the next COMMIT (or whatever else ``listens`` makes out) on any connection, and
    ends that connection: before the server has seen it, or when the server has answered and before
    the client hears of it. ``tell`` is called, on that thread, when that has happened. What is
    encrypted cannot be told apart.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tell: Callable[[Cut], None],
        listens: Callable[[], Listens] = Commits,
    ) -> None:
        self._server = host, port
        self._tell = tell
        self._listens = listens
        self._cuts: list[Cut] = []
        self._open: list[_Connection] = []
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._listening = asyncio.run_coroutine_threadsafe(listening, self._loop).result(30)
        self.port = int(self._listening.sockets[0].getsockname()[1])

    def cut(self, when: Cut) -> None:
        """Cut the next connection that asks for this, once."""
        self._cuts.append(when)

    def silence(self, random: Random) -> bool:
        """Pass nothing on any more, in either direction, on one of the connections, which does not
        end by that; False: there is none.
        """
        heard = [each for each in list(self._open) if not each.silent]
        if heard:
            random.choice(heard).silent = True
        return bool(heard)

    def heal(self) -> None:
        """Cut none after all."""
        self._cuts = []

    def close(self) -> None:
        """End every connection."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _end(self) -> None:
        self._closing = True
        # Accepts no more, but is closed last: to a closed server asyncio cannot attach what it has
        # just accepted, and leaves the socket open.
        self._loop.remove_reader(self._listening.sockets[0].fileno())
        for task in self._tasks:
            task.cancel()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
        self._listening.close()
        await asyncio.sleep(0)  # what was aborted is closed in the loop's next turn

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._closing:
            writer.transport.abort()
            return
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)

        def ended(_: object) -> None:  # also one that was cancelled before it began
            self._tasks.discard(task)
            writer.transport.abort()

        task.add_done_callback(ended)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self._server)
        except OSError:
            return  # nobody is there: neither is anybody here
        connection = _Connection(self._listens())
        self._open.append(connection)
        ways = [
            asyncio.ensure_future(self._to_server(connection, reader, back)),
            asyncio.ensure_future(self._to_client(connection, there, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Before anything is waited for: the link's end may come meanwhile, and cancel that.
            self._open.remove(connection)
            back.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _to_server(
        self, connection: _Connection, reader: asyncio.StreamReader, server: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                asked = connection.listens.to(piece)
                if connection.silent:
                    continue
                waiting: list[Cut] = [cut for cut in self._cuts if _what(cut) in asked]
                when = waiting[0] if waiting else None
                if when is not None:
                    self._cuts.remove(when)
                    if when.startswith("before"):
                        self._tell(when)
                        return
                    connection.doomed = when
                server.write(piece)
                await server.drain()

    async def _to_client(
        self, connection: _Connection, server: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await server.read(_PIECE):
                if connection.silent:
                    continue
                if connection.doomed is not None:
                    self._tell(connection.doomed)
                    return
                writer.write(piece)
                await writer.drain()


class _Connection:
    """``doomed``: what the server answers next is not passed on. ``silent``: nothing is."""

    def __init__(self, listens: Listens) -> None:
        self.listens = listens
        self.doomed: Cut | None = None
        self.silent = False
