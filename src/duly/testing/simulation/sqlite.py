"""SQLite files under the simulation's clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from duly.broker import Subscription
from duly.brokers.sqlite import Clock as SQLiteClock
from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Admission
from duly.store import outbox_of
from duly.stores.sqlite import SQLiteStore
from duly.testing.history import About, Dead, Row, about
from duly.testing.simulation.kinds import TABLES, Clock, Place

_COLUMNS = "topic text, source text, id text, key text, content text, run text"


@contextmanager
def sqlite_place(folder: Path, clock: Clock, *, apart: bool) -> Iterator[Place]:
    """Broker and store in one file, or (``apart``) in two."""
    ticking = SQLiteClock(clock.wall_ms, clock.wall_ms, lambda: "boot", clock)
    with (
        closing(SQLiteBroker(folder / "broker.db", clock=ticking)) as broker,
        closing(
            SQLiteStore(
                folder / ("store.db" if apart else "broker.db"),
                broker_database=broker.capabilities.database,
                begin_s=1.0,
            )
        ) as store,
    ):
        file = store.file
        with closing(file.connect(_plain())) as connection:
            for table in (*TABLES, "business"):
                connection.execute(f"create table {table} ({_COLUMNS})")
            connection.commit()
        yield Place(
            broker,
            store,
            Admission.BY_INBOX if apart else Admission.BY_CLAIM,
            insert=_insert,
            rows=lambda: _rows(file),
            states=broker.subscriptions,
            dead=lambda: [
                Dead(d.subscription, about(d.message), d.attempts, d.error)
                for d in broker.dead_letters(limit=10_000)
            ],
            bury=_nobody_notices,
            locks=True,
            outbox=outbox_of(store) if apart else None,
        )


def _plain() -> Any:
    import sqlite3

    return sqlite3.Connection


def _insert(connection: Any, table: str, run: str, message: About) -> None:
    connection.execute(
        f"insert into {table} values (?, ?, ?, ?, ?, ?)",  # noqa: S608 - a table of this module's
        (message.topic, message.source, message.id, message.key, message.content, run),
    )


def _rows(file: Any) -> list[Row]:
    with closing(file.connect(_plain())) as connection:
        return [
            Row(table, About(*row[:5]), row[5])
            for table in TABLES
            for row in connection.execute(f"select * from {table}")  # noqa: S608 - likewise
        ]


def _nobody_notices(lane: Subscription) -> None:
    """All simulated processes are one process to the file: its leases must run out."""
