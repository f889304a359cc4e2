"""Publishing inside a transaction of the application's own, on its own psycopg connection."""

from __future__ import annotations

from typing import Any, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from duly.errors import ConfigurationError, TransactionFailed
from duly.sql.postgres import Database
from duly.sql.postgres.errors import broker_error, interrupted, is_conflict
from duly.sql.postgres.guard import is_guarded
from duly.sql.postgres.statements import AsyncStatementRunner, StatementRunner
from duly.sql.postgres.transactions import Say
from duly.sql.steps import Ask, Steps, arun, run

R = TypeVar("R")


def is_open_on(connection: Any, database: Database) -> bool:
    """Whether this is an open connection of the driver, to this server and database."""
    if not isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        return False
    if connection.closed:
        return False
    return connection.info.dbname == database.facts.database


def run_within(connection: Any, steps: Steps[R], database: Database) -> R:
    """Run duly's steps in the caller's open transaction, all of them or none.

    Raises `ConfigurationError` when this is no such connection, no transaction is open, or it
    would not be durable; `TransactionFailed` where it has failed already; and `BrokerError`.
    """
    if isinstance(connection, psycopg.AsyncConnection):
        raise ConfigurationError(
            "within=AsyncConnection: its statements are awaited. Use await app.apublish(..., "
            "within=connection)"
        )
    _require(connection, database)
    try:
        runner = StatementRunner(connection, database.schema)
        return run(runner, _all_or_nothing(steps, database))
    except psycopg.Error as error:
        raise _meaning(error, database) from error


async def arun_within(connection: Any, steps: Steps[R], database: Database) -> R:
    """The same, awaited."""
    if not isinstance(connection, psycopg.AsyncConnection):
        return run_within(connection, steps, database)
    _require(connection, database)
    try:
        runner = AsyncStatementRunner(connection, database.schema)
        return await arun(runner, _all_or_nothing(steps, database))
    except psycopg.Error as error:
        raise _meaning(error, database) from error


def _require(connection: Any, database: Database) -> None:
    if not is_open_on(connection, database):
        raise ConfigurationError(
            f"within={type(connection).__name__}: no open psycopg connection to {database.shown}"
        )
    if is_guarded(connection):
        raise ConfigurationError(
            "within=tx.connection: inside a handler's transaction publish with tx.publish(...)"
        )
    status = connection.info.transaction_status
    if status == TransactionStatus.INERROR:
        raise TransactionFailed(
            "within=connection: a statement in its transaction has failed, and PostgreSQL keeps "
            "nothing of it; roll it back"
        )
    if status == TransactionStatus.IDLE and connection.autocommit:
        raise ConfigurationError(
            "within=connection: it is in autocommit mode and no transaction is open, so there is "
            "nothing to be part of. Use `with connection.transaction():`, or publish without "
            "within=."
        )


def _all_or_nothing(steps: Steps[R], database: Database) -> Steps[R]:
    """Around a savepoint; in a connection that has just begun, its first statement begins."""
    yield from _check_place(database)
    try:
        # Divided by whether this code may write the tables; see `duly.sql.postgres.schema`.
        yield Say(f"savepoint duly_publish; select 1 / {database.fits or 'true'}::int")
    except psycopg.Error as error:
        yield Say("rollback to duly_publish; release duly_publish")
        if refusal := database.left_behind(error):
            raise refusal from None
        raise
    try:
        result = yield from steps
    except Exception:
        yield Say("rollback to duly_publish; release duly_publish")
        raise
    yield Say("release duly_publish")
    return result


def _check_place(database: Database) -> Steps[None]:
    [(synchronous, system, oid)] = yield Ask("current_place")
    if (system, oid) != (database.facts.system, database.facts.database_oid):
        raise ConfigurationError(
            f"within=connection: it is to a database of the same name on another server than "
            f"{database.shown}"
        )
    if synchronous == "off":
        raise ConfigurationError(
            "within=connection: it has synchronous_commit = off, with which a crash of the server "
            "takes back committed messages. Set it on in this transaction."
        )


def _meaning(error: psycopg.Error, database: Database) -> Exception:
    if is_conflict(error):
        return interrupted(error, database.shown)
    return broker_error(error, database.shown)
