"""The brokers and the store in memory as subjects: also what others are tested beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from duly.broker import Broker, NotesRepeats, Subscription
from duly.brokers.memory import MemoryDatabase, MemoryLog, MemoryQueue
from duly.inspection.graves import Graveyard
from duly.schedules import Ticking
from duly.store import Store
from duly.stores.memory import MemoryStore
from duly.testing.conformance.subject import BrokerSubject, Effects, Site, StoreSubject

Kind = type[MemoryDatabase] | type[MemoryLog] | type[MemoryQueue]


def _opens(kind: Kind) -> Callable[[Site], Broker]:
    def open_on(site: Site) -> Broker:
        if site.clock is None:
            return kind()
        return kind(clock=site.clock, wall_ms=site.clock.wall_ms)

    return open_on


def _kill(broker: Broker, lane: Subscription) -> None:
    assert isinstance(broker, MemoryDatabase | MemoryLog | MemoryQueue)
    broker.crash(lane)


def _subject(name: str, kind: Kind) -> BrokerSubject:
    operations = (Ticking, NotesRepeats)
    return BrokerSubject(name=name, open=_opens(kind), kill=_kill, operations=operations)


DATABASE = _subject("memory-database", MemoryDatabase)
LOG = _subject("memory-log", MemoryLog)
QUEUE = _subject("memory-queue", MemoryQueue)


def _open_store(site: Site, broker: Broker) -> Store:
    return _store(site, broker if isinstance(broker, MemoryDatabase) else None)


def _store(site: Site, database: MemoryDatabase | None) -> Store:
    if site.clock is None:
        return MemoryStore(database)
    return MemoryStore(database, clock=site.clock, wall_ms=site.clock.wall_ms, begin_s=0.01)


def _effects(_: Site, store: Store) -> Effects:
    memory: Any = store
    return Effects(
        insert=lambda connection, key, value: connection.insert("effects", key, value),
        rows=lambda: {str(key): value for key, value in memory.rows("effects").items()},
    )


@contextmanager
def _own(_: Site, store: Store) -> Iterator[Any]:
    session = store.begin(None)
    try:
        yield session
    finally:
        session.rollback()


STORE = StoreSubject(
    name="memory-store",
    open=_open_store,
    effects=_effects,
    own=_own,
    broker=DATABASE,
    operations=(Graveyard,),
)
# What brokers are tested beside: a database of its own, whatever the broker is.
STORE_APART = StoreSubject(
    name="memory-store",
    open=lambda site, _: _store(site, None),
    effects=_effects,
    own=_own,
    operations=(Graveyard,),
)
