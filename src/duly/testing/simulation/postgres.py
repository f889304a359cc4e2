"""A broker and a store on a PostgreSQL server under the simulation's clock.

The server is the one that ``DULY_TEST_POSTGRES`` names. Its transactions stand side by side: one
that would wait for another gives up at once, for on the simulation's one thread the other cannot
go on meanwhile.

What is not simulated there is left out of it, for every statement costs a thousand times what it
costs in memory: the session by which real workers tell that they live, and the notices by which
they are woken. Sessions are kept from one schedule to the next, with the statements that they have
prepared, and the tables are emptied in between.
"""

from __future__ import annotations

import atexit
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any, cast

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from duly.broker import Subscription
from duly.brokers.memory import MemoryLog, MemoryQueue
from duly.brokers.postgres import Clock as PostgresClock
from duly.brokers.postgres import PostgresBroker
from duly.brokers.postgres.bell import Bell
from duly.brokers.postgres.lane import Shared
from duly.brokers.postgres.listener import Listener
from duly.errors import ConfigurationError
from duly.guarantees import Admission
from duly.message import Message
from duly.sql.postgres import Database
from duly.stores.postgres import PostgresStore
from duly.testing.history import About, Dead, Row, about
from duly.testing.simulation.kinds import TABLES, At, Clock, Place, dead_of
from duly.testing.simulation.scenario import Kind

SERVER = "DULY_TEST_POSTGRES"

_COLUMNS = "topic text, source text, id text, key text, content text, run text"
# What the simulated application writes; publishers that do so within a transaction have a third.
_OWN = (*TABLES, "business")
_DULYS = (
    *(
        "inbox",
        "log_cursors",
        "log_dead",
        "log_parked",
        "letters",
        "outbox",
        "outbox_refused",
        "outbox_relay",
    ),
    *("messages", "arrivals", "runs", "identities", "cursors", "claims", "parked", "dead"),
    *("incidents", "subscriptions", "streams", "topics"),
)
# Real time: nobody comes to commit meanwhile.
_LOCK_S = 0.005
# What is prepared is planned once for all schedules, and not by what each of them has stored.
_SETTINGS = f"-c lock_timeout={int(_LOCK_S * 1000)} -c plan_cache_mode=force_generic_plan"
# After so many schedules the dead rows are swept out: every look walks over them.
_SWEPT_EVERY = 20

# A lease has some such looks: nobody comes too late for what its end makes free.
_IDLE_S = 1.0

Reader = psycopg.Connection[tuple[Any, ...]]


class _Session(psycopg.Connection[Any]):
    """A session that outlives its schedule: closed in good order, the next one takes it up."""

    def close(self) -> None:
        if self.closed or self.info.transaction_status != TransactionStatus.IDLE:
            super().close()
        elif self not in _sessions:
            _sessions.append(self)


_sessions: list[_Session] = []


def _connect() -> psycopg.Connection[Any]:
    if _sessions:
        session = _sessions.pop()
        session.execute("reset all")  # it may have been set up for something else
        return session
    session = _Session.connect(_url(), options=_SETTINGS)
    session.prepare_threshold = 0
    return session


@contextmanager
def postgres_place(clock: Clock, kind: Kind) -> Iterator[Place]:
    """A store in the one schema of this process: the broker's own, or beside one in memory."""
    schema, reader = _schema()
    _empty(reader, schema)
    with ExitStack() as stack:
        at = At()
        broker, bury = _broker(clock, kind, schema, at, stack)
        # From a function: the simulated loop has no sockets for async connections.
        store = PostgresStore(
            _connect,
            schema=schema,
            broker_database=broker.capabilities.database,
            log=getattr(broker, "log", None),
            lock_s=_LOCK_S,
            wall_ms=clock.wall_ms,
        )
        stack.callback(store.close)
        yield Place(
            broker,
            store,
            _ADMISSIONS[kind],
            insert=lambda connection, table, run, message: connection.execute(
                f"insert into {schema}.{table} values (%s, %s, %s, %s, %s, %s)",  # noqa: S608 - of this module
                (message.topic, message.source, message.id, message.key, message.content, run),
            ),
            lose=_lose,
            rows=lambda: [
                Row(table, About(*row[:5]), row[5])
                for table in TABLES
                for row in reader.execute(f"select * from {schema}.{table}".encode())  # noqa: S608 - likewise
            ],
            states=broker.subscriptions,
            dead=lambda: [*dead_of(broker), *_dead_in(reader, schema)],
            bury=bury,
            outbox=None if kind == "postgres" else store.outbox_by(clock.wall_ms),
            parked=store.parked_by(clock.wall_ms) if kind == "postgres-cursor" else None,
            at=at,
            idle_s=_IDLE_S,
        )


_ADMISSIONS: Mapping[Kind, Admission] = {
    "postgres": Admission.BY_CLAIM,
    "postgres-inbox": Admission.BY_INBOX,
    "postgres-cursor": Admission.BY_CURSOR,
}


def _broker(
    clock: Clock, kind: Kind, schema: str, at: At, stack: ExitStack
) -> tuple[PostgresBroker | MemoryLog | MemoryQueue, Callable[[Subscription], None]]:
    """The broker, and what tells it that the process of a lane has died."""
    if kind != "postgres":
        memory = MemoryLog if kind == "postgres-cursor" else MemoryQueue
        there = memory(clock=clock, wall_ms=clock.wall_ms)
        return there, there.crash
    broker = PostgresBroker(
        _connect, schema=schema, clock=PostgresClock(clock.wall_ms, clock.wall_ms, clock)
    )
    stack.callback(broker.close)
    # A call of the broker may be more than one transaction: between any two a process may die.
    # Before the lanes' surroundings are made of it.
    broker._database = cast("Database", _Watched(broker.database, at))
    _alone(broker)
    # All simulated processes are one to the server, with one session: their leases must run out.
    return broker, lambda _: None


def _alone(broker: PostgresBroker) -> None:
    """To the server all simulated processes are one, and none of them needs a thread."""
    broker._bell = cast("Bell", _Silent(broker.database, "", lambda: None))
    broker._shared = Shared(
        broker.database,
        broker._clock,
        broker._steps,
        broker._bell,
        cast("Listener", _Present()),
        broker._ticker,
        broker._sweeper,
        broker._solitude,
        lambda: None,
    )


class _Silent(Bell):
    """Nobody waits: all lanes are stepped."""

    def ring(self) -> None:
        self.stir()


class _Present:
    """Who holds claims is alive as long as its leases say so."""

    worker = "-1@simulation"
    look_s = 0.0

    def dead(self, workers: Collection[str]) -> set[str]:
        del workers  # of none can be told
        return set()

    def close(self) -> None:
        """There is no session."""


class _Watched:
    """A database that says before and after each write that it is there."""

    def __init__(self, database: Database, at: At) -> None:
        self._inner = database
        self._at = at

    def write(self, make_steps: Callable[[], Any], **how: Any) -> Any:
        return self._between_points(lambda: self._inner.write(make_steps, **how))

    def write_at_once(self, make_steps: Callable[[], Any]) -> Any:
        return self._between_points(lambda: self._inner.write_at_once(make_steps))

    def _between_points(self, call: Callable[[], Any]) -> Any:
        self._at.point("database write: before")
        result = call()
        self._at.point("database write: after")
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _url() -> str:
    url = os.environ.get(SERVER)
    if url is None:
        raise ConfigurationError(
            f"the simulation of PostgreSQL needs a server: set {SERVER} to the URL of a database "
            "in which it may create a schema"
        )
    return url


@cache
def _schema() -> tuple[str, Reader]:
    """The name of this process's schema, made anew, and a connection of its own."""
    name = f"duly_simulation_{os.getpid()}"
    reader = psycopg.connect(_url(), autocommit=True, row_factory=tuple_row)
    reader.execute(f"drop schema if exists {name} cascade".encode())
    PostgresStore(_connect, schema=name).close()
    PostgresBroker(_connect, schema=name).close()
    for table in _OWN:
        reader.execute(f"create table {name}.{table} ({_COLUMNS})".encode())
    for table in (*_OWN, *_DULYS):
        # It would come in between, and to cut off what is empty it locks readers out for longer
        # than they wait here.
        off = "autovacuum_enabled = off, vacuum_truncate = off"
        reader.execute(f"alter table {name}.{table} set ({off})".encode())
    atexit.register(_drop, name, reader, _url())  # by then it may be named no more
    return name, reader


def _drop(name: str, reader: Reader, url: str) -> None:
    reader.close()
    with suppress(psycopg.Error), psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"drop schema if exists {name} cascade".encode())


def _empty(reader: Reader, schema: str) -> None:
    tables = [f"{schema}.{table}" for table in (*_OWN, *_DULYS)]
    reader.execute("; ".join(f"delete from {table}" for table in tables).encode())  # noqa: S608 - tables of this module
    if next(_schedules) % _SWEPT_EVERY == 0:
        reader.execute(f"vacuum {', '.join(tables)}".encode())


_schedules = itertools.count(1)


def _lose(connection: Any) -> None:
    """A statement that fails, which ends the whole transaction; the handler swallows it."""
    with suppress(psycopg.Error):
        connection.execute("select 1 / 0")


def _dead_in(reader: Reader, schema: str) -> list[Dead]:
    """What the store itself gave up on: it admits by cursor."""
    columns = "consumer, attempts, error, topic, source, id, body, time_ms, key"
    found = reader.execute(f"select {columns} from {schema}.log_dead".encode())  # noqa: S608 - likewise
    return [
        Dead(consumer, about(Message(*message)), attempts, error)
        for consumer, attempts, error, *message in found
    ]
