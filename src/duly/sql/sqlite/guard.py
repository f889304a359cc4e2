"""The connection a handler gets: everything but ending the transaction, which is duly's.

``conn.commit()``, ``with conn:`` and ``executescript`` would each end it silently and split the
effects from the memory of the message. An authorizer denies what reaches SQLite; the methods in
front of it say what to do instead.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from duly.errors import ConfigurationError, TransactionLost
from duly.sql.sqlite import driver
from duly.sql.sqlite.schema import Tables
from duly.sql.steps import Steps

R = TypeVar("R")

_WRITES = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
# SQLite looks for a table among the temporary ones first: one of duly's name would hide duly's.
_ON_TABLES = _WRITES | {
    *(sqlite3.SQLITE_DROP_TABLE, sqlite3.SQLITE_DROP_TRIGGER, sqlite3.SQLITE_DROP_INDEX),
    *(sqlite3.SQLITE_DROP_TEMP_TABLE, sqlite3.SQLITE_CREATE_TEMP_TABLE),
    sqlite3.SQLITE_CREATE_TEMP_VIEW,
}
# Here the table comes second.
_ON_TABLES_BY_VALUE = frozenset(
    {
        *(sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_CREATE_INDEX),
        *(sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_CREATE_TEMP_TRIGGER),
    }
)
# Pragmas that only look. Others change how the transaction is kept, or what is.
_PRAGMAS = frozenset(
    {
        *("table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo"),
        *("foreign_key_list", "foreign_key_check", "defer_foreign_keys", "database_list"),
        *("collation_list", "function_list", "compile_options", "integrity_check", "quick_check"),
        *("data_version", "page_count", "page_size", "freelist_count"),
    }
)
# These may be asked but not set.
_READABLE = frozenset(
    {
        *("user_version", "application_id", "encoding", "foreign_keys", "recursive_triggers"),
        *("journal_mode", "synchronous", "busy_timeout", "cache_size", "max_page_count"),
    }
)

_INSTEAD = (
    "This transaction is duly's: it commits your rows, the memory of the message and what you "
    "publish together, once the handler has returned. "
)
_ENDS = _INSTEAD + "Remove the call; to undo everything, let an exception leave the handler."
_LOST = (
    "the transaction ended before its commit: a statement inside it failed (disk full, I/O error, "
    "interrupted) and SQLite rolled everything back. Nothing of it was kept; let errors of "
    "statements leave the handler. Or it is over, and this connection was kept beyond it: use it "
    "within the handler or block only."
)


def _own_table(table: str) -> str:
    return f"{table} is duly's own table. Read it, but let only duly change it."


def _denied(what: str) -> str:
    return f"The handler called {what}. {_ENDS}"


def _refuse_setting(name: str) -> Callable[[Any, Any], NoReturn]:
    def refuse(_: Any, __: Any) -> NoReturn:
        raise ConfigurationError(_denied(f"connection.{name} = ..."))

    return refuse


# What the driver begins a transaction for when none is open (isolation_level is IMMEDIATE), and
# what changes nothing. Written so at its start it needs no check before it runs, see
# `OpenConnection`.
_BEGINS_OR_READS = re.compile(r"\s*(?:insert|update|delete|replace|select|values)\b", re.IGNORECASE)


class GuardedCursor(sqlite3.Cursor):
    """A cursor that does not write outside the transaction."""

    def execute(self, sql: str, parameters: Any = (), /) -> GuardedCursor:
        """As `sqlite3.Cursor.execute`."""
        # After a rollback by SQLite itself this statement would commit by itself.
        if not self.connection.in_transaction:
            raise TransactionLost(_LOST)
        try:
            sqlite3.Cursor.execute(self, sql, parameters)
        except sqlite3.DatabaseError as error:
            _explain(error, self.connection)
            raise
        return self

    def executemany(self, sql: str, seq_of_parameters: Any, /) -> GuardedCursor:
        """As `sqlite3.Cursor.executemany`."""
        if not self.connection.in_transaction:
            raise TransactionLost(_LOST)
        try:
            rows = _while_open(self.connection, seq_of_parameters)
            sqlite3.Cursor.executemany(self, sql, rows)
        except sqlite3.DatabaseError as error:
            _explain(error, self.connection)
            raise
        return self

    def executescript(self, sql_script: str, /) -> NoReturn:  # noqa: ARG002 - the driver's shape
        """Refused: it would commit."""
        raise ConfigurationError(_denied("executescript(), which begins by committing"))


class GuardedConnection(sqlite3.Connection):
    """The driver's own connection, inside a transaction that only duly ends."""

    # No dictionary: finding `execute` costs each statement less without.
    __slots__ = ("checks_all", "denied", "interruptible", "own")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Whether the statements are duly's own, as they are until a `Guard` has it; what the
        # authorizer refused, whether a handler set something that interrupts, and whether every
        # statement is to be checked from now on.
        self.own = True
        self.denied: str | None = None
        self.interruptible = False
        self.checks_all = False
        super().__init__(*args, **kwargs)

    def __call__(self, sql: str, /) -> Any:
        """Prepare a statement: the driver asks so for what is not in its cache, on any cursor. Also
        on one that `execute` returned, which asks nobody whether the transaction is still open.
        """
        if not (self.own or self.in_transaction):
            raise TransactionLost(_LOST)
        try:
            return sqlite3.Connection.__call__(self, sql)
        except sqlite3.DatabaseError as error:
            _explain(error, self)
            raise

    def set_progress_handler(self, *args: Any, **kwargs: Any) -> None:
        """As `sqlite3.Connection.set_progress_handler`, for the statements of the handler."""
        self.interruptible = True
        sqlite3.Connection.set_progress_handler(self, *args, **kwargs)

    def cursor(self, factory: Any = GuardedCursor) -> Any:
        """As `sqlite3.Connection.cursor`."""
        return sqlite3.Connection.cursor(self, factory)

    # The driver's own return a cursor of the driver's, which checks nothing.

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        """As `sqlite3.Connection.execute`."""
        return self.cursor().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any, /) -> Any:
        """As `sqlite3.Connection.executemany`."""
        return self.cursor().executemany(sql, parameters)

    def blobopen(
        self, table: str, column: str, row: int, /, *, readonly: bool = False, name: str = "main"
    ) -> sqlite3.Blob:
        """As `sqlite3.Connection.blobopen`."""
        # What is written to a blob is no statement: without a transaction it would commit by
        # itself, and no authorizer is asked.
        if not self.in_transaction:
            raise TransactionLost(_LOST)
        if not readonly and table.lower().startswith("duly_"):
            raise ConfigurationError(_own_table(table))
        return sqlite3.Connection.blobopen(self, table, column, row, readonly=readonly, name=name)

    def commit(self) -> NoReturn:
        """Refused: duly commits."""
        raise ConfigurationError(_denied("connection.commit()"))

    def rollback(self) -> NoReturn:
        """Refused: to undo, raise."""
        raise ConfigurationError(_denied("connection.rollback()"))

    def __enter__(self) -> NoReturn:
        raise ConfigurationError(_denied("'with connection:', which commits at its end"))

    def __exit__(self, *_: object) -> Literal[False]:
        return False

    def executescript(self, sql_script: str, /) -> NoReturn:  # noqa: ARG002 - the driver's shape
        """Refused: it would commit."""
        raise ConfigurationError(_denied("executescript(), which begins by committing"))

    def close(self) -> NoReturn:
        """Refused: the connection is duly's."""
        raise ConfigurationError(_denied("connection.close()"))

    def deserialize(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: it would replace the database."""
        raise ConfigurationError(_denied("connection.deserialize()"))

    def set_authorizer(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: duly's own is what keeps the transaction whole."""
        raise ConfigurationError(_denied("connection.set_authorizer()"))

    # Setting either could commit: isolation_level = None does.
    isolation_level = property(lambda _: "IMMEDIATE", _refuse_setting("isolation_level"))  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]
    autocommit = property(lambda _: -1, _refuse_setting("autocommit"))


class OpenConnection(GuardedConnection):
    """A guarded connection while its transaction is open: `execute` is the driver's own again.

    Checking each statement before it runs costs a twentieth of a handler that inserts a row. Most
    need none: when SQLite has rolled everything back by itself, the driver begins a transaction
    for them, which lacks duly's mark and so is not committed. What the driver does not know for
    such a statement (one behind a WITH, a CREATE, a comment) makes the connection check again,
    all of them, from the moment on that one is prepared.
    """

    __slots__ = ()

    execute = sqlite3.Connection.execute

    def __call__(self, sql: str, /) -> Any:
        """Prepare a statement, see `GuardedConnection`."""
        if not (self.own or _BEGINS_OR_READS.match(sql)):
            _check_all(self)
        return GuardedConnection.__call__(self, sql)


def _check_all(connection: GuardedConnection) -> None:
    connection.checks_all = True
    connection.__class__ = GuardedConnection


class Guard:
    """One guarded connection from duly's side; used by one thread at a time."""

    __slots__ = (
        "_commit",
        "_mark",
        "_path",
        "_runner",
        "_savepoints_prepared",
        "_seen",
        "_tables",
        "connection",
        "savepoint",
    )

    def __init__(self, connection: GuardedConnection, path: Path, tables: Tables) -> None:
        self.connection = connection
        self._tables = tables
        self._path = path
        self._mark: int | None = None
        connection.own = True
        # Who is told of a handler's savepoints, and whether statements about some are prepared.
        self._seen: Callable[[], None] | None = None
        self._savepoints_prepared = False
        # Not to be guessed: a handler's statement of the same text would come prepared from
        # the driver's cache, past the authorizer.
        self.savepoint = f"duly_{secrets.token_hex(8)}"
        self._commit = f"commit /* {secrets.token_hex(8)} */"
        # In memory: what marks a transaction is to die with it and costs no page of the file.
        cursor = sqlite3.Cursor(connection)
        cursor.execute("pragma temp_store = memory")
        cursor.execute("create temp table duly_mark (mark integer primary key)")
        self._runner = tables.runner(connection)
        sqlite3.Connection.set_authorizer(connection, self._authorize)
        connection.own = False

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open; whether it is the one begun, `check` tells."""
        return self.connection.in_transaction

    def begin(self, mark: int | None) -> None:
        """Begin a transaction, which ``mark`` tells from every other.

        None: the caller makes sure itself, before `commit`, that it is still the same one.
        Raises `sqlite3.Error`, and `BrokerUnusable` where newer code has left this one behind.
        """
        self._mark = mark
        connection = self.connection
        connection.denied = None
        connection.own = True
        try:
            self._runner.execute("begin immediate")
            if mark is not None:
                self._runner.execute("insert into temp.duly_mark values (?)", (mark,))
            self._tables.check(self._runner)
        finally:
            connection.own = False
        if not connection.checks_all:
            connection.__class__ = OpenConnection

    def run(self, steps: Steps[R]) -> R:
        """Run duly's own steps in the transaction, whatever the handler set on the connection.

        Raises `TransactionLost` where none is open, and `sqlite3.Error`.
        """
        connection = self.connection
        if not connection.in_transaction:
            raise TransactionLost(_LOST)
        text_factory = connection.text_factory
        connection.text_factory = str
        self._take_over()
        try:
            return self._runner.run(steps)
        finally:
            connection.own = False
            connection.text_factory = text_factory

    def execute(self, sql: str) -> None:
        """Run one statement of duly's. Raises `TransactionLost` where no transaction is open."""
        if not self.connection.in_transaction:
            raise TransactionLost(_LOST)
        self._take_over()
        try:
            self._runner.execute(sql)
        finally:
            self.connection.own = False

    def commit(self) -> None:
        """Commit the transaction that `begin` began.

        Raises `TransactionLost` where it is another or none, `sqlite3.Error` when it certainly
        did not commit, and `CommitUnknown`.
        """
        if not self.connection.in_transaction:
            raise TransactionLost(_LOST)
        self._take_over()
        try:
            if self._mark is not None:
                found = self._runner.execute("delete from temp.duly_mark returning mark")
                if found != [(self._mark,)]:
                    raise TransactionLost(_LOST)
            driver.commit(self.connection, self._path, lambda: self._runner.execute(self._commit))
        finally:
            self._leave()

    def roll_back(self) -> bool:
        """Roll back whatever is open; False: the connection is in doubt, discard it."""
        self._take_over()
        try:
            return driver.roll_back(self.connection)
        finally:
            self._leave()

    def watch_savepoints(self, seen: Callable[[], None]) -> None:
        """Call ``seen`` when a handler sets a savepoint, releases one or goes back to one; until
        `reset`.
        """
        self._seen = seen
        if self._savepoints_prepared:
            # What is prepared passes the authorizer. When one is set, SQLite prepares everything
            # anew.
            self._savepoints_prepared = False
            sqlite3.Connection.set_authorizer(self.connection, self._authorize)

    def reset(self) -> None:
        """Take back what a handler set on the connection, for the next one."""
        self._seen = None
        connection = self.connection
        connection.row_factory = None
        connection.text_factory = str

    def close(self) -> None:
        """Close the connection; an open transaction is rolled back."""
        self.connection.own = True
        # Not left to the close: where somebody holds a statement, as a traceback does, SQLite puts
        # that off, and the file stays locked.
        driver.roll_back(self.connection)
        sqlite3.Connection.close(self.connection)

    def _leave(self) -> None:
        """The transaction is over: what was kept of its connection is to begin no other."""
        self.connection.own = False
        self.connection.__class__ = GuardedConnection

    def _take_over(self) -> None:
        """From here on the statements are duly's, which nothing that a handler set interrupts."""
        self.connection.own = True
        if self.connection.interruptible:
            self.connection.interruptible = False
            sqlite3.Connection.set_progress_handler(self.connection, None, 0)

    def _authorize(
        self, action: int, what: str | None, value: str | None, _db: str | None, _by: str | None
    ) -> int:
        """SQLite asks this once when a statement is prepared, not each time it runs."""
        if self.connection.own:
            return sqlite3.SQLITE_OK
        reason = _objection(action, what or "", value)
        if reason is None:
            if action == sqlite3.SQLITE_SAVEPOINT:
                self._savepoints_prepared = True
                if self._seen is not None:
                    self._seen()
            return sqlite3.SQLITE_OK
        self.connection.denied = reason
        return sqlite3.SQLITE_DENY


def _while_open(connection: Any, rows: Iterable[Any]) -> Iterable[Any]:
    """The parameters of many statements, as long as the transaction is open.

    Code of the handler runs between the statements where a generator makes their parameters. What
    is lost there must not be followed by statements that commit by themselves.
    """
    return rows if rows.__class__ in (list, tuple) else _checked_each(connection, rows)


def _checked_each(connection: Any, rows: Iterable[Any]) -> Iterator[Any]:
    for row in rows:
        if not connection.in_transaction:
            raise TransactionLost(_LOST)
        yield row


def _objection(action: int, what: str, value: str | None) -> str | None:
    """Why a handler may not do this; None: it may."""
    if action == sqlite3.SQLITE_TRANSACTION and what != "BEGIN":
        return _denied(what)
    if action == sqlite3.SQLITE_SAVEPOINT and (value or "").lower().startswith("duly_"):
        return _denied(f"{what} of savepoint {value}; names that begin with duly_")
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
        return _INSTEAD + "It covers one file, so ATTACH and DETACH are not for a handler."
    if action == sqlite3.SQLITE_PRAGMA:
        return _objection_to_pragma(what.lower(), value)
    table = (value or "") if action in _ON_TABLES_BY_VALUE else what
    if (action in _ON_TABLES or action in _ON_TABLES_BY_VALUE) and table.lower().startswith(
        "duly_"
    ):
        return _own_table(table)
    return None


def _objection_to_pragma(name: str, value: str | None) -> str | None:
    if name in _PRAGMAS or (name in _READABLE and value is None):
        return None
    if name == "foreign_keys":
        return (
            "PRAGMA foreign_keys does nothing inside a transaction. Give it to the store: "
            'App(..., store="sqlite:///file.db?foreign_keys=on")'
        )
    return f"{_INSTEAD}PRAGMA {name} would change how it is kept; set it outside the handler."


def _explain(error: sqlite3.DatabaseError, connection: Any) -> None:
    """Raise the reason where it was the authorizer that refused; SQLite says too little."""
    reason, connection.denied = connection.denied, None
    if reason is not None and driver.error_code(error) == sqlite3.SQLITE_AUTH:
        raise ConfigurationError(reason) from error
