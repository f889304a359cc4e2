"""Where the rows on PostgreSQL run: a private, durable server, and a database for each row.

Commits are transactions that wrote something, by the ids that the server gave out. Round trips
are counted by a proxy on the way to the server: how often a client spoke after the server had,
on any connection.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Self

import counting
import psycopg
from psycopg.conninfo import conninfo_to_dict

# The server, and the proxy, are those that the tests start.
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.postgres.proxy import Proxy
from tests.servers.postgres import PostgresServer, binaries

# Kept while the process runs: what counts, and what passes on.
_kept: list[object] = []


class Databases:
    """A database of a row's own, on one server at its defaults."""

    counted: tuple[str, ...] = ("commits", "round trips")
    traced = False

    def __init__(self, within: Path) -> None:
        tempfile.tempdir = os.fspath(within)
        self._server = PostgresServer()
        self._numbers = count(1)

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """As `Places.fresh`: its URL."""
        name = f"row_{next(self._numbers)}"
        with psycopg.connect(self._server.url_of("postgres"), autocommit=True) as connection:
            connection.execute(f"create database {name}".encode())
            # What the row before has left in memory is not to be written while this one runs.
            connection.execute("checkpoint")
            yield self._server.url_of(name)
            connection.execute(f"drop database {name} with (force)".encode())


def counted(url: str) -> str:
    """The same database by way of a proxy; from now on commits and round trips are counted."""
    proxy = Proxy(int(str(conninfo_to_dict(url)["port"])))
    watching = psycopg.connect(url, autocommit=True)
    _kept.extend([proxy, watching])

    def commits() -> int:
        row = watching.execute("select pg_snapshot_xmax(pg_current_snapshot())::text").fetchone()
        assert row is not None
        return int(row[0])

    counting.METERS["commits"] = commits
    counting.METERS["round trips"] = lambda: proxy.turns
    return proxy.url(url)


@contextmanager
def at_a_distance(url: str, delay_s: float) -> Iterator[str]:
    """The same database ``delay_s`` away, one way."""
    with Proxy(int(str(conninfo_to_dict(url)["port"])), delay_s=delay_s) as proxy:
        yield proxy.url(url)


def server_version() -> str:
    """Of the newest that is installed, which is what runs."""
    programs = binaries()
    assert programs is not None
    said = subprocess.run(
        [programs / "postgres", "--version"], capture_output=True, text=True, check=True
    )
    return said.stdout.split()[-1] if "(" not in said.stdout else said.stdout.split()[2]
