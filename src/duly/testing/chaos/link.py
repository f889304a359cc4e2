"""The link between processes and their server, which can be cut around a COMMIT."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable
from typing import Literal

Cut = Literal["before COMMIT", "after COMMIT"]

# As duly sends it behind its check, and as a driver does alone: the end of a simple query.
_COMMIT = re.compile(rb"(?i)\bcommit;?\s*\0")
# A statement that commits by itself says so (`duly.sql.postgres.autocommit`): it comes with its
# text, or is prepared under a name and from then on called by that.
_ALONE = re.compile(rb"P.{4}(\w*)\0[^\0]*/\* and commits \*/", re.DOTALL)
_PIECE = 1 << 18


class Link:
    """Passes on what comes to a port of the loopback interface, on a thread of its own.

    `cut` waits for the next COMMIT on any connection, or the next statement that commits by itself,
    and ends that connection: before the server has seen it, or when the server has answered and
    before the client hears of it. ``tell`` is called, on that thread, when that has happened. What
    is encrypted cannot be told apart.
    """

    def __init__(self, host: str, port: int, tell: Callable[[Cut], None]) -> None:
        self._server = host, port
        self._tell = tell
        self._cut: Cut | None = None
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._listening = asyncio.run_coroutine_threadsafe(listening, self._loop).result(30)
        self.port = int(self._listening.sockets[0].getsockname()[1])

    def cut(self, when: Cut) -> None:
        """Cut the next connection that commits, once."""
        self._cut = when

    def heal(self) -> None:
        """Cut none after all."""
        self._cut = None

    def close(self) -> None:
        """End every connection."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _end(self) -> None:
        self._listening.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(*self._server)
        except OSError:
            return  # nobody is there: neither is anybody here
        connection = _Connection()
        ways = [
            asyncio.ensure_future(self._to_server(connection, reader, back)),
            asyncio.ensure_future(self._to_client(connection, there, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            back.transport.abort()

    async def _to_server(
        self, connection: _Connection, reader: asyncio.StreamReader, server: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE):
                when = self._cut
                commits = connection.commits_by(piece)
                if when is not None and commits:
                    self._cut = None
                    if when == "before COMMIT":
                        self._tell(when)
                        return
                    connection.doomed = True
                server.write(piece)
                await server.drain()

    async def _to_client(
        self, connection: _Connection, server: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await server.read(_PIECE):
                if connection.doomed:
                    self._tell("after COMMIT")
                    return
                writer.write(piece)
                await writer.drain()


class _Connection:
    """``doomed``: what the server answers next is not passed on."""

    def __init__(self) -> None:
        self.doomed = False
        self._prepared: set[bytes] = set()

    def commits_by(self, piece: bytes) -> bool:
        """Whether something is committed by what a client sends here."""
        with_text = False
        for name in _ALONE.findall(piece):
            with_text |= not name
            if name:
                self._prepared.add(name)
        called = any(b"\0" + name + b"\0" in piece for name in self._prepared)
        return with_text or called or _COMMIT.search(piece) is not None
