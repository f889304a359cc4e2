"""The server that a process works on, told from every other that it might be led to instead.

A connection is made anew whenever one was lost, and the name it goes by may lead elsewhere by
then. What a new connection leads to is asked once, when it is made:

- *Another cluster*, by its system identifier: a dump restored at the old address, whose
  transaction ids begin anew. A process that went on there would tick by the old snapshots.
- *A standby*: it only reads, and shows transactions in another order.
- *The primary of before a failover*, started again without following the new one. It has the
  same system identifier and takes writes. A promotion begins a new *timeline*, which every server
  names in the names of its WAL files: who is on an earlier one than this process has seen is such
  a primary.

That needs somebody who has seen both. So where a URL names several servers, the others are asked
too, when a server is met that this process does not know: the first, and every one that was
started since (its processes' start time is another). Beyond that nobody can tell two histories
apart: a process that was started later, and reaches nothing but the old primary, works the old log.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import tuple_row

from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable
from duly.sql.postgres.errors import broker_error, code, first_line

logger = logging.getLogger("duly.postgres")

READS_ONLY = (
    "this server only reads (a standby). Name the primary, or several hosts with "
    "target_session_attrs=read-write"
)

TIMELINE = "('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::bigint"
"""SQL for the timeline of a primary; an error on a standby, and where a service has no WAL to
show."""

_SYSTEM = "select s.system_identifier, pg_is_in_recovery(), pg_postmaster_start_time()::text"
_ASKED = f"{_SYSTEM}, case when pg_is_in_recovery() then 0 else {TIMELINE} end"
_FROM = "from pg_control_system() s"


class Met(NamedTuple):
    """What a server says of itself. ``timeline``: 0 where it does not tell."""

    system: int
    recovering: bool
    started: str
    timeline: int


class _Furthest:
    """The latest timeline that this process has seen of each cluster, whoever asked: there is one
    history of it, for broker, store and every app.
    """

    def __init__(self) -> None:
        self._timelines: dict[int, int] = {}
        self._mutex = threading.Lock()

    def seen(self, met: Met) -> int:
        """Remember; returns the latest."""
        with self._mutex:
            latest = max(met.timeline, self._timelines.get(met.system, 0))
            self._timelines[met.system] = latest
            return latest


_furthest = _Furthest()


class Primary:
    """What new connections are compared with; used from any thread.

    ``others``: what the driver needs to reach each server that a URL names, where it names
    several. Raises, wherever it is asked, `BrokerUnavailable` for a server that must not be worked
    now, and `BrokerUnusable` for one of another cluster.
    """

    def __init__(self, shown: str, others: Sequence[Mapping[str, Any]] = ()) -> None:
        self._shown = shown
        self._others = others
        self._system: int | None = None
        self._known: set[str] = set()

    def greet(self, connection: psycopg.Connection[Any]) -> None:
        """Ask what a new connection leads to, and refuse it where it must not be used."""
        try:
            met = _meet(connection)
        except psycopg.Error as error:
            raise self._unidentified(error) from error
        self._judge(met)
        if met.started not in self._known:
            self._ask_the_others(met)
            self._known.add(met.started)

    async def agreet(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """The same on a loop, which is not kept waiting for other servers."""
        try:
            met = await _ameet(connection)
        except psycopg.Error as error:
            raise self._unidentified(error) from error
        self._judge(met)

    def _unidentified(self, error: psycopg.Error) -> BrokerError:
        if code(error) == "42501":
            return BrokerUnusable(
                f"{self._shown}: {first_line(error)}. duly recognises a database by its system "
                "identifier: grant execute on function pg_control_system() to this role"
            )
        return broker_error(error, self._shown)

    def _judge(self, met: Met) -> None:
        if self._system is None:
            self._system = met.system
        if met.system != self._system:
            raise BrokerUnusable(
                f"{self._shown}: this leads to another PostgreSQL cluster now (system identifier "
                f"{met.system}, until now {self._system}): was a dump restored at this address? "
                "Start the process again; what it says then is what to do"
            )
        if met.recovering:
            raise BrokerUnavailable(f"{self._shown}: {READS_ONLY}")
        latest = _furthest.seen(met)
        if met.timeline and met.timeline < latest:
            raise BrokerUnavailable(_old(self._shown, met.timeline, latest))

    def _ask_the_others(self, met: Met) -> None:
        for parameters in self._others:
            other = _reached(parameters)
            if other is None or other.system != met.system or other.recovering:
                continue
            name = f"{parameters.get('host')}:{parameters.get('port') or 5432}"
            if other.timeline > met.timeline:
                _furthest.seen(other)
                raise BrokerUnavailable(_old(self._shown, met.timeline, other.timeline, name))
            if other.timeline < met.timeline:
                logger.error(
                    "%s: %s can be written too, on timeline %s, and this server is on %s: it was "
                    "the primary before a failover. Stop it before anybody works the old log there",
                    self._shown, name, other.timeline, met.timeline,
                )  # fmt: skip
            elif other.started != met.started:
                raise BrokerUnavailable(
                    f"{self._shown}: two servers of this cluster can be written, both on timeline "
                    f"{met.timeline}; the other is {name}. Nobody can tell which of them is to go "
                    "on: stop the wrong one"
                )


def _old(shown: str, timeline: int, latest: int, name: str = "") -> str:
    where = f" at {name}" if name else ""
    return (
        f"{shown}: this server was the primary before a failover and can be written again: it is "
        f"on timeline {timeline}, and the cluster has gone on{where} on timeline {latest}. Nothing "
        "was changed. Stop it, and let it follow the new primary (pg_rewind, or a new base backup)"
    )


def _reached(parameters: Mapping[str, Any]) -> Met | None:
    """What another server says; None: nobody answers, or not to this role."""
    with contextlib.suppress(psycopg.Error):
        connection = psycopg.connect(**parameters, autocommit=True, row_factory=tuple_row)
        with contextlib.closing(connection):
            return _meet(connection)
    return None


def _meet(connection: psycopg.Connection[Any]) -> Met:
    cursor = connection.cursor(row_factory=tuple_row)
    try:
        [row] = cursor.execute(f"{_ASKED} {_FROM}".encode()).fetchall()
    except _TELLS_NO_TIMELINE:
        [row] = cursor.execute(f"{_SYSTEM}, 0 {_FROM}".encode()).fetchall()
    return Met(*row)


async def _ameet(connection: psycopg.AsyncConnection[Any]) -> Met:
    cursor = connection.cursor(row_factory=tuple_row)
    try:
        await cursor.execute(f"{_ASKED} {_FROM}".encode())
    except _TELLS_NO_TIMELINE:
        await cursor.execute(f"{_SYSTEM}, 0 {_FROM}".encode())
    [row] = await cursor.fetchall()
    return Met(*row)


# A service that hides its WAL, or keeps it from this role.
_TELLS_NO_TIMELINE = (
    psycopg.errors.FeatureNotSupported,
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.UndefinedFunction,
)
