"""What the files say, before anything has happened and when everything has come to rest."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from duly.broker import SubscribeOptions
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import BrokerError
from duly.guarantees import Done, Guarantee
from duly.message import Topic
from duly.store import Backlog
from duly.stores.sqlite import SQLiteStore
from duly.testing.chaos.workload import SPECS, Spec, inputs, lines, views
from duly.testing.history import About, Dead, Final, Output, Read, Recorder, Row, Waiting, about

COLUMNS = "topic text, source text, id text, key text, content text, run text"
OBSERVER = "observer"
_OUTPUTS = [spec.outputs for spec in SPECS if spec.exactly]
TOPICS: Sequence[Topic[Any]] = (inputs, lines, views, *_OUTPUTS)
_A_LOT = 1 << 30


def prepare(messages: Path, apart: Path) -> None:
    """Make files, tables and topics, and the subscription that will read the whole log."""
    with closing(SQLiteBroker(messages)) as broker:
        _observe(broker).close()
        for path in (messages, apart):
            SQLiteStore(path, broker_database=broker.capabilities.database).close()
    for spec in SPECS:
        with closing(sqlite3.connect(apart if spec.apart else messages)) as connection:
            for table in spec.tables:
                connection.execute(f"create table {table} ({COLUMNS})")
            connection.commit()


def _observe(broker: SQLiteBroker) -> Any:
    broker.declare(TOPICS)
    return broker.subscribe(TOPICS, OBSERVER, SubscribeOptions(Guarantee.AT_LEAST_ONCE))


def is_drained(messages: Path, apart: Path) -> bool:
    """Whether every consumer is done and every output on its way has arrived."""
    try:
        return _is_drained(messages, apart)
    except BrokerError:
        return False  # somebody keeps the file from everybody


def _is_drained(messages: Path, apart: Path) -> bool:
    with closing(SQLiteBroker(messages)) as broker:
        states = [state for state in broker.subscriptions() if state.name != OBSERVER]
        names = {state.name for state in states}
        if names < {spec.name for spec in SPECS} or not all(state.is_drained for state in states):
            return False
        database = broker.capabilities.database
        with closing(SQLiteStore(apart, broker_database=database)) as store:
            return not store.outbox.backlog().unsent


def read(folder: Path, messages: Path, apart: Path) -> int:
    """Read everything, and write it into the histories: one file for each consumer."""
    with closing(SQLiteBroker(messages)) as broker:
        log = _log_of(broker)
        dead = broker.dead_letters(limit=100_000)
        states = [state for state in broker.subscriptions() if state.name != OBSERVER]
        leaks = _leaks(messages, apart, broker.capabilities.database)
    for spec in SPECS:
        final = Final(
            log=tuple(m for m in log if m.topic in (spec.topic.name, spec.outputs.name)),
            rows=tuple(_rows(spec, apart if spec.apart else messages)),
            outputs=tuple(
                Output(each, each.id.removeprefix("out-"))
                for each in log
                if spec.exactly and each.topic == spec.outputs.name
            ),
            dead=tuple(
                Dead(letter.subscription, about(letter.message), letter.attempts, letter.error)
                for letter in dead
            ),
            waiting=tuple(
                Waiting(s.name, s.topic, s.backlog, s.in_flight, s.parked) for s in states
            ),
            leaks=tuple(leaks),
        )
        with Recorder(folder / "read" / spec.name, "read") as recorder:
            recorder.record(Read(recorder.clock(), "reader", final))
    return 0


def _log_of(broker: SQLiteBroker) -> Sequence[About]:
    observer = _observe(broker)
    log = []
    while deliveries := observer.claim(1000, _A_LOT, 0.0):
        log += [about(delivery.message) for delivery in deliveries]
        observer.settle([Done(delivery.receipt) for delivery in deliveries])
    return log


def _rows(spec: Spec, path: Path) -> Sequence[Row]:
    with closing(sqlite3.connect(path)) as connection:
        return [
            Row(table, About(*row[:5]), row[5])
            for table in spec.tables
            for row in connection.execute(f"select * from {table}")  # noqa: S608 - made above
        ]


def _leaks(messages: Path, apart: Path, database: str | None) -> Sequence[str]:
    found = []
    for path in (messages, apart):
        with closing(sqlite3.connect(path, timeout=2.0)) as connection:
            for (line,) in connection.execute("pragma integrity_check"):
                if line != "ok":
                    found.append(f"{path.name} is damaged: {line}")
            try:
                connection.execute("begin immediate")
                connection.rollback()
            except sqlite3.OperationalError as error:
                found.append(f"{path.name}: somebody still has a transaction open ({error})")
    with closing(SQLiteStore(apart, broker_database=database)) as store:
        if store.outbox.backlog() != Backlog(0, 0, None):
            found.append(f"the outbox still holds {store.outbox.backlog()}")
    return found
