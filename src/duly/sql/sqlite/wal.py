"""Checkpoints of the write-ahead log, from one designated place: a writer that holds the turn.

SQLite before 3.51.3 can corrupt a database when one connection checkpoints a log that is fully
checkpointed while another commits and starts it anew (sqlite.org/wal.html#walresetbug). Under
the turn none of duly's connections commits meanwhile.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic

log = logging.getLogger("duly.sqlite")

# Enough that rewriting a page again and again costs one write into the database, little enough
# that a checkpoint ends within some 20 ms: the turn is held meanwhile.
_PAGES = 2000
# How often to look: it takes some system calls, and in between the log grows by a few batches.
_LOOK_S = 0.01
# So far can a reader that stays open make the log grow before duly waits for readers.
_PATIENCE_PAGES = 16 * _PAGES

# One that two connections which checkpoint at the same time cannot corrupt.
SAFE_VERSION = (3, 51, 3)

_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24


class Checkpoints:
    """Moves the log's pages into the database when it has grown long."""

    def __init__(
        self,
        path: Path,
        connect: Callable[[], sqlite3.Connection],
        *,
        pages: int = _PAGES,
        look_s: float = _LOOK_S,
    ) -> None:
        self._wal = f"{path}-wal"
        self._connect = connect
        self._connection: sqlite3.Connection | None = None
        self._mutex = threading.Lock()
        self._closed = False
        self._pages = pages
        self._look_s = look_s
        self._generation = b""
        self._moved = 0
        self._look_at_s = 0.0
        self.count = 0

    def run_when_due(self, before: Callable[[], None] = lambda: None) -> None:
        """Checkpoint when the log grew by enough pages; the turn is held. ``before`` is called
        where one is due. Never raises.
        """
        now_s = monotonic()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + self._look_s
        try:
            if self._is_due():
                before()
                self._run()
        except (OSError, sqlite3.Error) as error:
            self._moved += self._pages  # what was committed stands; try again later
            log.warning("%s: the log could not be moved into the database: %s", self._wal, error)

    def close(self) -> None:
        """Close the connection, after a checkpoint that is under way; none comes later."""
        with self._mutex:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _is_due(self) -> bool:
        # Frame N belongs to the log's present generation when it has its salt, so two small
        # reads tell whether there are N. (On the -wal file SQLite holds no locks to lose.)
        fd = os.open(self._wal, os.O_RDONLY | os.O_CLOEXEC)
        try:
            header = os.pread(fd, _HEADER_BYTES, 0)
            generation = header[16:24]
            if generation != self._generation:
                self._generation, self._moved = generation, 0
            frame_bytes = _FRAME_HEADER_BYTES + int.from_bytes(header[8:12], "big")
            frame = self._moved + self._pages - 1
            found = os.pread(fd, _FRAME_HEADER_BYTES, _HEADER_BYTES + frame * frame_bytes)
        finally:
            os.close(fd)
        return len(header) == _HEADER_BYTES and found[8:16] == generation

    def _run(self) -> None:
        with self._mutex:
            if not self._closed:
                self._checkpoint()

    def _checkpoint(self) -> None:
        if self._connection is None:
            self._connection = self._connect()
        _, logged, _ = self._connection.execute("pragma wal_checkpoint(passive)").fetchone()
        if logged > _PATIENCE_PAGES:
            # Everybody who reads an old snapshot gets the connection's busy timeout to end.
            self._connection.execute("pragma wal_checkpoint(truncate)").fetchone()
        self._moved = max(logged, 0)
        self.count += 1
