"""Where messages and effects of a run are: a SQLite file, a schema on a PostgreSQL server; messages
alone also on a RabbitMQ or a Kafka node.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Protocol, cast, runtime_checkable

from duly import connect
from duly.broker import Broker
from duly.inspection import SubscriptionState
from duly.inspection.graves import Buries, graveyard_of
from duly.store import Store

# topic, source, id, key, content, run
COLUMNS = "topic text, source text, id text, key text, content text, run text"
_SQLITE = "sqlite:///"


class Own(Protocol):
    """A transaction of the application's own."""

    @property
    def connection(self) -> Any:
        """The driver's."""
        ...

    def commit(self) -> None:
        """Ask for it. What it raises may mean that it stands."""
        ...

    def undo(self) -> bool:
        """End it; whether it certainly left nothing."""
        ...


class Looked(Protocol):
    """What a place tells of the messages there."""

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """How far each subscription is, with each of its topics."""
        ...


class Site(Protocol):
    """One place, as every process of a run uses it. ``url`` names it to other processes.

    ``errors`` are what its driver raises. ``tells_time``: due times go by a clock there, and not
    by that of a process's host: who publishes by a wrong clock asks for another time.
    """

    url: str
    tells_time: bool
    errors: tuple[type[Exception], ...]

    def leaks(self) -> Sequence[str]:
        """What is damaged, or still open."""
        ...

    def drop(self) -> None:
        """Remove it, where it does not go with the folder of its round."""
        ...


@runtime_checkable
class Database(Site, Protocol):
    """One in which there are effects."""

    def create(self, tables: Sequence[str]) -> None:
        """Make tables of `COLUMNS`."""
        ...

    def insert(self, connection: Any, table: str, row: Sequence[Any]) -> None:
        """Add a row in a handler's transaction."""
        ...

    async def ainsert(self, connection: Any, table: str, row: Sequence[Any]) -> None:
        """The same in that of a coroutine."""
        ...

    def rows(self, table: str) -> Sequence[tuple[Any, ...]]:
        """What stands in a table."""
        ...

    def own(self) -> AbstractContextManager[Own]:
        """A transaction of the application's own."""
        ...

    def locked(self, random: Random) -> AbstractContextManager[None]:
        """Keep others from writing, as another program may."""
        ...


@runtime_checkable
class LooksInto(Protocol):
    """One whose broker does not tell what is in it."""

    def looked_into(self, broker: Broker, folder: Path) -> Looked:
        """What is there, by what its server told into the folder of a round."""
        ...


@runtime_checkable
class PublishesAlone(Protocol):
    """One whose broker has transactions, of what is published and no rows."""

    def store_without_rows(self, broker: Broker) -> Store:
        """They as a store, of this broker there."""
        ...


def site_of(url: str) -> Site:
    """The site that a URL names."""
    if url.startswith(_SQLITE):
        return SQLiteSite(Path(url.removeprefix(_SQLITE)))
    if url.startswith("amqp://"):
        from duly.testing.chaos.queues import QueueSite

        return QueueSite(url)
    if url.startswith("kafka://"):
        from duly.testing.chaos.groups import LogSite

        return LogSite(url)
    from duly.testing.chaos.schema import PostgresSite

    return PostgresSite(url)


def open_broker(site: Site) -> Broker:
    """A broker there."""
    return connect.open_broker(site.url)


def database_of(url: str) -> Database:
    """The site that a URL names, where effects are."""
    site = site_of(url)
    assert isinstance(site, Database), "there are effects"
    return site


def looked_into(site: Site, broker: Broker, folder: Path) -> Looked:
    """What a broker there has in it."""
    if isinstance(site, LooksInto):
        return site.looked_into(broker, folder)
    return cast(Looked, broker)


def open_store(site: Site, broker: Broker) -> Store:
    """A store there."""
    store = connect.open_store(site.url, broker)
    assert store is not None, "each of these is a store"
    return store


def bury_in(store: Store, broker: Broker) -> None:
    """Let the store keep what is given up on, where the broker does not, as an app does that opens
    both.
    """
    graveyard = graveyard_of(store)
    if graveyard is not None and isinstance(broker, Buries):
        broker.bury_in(graveyard)


@dataclass(slots=True)
class _OwnSQLite:
    connection: sqlite3.Connection

    def commit(self) -> None:
        self.connection.execute("commit")

    def undo(self) -> bool:
        certain = self.connection.in_transaction
        if certain:
            self.connection.execute("rollback")
        return certain


@dataclass
class SQLiteSite:
    """A file."""

    path: Path
    url: str = field(init=False)
    errors: tuple[type[Exception], ...] = (sqlite3.Error,)
    tells_time: bool = False

    def __post_init__(self) -> None:
        self.url = f"{_SQLITE}{self.path}"

    def create(self, tables: Sequence[str]) -> None:
        """See `Site`."""
        with closing(sqlite3.connect(self.path)) as connection:
            for table in tables:
                connection.execute(f"create table {table} ({COLUMNS})")
            connection.commit()

    def insert(self, connection: Any, table: str, row: Sequence[Any]) -> None:
        """See `Site`."""
        connection.execute(f"insert into {table} values (?, ?, ?, ?, ?, ?)", row)  # noqa: S608 - a table of this package's

    async def ainsert(self, connection: Any, table: str, row: Sequence[Any]) -> None:
        """See `Site`."""
        self.insert(connection, table, row)

    def rows(self, table: str) -> Sequence[tuple[Any, ...]]:
        """See `Site`."""
        with closing(sqlite3.connect(self.path)) as connection:
            return list(connection.execute(f"select * from {table}"))  # noqa: S608 - likewise

    @contextmanager
    def own(self) -> Iterator[Own]:
        """See `Site`."""
        with closing(sqlite3.connect(self.path, timeout=2.0, isolation_level=None)) as own:
            own.execute("pragma synchronous = full")
            own.execute("pragma wal_autocheckpoint = 0")
            own.execute("begin immediate")
            yield _OwnSQLite(own)

    @contextmanager
    def locked(self, random: Random) -> Iterator[None]:
        """See `Site`."""
        del random  # there is one lock
        with closing(sqlite3.connect(self.path, timeout=5.0, isolation_level=None)) as own:
            own.execute("pragma wal_autocheckpoint = 0")
            own.execute("begin immediate")
            yield
            own.execute("rollback")

    def leaks(self) -> Sequence[str]:
        """See `Site`."""
        found = []
        with closing(sqlite3.connect(self.path, timeout=2.0)) as connection:
            for (line,) in connection.execute("pragma integrity_check"):
                if line != "ok":
                    found.append(f"{self.path.name} is damaged: {line}")
            try:
                connection.execute("begin immediate")
                connection.rollback()
            except sqlite3.OperationalError as error:
                found.append(f"{self.path.name}: somebody still has a transaction open ({error})")
        return found

    def drop(self) -> None:
        """See `Site`."""
