"""A schema on a PostgreSQL server, as every process of a run uses it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import psycopg

from duly.testing.chaos.site import COLUMNS, Own

# Sessions of a run are known by it, whoever else uses the server.
NAME = "duly-chaos"
# What publishing, claiming, settling and a handler's transaction go through.
_LOCKED = ("messages", "arrivals", "identities", "cursors", "claims", "parked")
_LOCKED_APART = ("inbox", "outbox")
_GOES_AWAY_S = 10.0

Connection = psycopg.Connection[tuple[Any, ...]]


def url_of(server: str, schema: str, number: int | None = None, **settings: str) -> str:
    """The URL of a schema there, for sessions under these settings, of the process of a number."""
    mark = "&" if "?" in server else "?"
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    name = NAME if number is None else _name_of(number)
    named = {"schema": schema, "application_name": name} | ({"options": options} if options else {})
    return f"{server}{mark}{urlencode(named, quote_via=quote)}"


def _name_of(number: int) -> str:
    return f"{NAME}-{number}"


@dataclass(slots=True)
class _OwnPostgres:
    connection: Connection
    asked: bool = False

    def commit(self) -> None:
        self.asked = True
        self.connection.commit()

    def undo(self) -> bool:
        with suppress(psycopg.Error):
            self.connection.rollback()
        return not self.asked


@dataclass
class PostgresSite:
    """A schema, which ``url`` names as duly does."""

    url: str
    errors: tuple[type[Exception], ...] = (psycopg.Error,)
    tells_time: bool = True
    schema: str = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        options = dict(parse_qsl(parts.query))
        self.schema = options.pop("schema")
        query = urlencode(options, quote_via=quote)
        self._server = parts._replace(query=query).geturl()

    def _connect(self, **more: Any) -> Connection:
        return psycopg.connect(self._server, **more)

    def create(self, tables: Sequence[str]) -> None:
        """See `Site`."""
        with self._connect() as connection:
            for table in tables:
                connection.execute(f"create table {self.schema}.{table} ({COLUMNS})".encode())

    def insert(self, connection: Any, table: str, row: Sequence[Any]) -> None:
        """See `Site`."""
        connection.execute(self._insertion(table), row)

    async def ainsert(self, connection: Any, table: str, row: Sequence[Any]) -> None:
        """See `Site`."""
        await connection.execute(self._insertion(table), row)

    def _insertion(self, table: str) -> bytes:
        return f"insert into {self.schema}.{table} values (%s, %s, %s, %s, %s, %s)".encode()  # noqa: S608 - a table of this package's

    def rows(self, table: str) -> Sequence[tuple[Any, ...]]:
        """See `Site`."""
        with self._connect() as connection:
            return connection.execute(f"select * from {self.schema}.{table}".encode()).fetchall()  # noqa: S608 - likewise

    @contextmanager
    def own(self) -> Iterator[Own]:
        """See `Site`."""
        with self._connect() as connection:
            yield _OwnPostgres(connection)

    @contextmanager
    def locked(self, random: Random) -> Iterator[None]:
        """See `Site`."""
        with self._connect() as connection:
            found = connection.execute(
                "select tablename from pg_tables where schemaname = %s and tablename = any (%s)",
                (self.schema, [*_LOCKED, *_LOCKED_APART]),
            )
            table = random.choice(sorted(name for (name,) in found))
            connection.execute("set local lock_timeout = '5s'; set local statement_timeout = 0")
            lock = f"lock table {self.schema}.{table} in access exclusive mode"
            connection.execute(lock.encode())
            yield
            connection.rollback()

    def leaks(self) -> Sequence[str]:
        """See `Site`. Of a client that died the server learns a little later."""
        until_s = time.monotonic() + _GOES_AWAY_S
        while open_ := self._open():
            if time.monotonic() >= until_s:
                return [f"a transaction is still open: {state}, {query}" for state, query in open_]
            time.sleep(0.05)
        return []

    def _open(self) -> Sequence[tuple[Any, ...]]:
        with self._connect(autocommit=True) as connection:
            return connection.execute(
                "select state, query from pg_stat_activity where starts_with(application_name, %s) "
                "and pid <> pg_backend_pid() and state <> 'idle'",
                (NAME,),
            ).fetchall()

    def drop(self) -> None:
        """See `Site`."""
        with self._connect(autocommit=True) as connection:
            connection.execute(f"drop schema if exists {self.schema} cascade".encode())


def end_a_session(server: str, random: Random) -> str | None:
    """End one that is in the middle of something, if there is one; what it was doing."""
    with psycopg.connect(server, autocommit=True) as connection:
        found = connection.execute(
            "select pid, state from pg_stat_activity where starts_with(application_name, %s) "
            "and pid <> pg_backend_pid() and state is not null order by pid",
            (NAME,),
        ).fetchall()
        busy = [each for each in found if each[1] != "idle"]
        if not found:
            return None
        pid, state = random.choice(busy or found)
        ended = connection.execute("select pg_terminate_backend(%s)", (pid,)).fetchall()
        return str(state) if ended == [(True,)] else None


def is_amidst(server: str, number: int) -> bool:
    """Whether the process of this number has a transaction open."""
    with psycopg.connect(server, autocommit=True) as connection:
        found = connection.execute(
            "select 1 from pg_stat_activity where application_name = %s and state <> 'idle'",
            (_name_of(number),),
        )
        return found.fetchone() is not None
