"""What the tests of the SQLite store share."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Delivery, LogPosition
from duly.guarantees import Admission, Done, Settlement
from duly.message import Message, now_ms
from duly.store import Scope
from duly.stores.sqlite import SQLiteSession, SQLiteStore

INBOX = Scope("billing", Admission.BY_INBOX)
CURSOR = Scope("billing", Admission.BY_CURSOR)


def delivery(id: str, body: bytes = b"body", **given: Any) -> Delivery:
    topic, source = given.pop("topic", "checkout"), given.pop("source", "shop")
    message: Message[Any] = Message(topic, source, id, body, given.pop("time_ms", now_ms()))
    return Delivery(message, receipt=given.pop("receipt", id), **given)


def at(offset: int, *, log: str = "log-1", epoch: int = 0, end: int | None = None) -> Delivery:
    return delivery(f"m-{offset}", position=LogPosition(log, offset, epoch, end))


def ids(deliveries: Iterable[Delivery]) -> list[str]:
    return [d.message.id for d in deliveries]


def run(
    store: SQLiteStore,
    scope: Scope,
    deliveries: Sequence[Delivery],
    settle: Callable[[Any], Settlement] = Done,
) -> list[str]:
    """One transaction that writes the id of each fresh message; returns these ids."""
    session = store.begin(scope)
    try:
        fresh = session.admit(deliveries).fresh
        write(session, *ids(fresh))
        session.settle([settle(d.receipt) for d in fresh], fresh)
        session.commit()
    finally:
        session.rollback()
    return ids(fresh)


def settle_and_commit(session: SQLiteSession, deliveries: Sequence[Delivery]) -> None:
    session.settle([Done(d.receipt) for d in deliveries], deliveries)
    session.commit()


def write(session: SQLiteSession, *values: str) -> None:
    session.connection.executemany("insert into effects values (?)", [(v,) for v in values])


def effects(path: Path) -> list[str]:
    """What stands in the file, as a foreign program sees it."""
    return [value for (value,) in rows(path, "select value from effects order by rowid")]


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def execute(path: Path, sql: str) -> None:
    """What a foreign program does to the file."""
    connection = sqlite3.connect(path)
    try:
        connection.execute(sql)
        connection.commit()
    finally:
        connection.close()


def lose_the_transaction(session: SQLiteSession) -> None:
    """Make SQLite roll back by itself, and swallow the error as a careless handler does."""
    guard = session._guard
    guard.connection.own = True
    try:
        [(pages,)] = guard._runner.execute("pragma page_count")
        guard._runner.execute(f"pragma max_page_count = {pages + 2}")
        values = [("x" * 4000,)] * 100
        with pytest.raises(sqlite3.OperationalError, match="full"):
            sqlite3.Cursor(guard.connection).executemany("insert into effects values (?)", values)
        assert not guard.in_transaction, "SQLite rolled back: else the test proves nothing"
        guard._runner.execute("pragma max_page_count = 1000000")
    finally:
        guard.connection.own = False


def begin_anew(session: SQLiteSession) -> None:
    """What a handler's next statement would do on an unguarded cursor: begin by itself."""
    sqlite3.Cursor(session.connection).execute("insert into effects values ('after')")
    assert session._guard.in_transaction
