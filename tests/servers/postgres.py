"""PostgreSQL for tests: one server a session, or one of a test's own that it may kill.

``DULY_TEST_POSTGRES=URL`` names another for the first; its user must be allowed to create
schemas, and for some tests databases and roles.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import psycopg
import pytest
from psycopg import sql

from duly.testing.chaos.processes import free_port
from duly.testing.conformance.plugin import in_ci
from duly.testing.postgres import (
    OTHER,
    NoServer,
    PrivateServer,
    binaries,
    children_of,
    run_as,
)
from tests.waiting import eventually

__all__ = [
    "OTHER",
    "PostgresServer",
    "Schema",
    "binaries",
    "children_of",
    "free_port",
    "missing",
    "named_after",
    "run_as",
    "schema_named",
    "shared_url",
]

# What costs the most time in tests that lose nothing with the machine.
_NOT_DURABLE = ("fsync=off", "full_page_writes=off")


def missing(reason: str) -> NoReturn:
    """Skip on a laptop, fail in CI: there what is not tested is not promised."""
    if in_ci():
        pytest.fail(f"{reason}, and CI is set: make servers", pytrace=False)
    pytest.skip(f"{reason}. Install it with: make servers (or set {OTHER}=URL)")


class PostgresServer(PrivateServer):
    """A server of the tests' own, from `start` until it is closed; skips where there is none.

    ``settings`` are those of postgresql.conf; ``durable`` keeps fsync on, as for whatever is
    measured or killed.
    """

    def __init__(self, *, durable: bool = True, settings: Sequence[str] = ()) -> None:
        try:
            super().__init__([*settings, *(() if durable else _NOT_DURABLE)])
        except NoServer as error:
            missing(str(error))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def restart(self) -> Self:
        """Shut down and start."""
        self.stop()
        return self.start()

    @contextlib.contextmanager
    def standby(self, *, port: int | None = None) -> Iterator[PostgresServer]:
        """A server that follows this one, having caught up with it; see `promote`. ``port``:
        where it listens, unless anywhere. Skips where this server came without the program that
        copies it.
        """
        if not os.access(copies := self.programs / "pg_basebackup", os.X_OK):
            pytest.skip(f"there is no {copies}")
        follower = PostgresServer(durable=False, settings=self.settings)
        follower.port = port or follower.port
        shutil.rmtree(follower.data)
        url = self.url_of("postgres")
        subprocess.run(
            [
                *(copies, "-D", follower.data, "-d", url),
                *("-R", "-X", "stream", "-c", "fast", "--no-sync"),
            ],
            check=True,
            timeout=120,
            cwd="/",
            **run_as(),
        )
        with follower:
            eventually(lambda: self.is_level_with(follower), "the standby has caught up")
            yield follower

    def is_level_with(self, follower: PostgresServer) -> bool:
        """Whether a standby has seen all that is committed here."""
        with (
            psycopg.connect(self.url, autocommit=True) as here,
            psycopg.connect(follower.url, autocommit=True) as there,
        ):
            [(end,)] = here.execute("select pg_current_wal_lsn()").fetchall()
            behind = "select pg_last_wal_replay_lsn() >= %s::pg_lsn"
            return bool(there.execute(behind, (end,)).fetchall()[0][0])

    def promote(self) -> None:
        """Make a standby a primary."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("select pg_promote()")

    def copy_to(self, other: PostgresServer) -> None:
        """Dump this database and restore it into another server's."""
        dump = subprocess.run(
            [self.programs / "pg_dump", self.url], check=True, capture_output=True, timeout=120
        )
        subprocess.run(
            [self.programs / "psql", "-q", "-v", "ON_ERROR_STOP=1", other.url],
            input=dump.stdout,
            check=True,
            capture_output=True,
            timeout=120,
        )


@functools.cache
def shared_url() -> str:
    """The database that tests share, each in a schema of its own; skips where there is none."""
    if named := os.environ.get(OTHER):
        return named
    server = PostgresServer(durable=False).start()
    atexit.register(server.close)
    return server.url


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema of one test's own, for its tables; duly's stand in another beside it.

    ``url`` finds tables there without naming it. ``duly`` is the name of the schema for duly.
    """

    database: str
    name: str

    @property
    def duly(self) -> str:
        """The schema for duly's own tables."""
        return f"{self.name}_duly"

    @property
    def url(self) -> str:
        """The database, for duly and for the test's own connections."""
        mark = "&" if "?" in self.database else "?"
        return f"{self.database}{mark}options=-csearch_path%3D{self.name}"

    def connect(self, **more: Any) -> psycopg.Connection[Any]:
        """A connection of the test's own."""
        return psycopg.connect(self.url, **more)

    def create(self) -> Schema:
        """Make it, unless it is there."""
        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute(
                sql.SQL("create schema if not exists {}").format(sql.Identifier(self.name))
            )
        return self

    def drop(self) -> None:
        """Remove it and duly's beside it. What still holds a lock there fails the test."""
        with psycopg.connect(self.database, autocommit=True) as connection:
            connection.execute("set lock_timeout = '10s'")
            for name in (self.name, self.duly):
                connection.execute(
                    sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(name))
                )


def schema_named(name: str) -> Schema:
    """A schema in the shared database, new or found again; at most 40 of a-z, 0-9 and ``_``."""
    schema = Schema(shared_url(), name)
    if OTHER in os.environ:
        atexit.register(schema.drop)
    return schema.create()


def named_after(test: str) -> str:
    """The name of a test as that of a schema; what is cut off is told apart by a checksum."""
    name = re.sub(r"[^a-z0-9_]+", "_", test.lower())
    return f"{name[:30]}_{zlib.crc32(test.encode()):08x}"
