"""How SQLite is opened, aged and restarted: what an author of a broker and a store writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Broker, NotesRepeats
from duly.brokers.sqlite import Clock, SQLiteBroker
from duly.inspection.counting import Counting
from duly.inspection.erasing import Erasing
from duly.inspection.graves import Graveyard
from duly.inspection.steering import Forgetting, Steering
from duly.inspection.tracing import Remembering, Tracing
from duly.schedules import Ticking
from duly.sql.parking import SQLParked
from duly.store import Store
from duly.stores.sqlite import SQLiteStore
from duly.stores.sqlite.outbox import SQLiteOutbox
from duly.testing.conformance import BrokerSubject, Effects, Site, StoreSubject

DOCS = Path(__file__).parents[2] / "docs/brokers"


def open_broker(site: Site, namespace: str = "") -> SQLiteBroker:
    path, clock = site.folder / "broker.db", site.clock
    if clock is None:
        return SQLiteBroker(path, namespace=namespace)
    as_told = Clock(clock.wall_ms, clock.boot_ms, lambda: "boot", clock)
    return SQLiteBroker(path, namespace=namespace, clock=as_told)


def open_namespace(site: Site) -> SQLiteBroker:
    return open_broker(site, "staging")


def file_of(site: Site, broker: Broker) -> Path:
    """The broker's own file, or one beside it where the broker is none."""
    return site.folder / ("broker.db" if isinstance(broker, SQLiteBroker) else "effects.db")


def open_store(site: Site, broker: Broker, namespace: str = "") -> SQLiteStore:
    database = broker.capabilities.database
    path = file_of(site, broker)
    return SQLiteStore(path, broker_database=database, namespace=namespace, begin_s=0.5)


def open_store_in_namespace(site: Site, broker: Broker) -> SQLiteStore:
    return open_store(site, broker, "staging")


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


def parked(site: Site, store: Store) -> SQLParked:
    assert isinstance(store, SQLiteStore)
    assert site.clock is not None
    return store.parked_by(site.clock.wall_ms, site.clock.boot_ms)


SQLITE = BrokerSubject(
    name="sqlite",
    open=open_broker,
    operations=(Steering, Tracing, Erasing, Counting, Ticking, NotesRepeats),
)
SQLITE_STORE = StoreSubject(
    name="sqlite-store",
    open=open_store,
    effects=effects,
    own=own,
    broker=SQLITE,
    outbox=outbox,
    parked=parked,
    operations=(Remembering, Forgetting, Graveyard),
)

# One environment of several in a file: every statement has to name its own tables.
NAMESPACE = replace(SQLITE, open=open_namespace)
NAMESPACE_STORE = replace(SQLITE_STORE, open=open_store_in_namespace, broker=NAMESPACE)

# These run no statement that the other areas do not run: what they look for lies between two of
# them, and is the same whatever the tables are called.
BETWEEN_STATEMENTS = (
    *("Faults", "FaultsInTransactions", "DoubtInTransactions"),
    *("Crowds", "CrowdsInTransactions", "IdentityInCrowds", "OneWriter", "Histories"),
)


def by_name_alone(suite: type[Any]) -> type[Any]:
    """The suite for what differs from a subject that has all of it in nothing but its names."""
    for area in BETWEEN_STATEMENTS:
        if hasattr(suite, area):
            delattr(suite, area)
    slow: type[Any] = pytest.mark.slow(suite)
    return slow
