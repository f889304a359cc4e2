"""`Listener`: a session by which this process hears of news, and others know that it lives."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Collection
from typing import Any

import psycopg

from duly.brokers.postgres.bell import Bell
from duly.errors import BrokerError, DulyError
from duly.sql.postgres import Database, OwnLine
from duly.sql.postgres.errors import broker_error
from duly.sql.steps import Ask, Steps

logger = logging.getLogger("duly.postgres")

# How long a NOTIFY may take to come back before LISTEN is held not to work here.
_ECHO_S = 2.0
# How often the thread looks whether it is to end; it is woken then anyway.
_ROUND_S = 5.0
# A session that was lost is opened anew within this time, or its worker taken for dead.
GRACE_S = 1.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 2.0

# How long a lane goes without looking, where it is woken and where it is not.
LISTENING_S, POLLING_S = 0.5, 0.05


_POOLED = (
    "Statements are prepared only where the URL says ?prepare=on, which PgBouncer follows from "
    "1.21 on with max_prepared_statements. Name the server itself for workers to be woken, or "
    "say ?pooler=session if sessions are kept."
)
_DEAF = (
    "A pooler between (PgBouncer in transaction mode)? Then say ?pooler=transaction, or name "
    "the server itself for workers to be woken."
)


class Listener:
    """One session, opened by `start`, kept open by a thread.

    Where a pooler hands the session to others between transactions, it neither hears of news nor
    can it tell that this worker lives: then lanes poll, and a dead worker is known by its lease.
    """

    def __init__(self, database: Database, channel: str, bell: Bell) -> None:
        self._database = database
        self._channel = channel
        self._bell = bell
        self._number = database.read(_next_worker)
        self._connection: psycopg.Connection[Any] | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        # Since when other workers' sessions are not there, as lanes have noticed.
        self._missing: dict[str, float] = {}
        self.listens = True

    @property
    def worker(self) -> str:
        """This process, to others. Below zero: the session says nothing about it."""
        number = self._number if self.listens else -self._number
        return f"{number}@{socket.gethostname()}:{os.getpid()}"

    @property
    def look_s(self) -> float:
        """How long a lane that waits may go without looking."""
        return LISTENING_S if self.listens else POLLING_S

    def start(self) -> None:
        """Open the session. Raises `BrokerError`."""
        pooled = self._database.way.pooled
        # LISTEN and a lock would stay with a session that is lent to somebody else next.
        self.listens = not pooled and self._open()
        if not self.listens:
            logger.warning(
                "%s: %s: lanes look every %s s, they are not woken, and a worker that dies is "
                "known by its lease. %s",
                self._database.shown,
                "behind a pooler in transaction mode" if pooled else "NOTIFY does not reach here",
                POLLING_S,
                _POOLED if pooled else _DEAF,
            )
            self._drop()
            return
        self._thread = threading.Thread(target=self._run, name="duly-listener", daemon=True)
        self._thread.start()

    def dead(self, workers: Collection[str]) -> set[str]:
        """Those of the workers whose session has been gone for a while. Raises `BrokerError`."""
        others = {worker: number for worker in workers if (number := _number_of(worker)) > 0}
        others.pop(self.worker, None)
        if not others:
            return set()
        numbers = self._database.read(_numbers)
        now_s = time.monotonic()
        dead = set()
        for worker, number in others.items():
            if number in numbers:
                self._missing.pop(worker, None)
            elif now_s - self._missing.setdefault(worker, now_s) >= GRACE_S:
                dead.add(worker)
        return dead

    def close(self) -> None:
        """End the session."""
        self._closing.set()
        if self._thread is not None:
            with contextlib.suppress(DulyError):
                self._bell.call()
            self._thread.join()
        if self._connection is not None:
            # Said rather than left to the server, which may take a moment to see the session end.
            with contextlib.suppress(psycopg.Error):
                OwnLine(self._connection, self._database.schema).run(_leave(self._number))
        self._drop()

    # --- the session

    def _open(self) -> bool:
        """Take a connection, listen, and say who is alive; False: nothing is heard on it."""
        self._connection = self._database.source.take()
        line = OwnLine(self._connection, self._database.schema)
        try:
            self._connection.execute(f'listen "{self._channel}"'.encode())
            if not self._hears(self._connection):
                return False
            while not line.run(_be_alive(self._number, self.worker)):
                # An earlier session of ours, which the server has not given up yet, says it.
                if self._closing.wait(GRACE_S / 5):
                    break
        except psycopg.Error as error:
            raise broker_error(error, self._database.shown) from error
        return True

    def _hears(self, connection: psycopg.Connection[Any]) -> bool:
        echo = secrets.token_hex(8)
        self._bell.call(echo)
        until_s = time.monotonic() + _ECHO_S
        while (left_s := until_s - time.monotonic()) > 0:
            for notice in connection.notifies(timeout=left_s, stop_after=1):
                if notice.payload == echo:
                    return True
        return False

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # Not to be used again: it listens, and holds a lock.
            self._database.source.give_back(connection, in_doubt=True)

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closing.is_set():
            try:
                if self._connection is None:
                    self._open()
                    self._bell.stir()  # what happened meanwhile was not heard
                self._listen()
                pause_s = _FIRST_PAUSE_S
            except (BrokerError, psycopg.Error):
                self._drop()
                self._closing.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _listen(self) -> None:
        assert self._connection is not None
        for _ in self._connection.notifies(timeout=_ROUND_S, stop_after=1):
            self._bell.stir()


def _next_worker() -> Steps[int]:
    [(number,)] = yield Ask("next_worker")
    return int(number)


def _be_alive(number: int, worker: str) -> Steps[bool]:
    [(held,)] = yield Ask("be_alive", (number,))
    if held:
        yield Ask("come_to_work", (number, worker))
        yield Ask("forget_absent")
    return bool(held)


def _leave(number: int) -> Steps[None]:
    yield Ask("leave_work", (number,))


def present() -> Steps[list[str]]:
    """The workers whose sessions are there; of one that never had any, nobody can tell."""
    return [name for (name,) in (yield Ask("present"))]


def living(database: Database, workers: Collection[str]) -> dict[str, bool]:
    """Whether each has a session; of one that never had, only its lease can tell."""
    numbers = database.read(_numbers)
    return {worker: _number_of(worker) in numbers or _number_of(worker) < 0 for worker in workers}


def _numbers() -> Steps[set[int]]:
    return {number for (number,) in (yield Ask("living"))}


def _number_of(worker: str) -> int:
    return int(worker.partition("@")[0])
