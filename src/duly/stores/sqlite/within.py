"""Publishing inside a transaction of the application's own, on its own connection."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import Any, TypeVar

from duly.errors import BrokerUnavailable, ConfigurationError
from duly.sql.sqlite.driver import StatementRunner, broker_error, error_code
from duly.sql.sqlite.guard import GuardedConnection
from duly.sql.sqlite.schema import Tables
from duly.sql.sqlite.wal import SAFE_VERSION
from duly.sql.steps import Steps

R = TypeVar("R")

log = logging.getLogger("duly.sqlite")

_FULL = 2


def is_open_on(connection: Any, path: Path) -> bool:
    """Whether this is a connection of the driver whose main database is the file."""
    if not isinstance(connection, sqlite3.Connection):
        return False
    try:
        rows = StatementRunner(connection).execute("pragma database_list")
    except sqlite3.Error:
        return False  # closed, or of another thread: it cannot be published through
    for _, name, file in rows:
        if os.fsdecode(name) == "main":
            return bool(file) and Path(os.fsdecode(file)).samefile(path)
    return False


def run_within(connection: sqlite3.Connection, steps: Steps[R], path: Path, tables: Tables) -> R:
    """Run duly's steps in the caller's open transaction, all of them or none.

    Whatever the caller set on the connection stays as it is. Raises `ConfigurationError` when
    no transaction is open or it would not be durable, and `BrokerError`.
    """
    if isinstance(connection, GuardedConnection):
        raise ConfigurationError(
            "within=tx.connection: inside a handler's transaction publish with tx.publish(...)"
        )
    text_factory = connection.text_factory
    connection.text_factory = str
    try:
        runner = tables.runner(connection)
        _require_durable(runner, path)
        _require_transaction(connection, runner)
        tables.check(runner)
        return _all_or_nothing(connection, runner, steps)
    except sqlite3.Error as error:
        if error_code(error) == sqlite3.SQLITE_READONLY and os.access(path, os.W_OK):
            raise ConfigurationError(
                "within=connection: it was opened to read only (mode=ro, or PRAGMA query_only), so "
                f"nothing can be published in its transaction ({error}). Use one that may write."
            ) from error
        if error_code(error) == sqlite3.SQLITE_BUSY:
            raise BrokerUnavailable(
                f"{path}: {error}; nothing was published. Another writer holds the file: begin "
                "your transaction with BEGIN IMMEDIATE, on a connection with a timeout."
            ) from error
        raise broker_error(error, path) from error
    finally:
        connection.text_factory = text_factory


def _require_durable(runner: StatementRunner, path: Path) -> None:
    [(synchronous,)] = runner.execute("pragma synchronous")
    if synchronous < _FULL:
        raise ConfigurationError(
            f"{path}: this connection has PRAGMA synchronous = {synchronous}, with which a power "
            "loss takes back committed messages. Set PRAGMA synchronous = FULL on it."
        )
    if sqlite3.sqlite_version_info < SAFE_VERSION:
        _warn_of_checkpoints(runner, path)


def _warn_of_checkpoints(runner: StatementRunner, path: Path) -> None:
    [(pages,)] = runner.execute("pragma wal_autocheckpoint")
    if pages and path not in _warned:
        _warned.add(path)
        log.warning(
            "%s: SQLite %s can corrupt a database that two connections checkpoint at the same "
            "moment (sqlite.org/wal.html#walresetbug). duly does it from one place; set PRAGMA "
            "wal_autocheckpoint = 0 on the application's connections, or use SQLite 3.51.3.",
            path,
            sqlite3.sqlite_version,
        )


_warned: set[Path] = set()


def _require_transaction(connection: sqlite3.Connection, runner: StatementRunner) -> None:
    if connection.in_transaction:
        return
    if connection.isolation_level is None or getattr(connection, "autocommit", -1) is True:
        raise ConfigurationError(
            "within=connection: it is in autocommit mode and no transaction is open, so there is "
            "nothing to be part of. Execute BEGIN IMMEDIATE first, or publish without within=."
        )
    # As the driver itself would before the first statement that writes.
    runner.execute(f"begin {connection.isolation_level}")


def _all_or_nothing(connection: sqlite3.Connection, runner: StatementRunner, steps: Steps[R]) -> R:
    runner.execute("savepoint duly_publish")
    try:
        result = runner.run(steps)
    except BaseException:
        if connection.in_transaction:  # otherwise SQLite has rolled back all of it
            runner.execute("rollback to duly_publish")
            runner.execute("release duly_publish")
        raise
    runner.execute("release duly_publish")
    return result
