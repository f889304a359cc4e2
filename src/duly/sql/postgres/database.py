"""`Database`: one schema of one PostgreSQL database as duly uses it, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import random
from typing import Any, TypeVar

import psycopg

from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable, TransactionFailed
from duly.sql.postgres import schema as tables
from duly.sql.postgres.autocommit import Autocommit
from duly.sql.postgres.connections import OwnSource, source_of
from duly.sql.postgres.errors import broker_error, is_conflict
from duly.sql.postgres.lines import Line, OwnLine
from duly.sql.postgres.pooling import way
from duly.sql.postgres.transactions import Isolation, begin, commit, is_left_behind, roll_back
from duly.sql.steps import Steps

R = TypeVar("R")

# How often a transaction of duly's own is done again after a conflict, and how long it waits
# before, doubled each time: by then whoever stood in the way has committed.
_TRIES = 8
_FIRST_PAUSE_S = 0.01
_OLDEST_VERSION = 140000

_never = threading.Event()


@dataclass(slots=True)
class Facts:
    """What the server says about itself."""

    system: int
    database_oid: int
    database: str
    version: int
    served_by: int


class Database:
    """One schema of one database.

    - ``database``: a URL, a ``psycopg_pool.ConnectionPool``, or a function that returns a new
      `psycopg.Connection`. ``shown``: how it may be named to people.
    - ``identity``: names database and schema, however they are reached; broker and store
      recognise by it that they are one. A promoted standby has that of its primary.
    - ``way``: what stands between here and the server.
    - ``statement_s``: the server's deadline for a statement of duly's own.

    Raises `BrokerUnavailable`, `BrokerUnusable`, `ConfigurationError` (no such URL).
    """

    def __init__(self, database: Any, *, schema: str = "duly", statement_s: float = 30.0) -> None:
        self.source, self.shown = source_of(database)
        self.schema = schema
        self.named = database
        self._statement_s = statement_s
        # SQL that is true while this code may write; see `duly.sql.postgres.schema`.
        self.fits: str | None = None
        self._autocommit: Autocommit | None = None
        try:
            facts = self._facts()
        except BaseException:
            self.source.close()
            raise
        self.facts = facts
        self.identity = f"postgresql:{facts.system}/{facts.database_oid}/{schema}"

    def ensure(self, part: str, dialect: str) -> None:
        """Create what is missing of one part (``broker``, ``store``), or bring up what is older: by
        the blocks of ``sql/<dialect>.sql`` and those of its migrations.

        Who finds it there in this version needs no right to create anything. Raises
        `BrokerUnusable` where newer code has changed it beyond what this code may use.
        """
        there = self.read(lambda: tables.found(part))
        if not tables.require(there, self.shown):
            self.write(
                lambda: tables.bring_up(part, dialect, self.schema, self.identity, self.shown)
            )
        self.fits = tables.fits(self.schema)
        if self._autocommit is None and isinstance(self.source, OwnSource) and not self.way.pooled:
            self._autocommit = Autocommit(
                self.source,
                self.schema,
                self.shown,
                statement_s=self._statement_s,
                fits=self.fits,
            )

    def left_behind(self, error: psycopg.Error) -> BrokerError | None:
        """What it means that a transaction did not begin with `fits`; None: something else."""
        if not is_left_behind(error):
            return None
        try:
            self.read(lambda: tables.left_behind(self.shown))
        except BrokerError as refusal:
            return refusal
        return None

    # --- transactions of duly's own

    def write(
        self,
        make_steps: Callable[[], Steps[R]],
        *,
        durable: bool = True,
        isolation: Isolation = "read committed",
    ) -> R:
        """Run steps in a transaction, stored on return.

        ``make_steps`` is called again when the transaction has to be done again: after a conflict
        with another, and where a connection was lost before COMMIT was sent. Raises
        `BrokerUnavailable` or `BrokerUnusable` when nothing was changed, `CommitUnknown`, or what
        the steps raise (rolled back).
        """
        return _persistently(lambda: self._write(make_steps, durable, isolation))

    def write_at_once(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps whose first statement for many rows makes the whole change and is stored when
        it has been answered: one turn of the connection, where this database has sessions for it.

        Called again and raises as `write`, save that `CommitUnknown` is also what a connection
        means that was lost with the statement under way.
        """
        autocommit = self._autocommit
        if autocommit is None:
            return self.write(make_steps)
        return _persistently(lambda: self._write_at_once(autocommit, make_steps))

    def _write_at_once(self, autocommit: Autocommit, make_steps: Callable[[], Steps[R]]) -> R:
        try:
            return autocommit.run(make_steps())
        except psycopg.Error as error:
            if refusal := self.left_behind(error):
                raise refusal from None
            meaning = broker_error(error, self.shown)
            if is_conflict(error):
                raise _Again(meaning) from error
            raise meaning from error

    def _write(self, make_steps: Callable[[], Steps[R]], durable: bool, isolation: Isolation) -> R:
        with self.line() as line:
            try:
                line.run(self._begin(durable, isolation))
                result = line.run(make_steps())
            except psycopg.Error as error:
                meaning = broker_error(error, self.shown)
                # A connection that was lost before COMMIT was sent: the next one is a new one.
                if is_conflict(error) or line.connection.closed:
                    raise _Again(meaning) from error
                raise meaning from error
            try:
                line.run(commit(line.connection, None, self.shown))
            except TransactionFailed as failed:
                raise _Again(BrokerUnavailable(str(failed))) from failed.__cause__
            return result

    def _begin(self, durable: bool, isolation: Isolation) -> Steps[None]:
        try:
            yield from begin(
                None,
                isolation=isolation,
                durable=durable,
                statement_s=self._statement_s,
                idle_s=self._statement_s,
                fits=self.fits,
            )
        except psycopg.Error as error:
            if refusal := self.left_behind(error):
                raise refusal from None
            raise

    def read(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps that only look, each statement by itself. Raises `BrokerError`."""
        with self.line() as line:
            try:
                return line.run(make_steps())
            except psycopg.Error as error:
                raise broker_error(error, self.shown) from error

    @contextmanager
    def line(self) -> Iterator[Line]:
        """A connection for a while; what is open on it at the end is rolled back."""
        with self.connection() as connection:
            yield OwnLine(connection, self.schema)

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """The same, bare. In doubt after an interruption it is not used again."""
        connection = self.source.take()
        in_doubt = True
        try:
            yield connection
            in_doubt = False
        except Exception:
            in_doubt = False
            raise
        finally:
            usable = not in_doubt and OwnLine(connection, self.schema).run(roll_back(connection))
            self.source.give_back(connection, in_doubt=not usable)

    def close(self) -> None:
        """Close the connections; a pool of the application's stays open."""
        if self._autocommit is not None:
            self._autocommit.close()
        self.source.close()

    def _facts(self) -> Facts:
        with self.connection() as connection:
            try:
                [row] = connection.execute(_FACTS).fetchall()
            except psycopg.Error as error:
                raise broker_error(error, self.shown) from error
            facts = Facts(*row)
            self.way = way(self.source.said, connection, facts.served_by)
            self.source.prepares = self.way.prepares
        if facts.version < _OLDEST_VERSION:
            raise BrokerUnusable(
                f"{self.shown}: PostgreSQL {facts.version // 10000}; duly needs 14 or newer"
            )
        return facts


_FACTS = """
select s.system_identifier, d.oid::bigint, d.datname::text,
    current_setting('server_version_num')::int, pg_backend_pid()
from pg_control_system() s, pg_database d where d.datname = current_database()
"""


def _persistently(call: Callable[[], R]) -> R:
    """Call again after whatever may go well then."""
    for attempt in range(_TRIES):
        try:
            return call()
        except _Again as again:
            if attempt == _TRIES - 1:
                raise again.meaning from again.__cause__
            _never.wait(_FIRST_PAUSE_S * 2**attempt * (0.5 + random() / 2))
    raise AssertionError("unreachable")


class _Again(Exception):
    """Nothing was changed; done again it may go well. ``meaning``: if it does not."""

    def __init__(self, meaning: BrokerError) -> None:
        super().__init__()
        self.meaning = meaning
