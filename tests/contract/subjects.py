"""How SQLite is opened, aged and restarted: what an author of a broker and a store writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from duly.broker import Broker
from duly.brokers.sqlite import Clock, SQLiteBroker
from duly.store import Store
from duly.stores.sqlite import SQLiteStore
from duly.stores.sqlite.outbox import SQLiteOutbox
from duly.testing.conformance import BrokerSubject, Effects, Site, StoreSubject

DOCS = Path(__file__).parents[2] / "docs/brokers"


def open_broker(site: Site) -> SQLiteBroker:
    path, clock = site.folder / "broker.db", site.clock
    if clock is None:
        return SQLiteBroker(path)
    return SQLiteBroker(path, clock=Clock(clock.wall_ms, clock.boot_ms, lambda: "boot", clock))


def file_of(site: Site, broker: Broker) -> Path:
    """The broker's own file, or one beside it where the broker is none."""
    return site.folder / ("broker.db" if isinstance(broker, SQLiteBroker) else "effects.db")


def open_store(site: Site, broker: Broker) -> SQLiteStore:
    database = broker.capabilities.database
    return SQLiteStore(file_of(site, broker), broker_database=database, begin_s=0.05)


def effects(_: Site, store: Store) -> Effects:
    assert isinstance(store, SQLiteStore)
    path = store.path
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table if not exists effects (key text primary key, value text)")

    def rows() -> dict[str, str]:
        with closing(sqlite3.connect(path)) as connection:
            return dict(connection.execute("select key, value from effects"))

    return Effects(
        insert=lambda connection, key, value: connection.execute(
            "insert into effects values (?, ?)", (key, value)
        ),
        rows=rows,
    )


class Own:
    """An application's transaction on its own connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self.commit = connection.commit
        self.rollback = connection.rollback


@contextmanager
def own(_: Site, store: Store) -> Iterator[Own]:
    assert isinstance(store, SQLiteStore)
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute("begin immediate")
        yield Own(connection)


def outbox(site: Site, store: Store) -> SQLiteOutbox:
    assert isinstance(store, SQLiteStore)
    assert site.clock is not None
    return SQLiteOutbox(store.file, wall_ms=site.clock.wall_ms, boot_time_ms=site.clock.boot_ms)


SQLITE = BrokerSubject(name="sqlite", open=open_broker)
SQLITE_STORE = StoreSubject(
    name="sqlite-store",
    open=open_store,
    effects=effects,
    own=own,
    broker=SQLITE,
    outbox=outbox,
)
