"""SQLite through Python's driver: connections, running named statements, what errors mean.

Never open the database file itself with `open` anywhere in duly: closing any descriptor of a
file drops every POSIX lock the process has on it, SQLite's too.
"""

from __future__ import annotations

import functools
import itertools
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from duly.errors import BrokerError, BrokerUnavailable, BrokerUnusable, CommitUnknown
from duly.sql.steps import Steps, run, statements

R = TypeVar("R")
C = TypeVar("C", bound=sqlite3.Connection)

DIALECTS = ("sqlite", "sqlite_operating", "sqlite_store")
# Statements are prepared once a connection: more than duly has, plus a handler's own.
_CACHED_STATEMENTS = 512
# A log that outgrew this while a reader held it back shrinks to it when it starts anew.
_WAL_KEPT_BYTES = 64 * 1024 * 1024

_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_FOR_NOW = _BUSY | {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_PROTOCOL,
}
_NO_FAULT = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM})
_FOR_GOOD = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

# A COMMIT that failed so is certainly not stored: it was refused, or writing the log stopped
# before the last frame was whole. After any other failure (an fsync, shared memory) the frames
# may lie complete in the log, and recovery after a crash would take them for committed.
_NOT_COMMITTED = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_INTERRUPT,
    }
)


def connect(path: Path, factory: type[C], *, busy_s: float, isolation_level: Any = None) -> C:
    """A connection as all of duly's are: usable from any thread, one at a time.

    ``busy_s``: how long a statement waits for a lock that a foreign connection holds.
    The file must exist and be in WAL mode. Raises `sqlite3.Error`.
    """
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        timeout=busy_s,
        isolation_level=isolation_level,
        check_same_thread=False,
        cached_statements=_CACHED_STATEMENTS,
        factory=factory,
    )
    for pragma in (
        "synchronous = FULL",  # NORMAL loses acknowledged publishes on power loss
        "wal_autocheckpoint = 0",  # checkpoints come from one place: `wal.Checkpoints`
        f"journal_size_limit = {_WAL_KEPT_BYTES}",
        # As it is by default: more of it is memory that the processor's own caches do not hold.
        "cache_size = -2000",
    ):
        sqlite3.Cursor(connection).execute(f"pragma {pragma}")
    return connection


class StatementRunner:
    """Runs named statements on one connection; the `Executor` that `run` wants.

    It has a cursor of its own, so that a ``row_factory`` set by others does not reach it. Named
    statements are about the tables of one ``namespace``.
    """

    __slots__ = (
        "_cursor",
        "_execute",
        "_executemany",
        "_fetchall",
        "_inserts",
        "_several",
        "_sql",
    )

    def __init__(self, connection: sqlite3.Connection, namespace: str = "") -> None:
        cursor = sqlite3.Cursor(connection)
        cursor.row_factory = None
        self._cursor = cursor
        self._execute = cursor.execute
        self._executemany = cursor.executemany
        self._fetchall = cursor.fetchall
        self._sql = named_statements(namespace)
        self._several = in_turn(namespace)
        self._inserts = several_at_once(namespace)

    def ask(self, name: str, params: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows; of several, those of the one that has any."""
        if name in self._several:
            found = []
            for sql in self._several[name]:
                self._execute(sql, params)
                found += self._fetchall()
            return found
        self._execute(self._sql[name], params)
        return self._fetchall()

    def column(self, name: str, params: Any) -> list[Any]:
        """Run one statement and return the first column of its rows."""
        return [row[0] for row in self._execute(self._sql[name], params)]

    def change(self, name: str, params: Any) -> int:
        """Run one statement and return how many rows changed."""
        self._execute(self._sql[name], params)
        return self._cursor.rowcount

    def many(self, name: str, rows: Sequence[Sequence[Any]], shared: Sequence[Any] = ()) -> int:
        """Run one statement for each row and return how many rows changed."""
        if name not in self._inserts:
            self._executemany(self._sql[name], rows)
            return self._cursor.rowcount
        changed = done = 0
        for size, sql in self._inserts[name]:
            while len(rows) - done >= size:
                self._execute(
                    sql, [*shared, *itertools.chain.from_iterable(rows[done : done + size])]
                )
                changed += self._cursor.rowcount
                done += size
        return changed

    def each(self, name: str, rows: Sequence[Sequence[Any]]) -> Sequence[tuple[Any, ...] | None]:
        """Ask for one row for each of these parameters."""
        found: list[tuple[Any, ...] | None] = []
        for params in rows:
            self._execute(self._sql[name], params)
            answers = self._fetchall()
            found.append(answers[0] if answers else None)
        return found

    def execute(self, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement that has no name."""
        self._execute(sql, params)
        return self._fetchall()

    def run(self, steps: Steps[R]) -> R:
        """Drive ``steps`` to their result."""
        return run(self, steps)


@functools.cache
def named_statements(namespace: str = "") -> Mapping[str, str]:
    """Every named statement of this dialect, about the tables of a namespace.

    A name in two files is an error.
    """
    found: dict[str, str] = {}
    for dialect in DIALECTS:
        for name, text in statements(dialect).items():
            if name in found:
                raise ValueError(f"{dialect}.sql: another file has the statement {name} too")
            found[name] = in_namespace(text, namespace)
    return found


@functools.cache
def in_turn(namespace: str = "") -> Mapping[str, Sequence[str]]:
    """The named statements that are several, by their parts, which share their parameters.

    A change and a question cost half as much as one change with RETURNING, for which SQLite makes
    a table in memory each time it runs.
    """
    return {
        name: [part.strip() for part in sql.split(";\n")]
        for name, sql in named_statements(namespace).items()
        if ";\n" in sql and not sql.startswith("create ")
    }


_TABLE = re.compile(r"\bduly_(?=\w)")


def in_namespace(sql: str, namespace: str) -> str:
    """The statement with duly's tables and indexes named as in this namespace ("": as written)."""
    return _TABLE.sub(table_prefix(namespace), sql)


def table_prefix(namespace: str) -> str:
    """What the names of duly's tables begin with.

    Two underscores end the namespace: neither a namespace nor a table has them in its name, so
    that no two namespaces have a table in common (``duly_log_dead`` is nobody's ``dead``).
    """
    return f"duly_{namespace}__" if namespace else "duly_"


# So many rows go into one statement, as far as they reach: with a statement for each row the
# driver costs more than SQLite. An old SQLite takes 999 parameters.
_AT_ONCE = (100, 64, 32, 16, 8, 4, 2, 1)
_MOST_PARAMETERS = 999
_INSERT = re.compile(r"values (\((?:\?\d*, )*\?\d*\))( on conflict do nothing)?$")


@functools.cache
def several_at_once(namespace: str = "") -> Mapping[str, Sequence[tuple[int, str]]]:
    """For each named insert of given values: how many rows at once, and the statement for it."""
    found: dict[str, Sequence[tuple[int, str]]] = {}
    for name, sql in named_statements(namespace).items():
        if insert := _INSERT.search(sql):
            row, on_conflict = insert.groups(default="")
            start = sql[: insert.start()]
            found[name] = [
                (n, f"{start}values {_rows(row, n)}{on_conflict}")
                for n in _AT_ONCE
                if n * row.count("?") <= _MOST_PARAMETERS
            ]
    return found


def _rows(row: str, count: int) -> str:
    """So many rows of values: a plain ? becomes the next number, ?1, ?2, ... stay the same."""
    shared = max(map(int, re.findall(r"\?(\d+)", row)), default=0)
    numbers = itertools.count(shared + 1)
    return ", ".join(re.sub(r"\?(?!\d)", lambda _: f"?{next(numbers)}", row) for _ in range(count))


def single_statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would commit."""
    statement = ""
    for piece in script.split(";"):
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            if statement.strip(" \n\t;"):
                yield statement
            statement = ""


def error_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code; 0 where the driver itself objected."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF


def broker_error(error: sqlite3.Error, path: Path) -> BrokerError:
    """What a driver's error in one of duly's own statements means.

    Only for errors before COMMIT was sent, or where it certainly failed.
    """
    code = error_code(error)
    if code in _FOR_GOOD:
        return BrokerUnusable(f"{path}: {error}. {_WHAT_TO_DO[code]}")
    if code in _FOR_NOW:
        return BrokerUnavailable(f"{path}: {error}; nothing was changed. {_WHAT_TO_DO[code]}")
    return BrokerUnusable(
        f"{path}: {error} ({type(error).__name__}); nothing was changed. One of duly's own "
        "statements failed: its tables (duly_*) were altered, or this is a defect of duly."
    )


_WHAT_TO_DO = {
    sqlite3.SQLITE_BUSY: (
        "Another program holds the database's write lock: look for a sqlite3 shell or an "
        "application with an open transaction on this file, and end it."
    ),
    sqlite3.SQLITE_LOCKED: "Another program has the database locked: end it.",
    sqlite3.SQLITE_FULL: "The disk (or the database's max_page_count) is full: make room.",
    sqlite3.SQLITE_IOERR: "The disk refuses: look at its free space, quota and health.",
    sqlite3.SQLITE_READONLY: "The file or its directory became read-only: give write access.",
    sqlite3.SQLITE_CANTOPEN: "Look whether the file, its directory and its -wal are still there.",
    sqlite3.SQLITE_NOMEM: "Out of memory.",
    sqlite3.SQLITE_INTERRUPT: "The statement was interrupted; try again.",
    sqlite3.SQLITE_PROTOCOL: "SQLite's locks are contended beyond its patience; try again.",
    sqlite3.SQLITE_CORRUPT: (
        "The database is damaged. Stop every process, keep a copy of the file with its -wal, "
        "and restore a backup, or save what can be read with: sqlite3 FILE .recover"
    ),
    sqlite3.SQLITE_NOTADB: (
        "This is no SQLite database (or it is encrypted). Name another file; a new one is "
        "created when it does not exist."
    ),
}


def commit(
    connection: sqlite3.Connection, path: Path, send: Callable[[], object] | None = None
) -> None:
    """Commit the open transaction. ``send``: the COMMIT, if it is not to be the driver's own.

    Raises the driver's error, with the transaction rolled back, when it certainly did not
    commit, and `CommitUnknown` when nobody can say.
    """
    try:
        if send is None:
            sqlite3.Connection.commit(connection)
        else:
            send()
    except sqlite3.Error as error:
        roll_back(connection)
        if is_certain(error):
            raise
        raise CommitUnknown(
            f"{path}: COMMIT failed with {error}. Whether it is stored shows when the file is "
            "opened again. Look at the disk's health before going on."
        ) from error


def is_no_fault(error: BaseException) -> bool:
    """Whether a statement or COMMIT failed for want of room, of memory, or of a disk that works:
    the same may go well later.
    """
    return isinstance(error, sqlite3.Error) and error_code(error) in _NO_FAULT


def is_certain(error: sqlite3.Error) -> bool:
    """Whether a COMMIT that failed so is certainly not stored."""
    full_code = getattr(error, "sqlite_errorcode", None)
    return error_code(error) in _NOT_COMMITTED or full_code == sqlite3.SQLITE_IOERR_WRITE


def roll_back(connection: sqlite3.Connection) -> bool:
    """Roll back what is open; False when not even that went well: discard the connection."""
    try:
        sqlite3.Connection.rollback(connection)
    except sqlite3.Error:
        return False
    return not connection.in_transaction
