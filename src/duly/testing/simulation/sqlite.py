"""SQLite files under the simulation's clock."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from duly.broker import Subscription
from duly.brokers.memory import MemoryLog
from duly.brokers.sqlite import Clock as SQLiteClock
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Admission
from duly.message import Message
from duly.sql.sqlite import DatabaseFile
from duly.stores.sqlite import SQLiteStore
from duly.testing.history import About, Dead, Row, about
from duly.testing.simulation.kinds import TABLES, At, Clock, Place, dead_of
from duly.testing.simulation.scenario import Kind

_COLUMNS = "topic text, source text, id text, key text, content text, run text"


@contextmanager
def sqlite_place(folder: Path, clock: Clock, kind: Kind) -> Iterator[Place]:
    """A store on SQLite: in the broker's own file, in another, or beside a log in memory."""
    with ExitStack() as stack:
        at = At()
        broker, name = _broker(folder, clock, kind, at, stack)
        store = SQLiteStore(
            folder / name,
            broker_database=broker.capabilities.database,
            begin_s=1.0,
            wall_ms=clock.wall_ms,
            boot_ms=clock.wall_ms,
        )
        stack.callback(store.close)
        file = store.file
        with closing(file.connect(sqlite3.Connection)) as connection:
            for table in (*TABLES, "business"):
                connection.execute(f"create table {table} ({_COLUMNS})")
            connection.execute("create table tripwire (one integer primary key)")
            connection.execute("insert into tripwire values (1)")
            connection.commit()
        yield Place(
            broker,
            store,
            _ADMISSIONS[kind],
            insert=_insert,
            lose=_lose,
            rows=lambda: _rows(file),
            states=broker.subscriptions,
            dead=lambda: [*dead_of(broker), *_dead_in(file)],
            bury=broker.crash if isinstance(broker, MemoryLog) else _nobody_notices,
            locks=True,
            outbox=None if kind == "sqlite" else store.outbox,
            parked=store.parked if kind == "sqlite-cursor" else None,
            at=at,
        )


_ADMISSIONS: Mapping[Kind, Admission] = {
    "sqlite": Admission.BY_CLAIM,
    "sqlite-inbox": Admission.BY_INBOX,
    "sqlite-cursor": Admission.BY_CURSOR,
}


def _broker(
    folder: Path, clock: Clock, kind: Kind, at: At, stack: ExitStack
) -> tuple[SQLiteBroker | MemoryLog, str]:
    """The broker, and the name of the store's file."""
    if kind == "sqlite-cursor":
        return MemoryLog(clock=clock, wall_ms=clock.wall_ms), "store.db"
    ticking = SQLiteClock(clock.wall_ms, clock.wall_ms, monotonic_s=clock)
    broker = SQLiteBroker(folder / "broker.db", clock=ticking)
    stack.callback(broker.close)
    # A call of the broker may be more than one transaction: between any two a process may die.
    broker._file = cast("DatabaseFile", _Watched(broker.file, at))
    return broker, "broker.db" if kind == "sqlite" else "store.db"


class _Watched:
    """A database file that says before and after each write that it is there."""

    def __init__(self, file: DatabaseFile, at: At) -> None:
        self._inner = file
        self._at = at

    def write(self, make_steps: Callable[[], Any], *, durable: bool = True) -> Any:
        self._at.point("file write: before")
        result = self._inner.write(make_steps, durable=durable)
        self._at.point("file write: after")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _insert(connection: Any, table: str, run: str, message: About) -> None:
    connection.execute(
        f"insert into {table} values (?, ?, ?, ?, ?, ?)",  # noqa: S608 - a table of this module's
        (message.topic, message.source, message.id, message.key, message.content, run),
    )


def _lose(connection: Any) -> None:
    """A statement that fails and takes the whole transaction with it; the handler swallows it."""
    with suppress(sqlite3.IntegrityError):
        connection.execute("insert or rollback into tripwire values (1)")


def _dead_in(file: DatabaseFile) -> list[Dead]:
    """What the store itself gave up on: it admits by cursor."""
    columns = "consumer, attempts, error, topic, source, id, body, time_ms, key"
    with closing(file.connect(sqlite3.Connection)) as connection:
        return [
            Dead(consumer, about(Message(*message)), attempts, error)
            for consumer, attempts, error, *message in connection.execute(
                f"select {columns} from duly_log_dead"  # noqa: S608 - names of this function's
            )
        ]


def _rows(file: DatabaseFile) -> list[Row]:
    with closing(file.connect(sqlite3.Connection)) as connection:
        return [
            Row(table, About(*row[:5]), row[5])
            for table in TABLES
            for row in connection.execute(f"select * from {table}")  # noqa: S608 - likewise
        ]


def _nobody_notices(lane: Subscription) -> None:
    """All simulated processes are one process to the file: its leases must run out."""
