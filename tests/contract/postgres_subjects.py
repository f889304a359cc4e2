"""How PostgreSQL is opened, aged and restarted for the conformance suite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from duly.broker import Broker, NotesRepeats
from duly.brokers.postgres import Clock, PostgresBroker
from duly.inspection.counting import Counting
from duly.inspection.erasing import Erasing
from duly.inspection.graves import Graveyard
from duly.inspection.steering import Forgetting, Steering
from duly.inspection.tracing import Remembering, Tracing
from duly.message import now_ms
from duly.schedules import Ticking
from duly.sql.parking import SQLParked
from duly.store import Store
from duly.stores.postgres import PostgresStore
from duly.stores.postgres.outbox import PostgresOutbox
from duly.testing.conformance import BrokerSubject, Effects, Site, StoreSubject
from tests.servers.postgres import Schema, schema_named

STORES = Path(__file__).parents[2] / "docs/stores"


def schema_of(site: Site) -> Schema:
    return schema_named(site.name)


def open_broker(site: Site) -> PostgresBroker:
    schema = schema_of(site)
    if site.clock is None:
        return PostgresBroker(schema.url, schema=schema.duly)
    clock = Clock(site.clock.wall_ms, site.clock.boot_ms, site.clock)
    return PostgresBroker(schema.url, schema=schema.duly, clock=clock)


def open_store(site: Site, broker: Broker) -> PostgresStore:
    schema = schema_of(site)
    clock = site.clock
    return PostgresStore(
        schema.url,
        schema=schema.duly,
        broker_database=broker.capabilities.database,
        log=getattr(broker, "log", None),
        wall_ms=now_ms if clock is None else clock.wall_ms,
    )


def effects(site: Site, _: Store) -> Effects:
    schema = schema_of(site)
    with schema.connect() as connection:
        connection.execute("create table if not exists effects (key text primary key, value text)")

    def insert(connection: Any, key: str, value: str) -> None:
        connection.execute("insert into effects values (%s, %s)", (key, value))

    def rows() -> dict[str, str]:
        with schema.connect() as connection:
            return dict(connection.execute("select key, value from effects").fetchall())

    return Effects(insert=insert, rows=rows)


class Own:
    """An application's transaction on its own connection."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.commit = connection.commit
        self.rollback = connection.rollback


@contextmanager
def own(site: Site, _: Store) -> Iterator[Own]:
    connection = schema_of(site).connect()
    try:
        yield Own(connection)
    finally:
        connection.close()


def outbox(site: Site, store: Store) -> PostgresOutbox:
    assert isinstance(store, PostgresStore)
    assert site.clock is not None
    return store.outbox_by(site.clock.wall_ms)


def parked(site: Site, store: Store) -> SQLParked:
    assert isinstance(store, PostgresStore)
    assert site.clock is not None
    return store.parked_by(site.clock.wall_ms)


POSTGRES = BrokerSubject(
    name="postgres",
    open=open_broker,
    operations=(Steering, Tracing, Erasing, Counting, Ticking, NotesRepeats),
)
POSTGRES_STORE = StoreSubject(
    name="postgres-store",
    open=open_store,
    effects=effects,
    own=own,
    broker=POSTGRES,
    outbox=outbox,
    parked=parked,
    operations=(Remembering, Forgetting, Graveyard),
)
