"""What a handler may do to its transaction, to its process and to its time.

Each is called in the middle of the handler, after one of its tables was written.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from typing import Any

from duly.testing.chaos.surroundings import fill


def _raise(process: Any, tx: Any) -> None:
    raise RuntimeError("raised in the middle")


def _raise_cancelled(process: Any, tx: Any) -> None:
    raise asyncio.CancelledError


def _kill(process: Any, tx: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    _hang(process, tx)


def _exit_at_once(process: Any, tx: Any) -> None:
    os._exit(3)


def _segfault(process: Any, tx: Any) -> None:
    ctypes.string_at(0)


def _abort(process: Any, tx: Any) -> None:
    os.abort()


def _sys_exit(process: Any, tx: Any) -> None:
    sys.exit(4)


def _hang(process: Any, tx: Any) -> None:
    threading.Event().wait()


def _swallow_constraint(process: Any, tx: Any) -> None:
    with contextlib.suppress(sqlite3.IntegrityError):
        tx.connection.execute("insert into effects values (null, 'refused')")


def _swallow_rollback(process: Any, tx: Any) -> None:
    """The whole transaction is gone with this, and the handler goes on."""
    with contextlib.suppress(sqlite3.IntegrityError):
        tx.connection.execute("insert or rollback into effects values (null, 'refused')")


def _swallow_full(process: Any, tx: Any) -> None:
    with contextlib.suppress(sqlite3.OperationalError):
        tx.connection.execute("create table big (body blob)")
        tx.connection.execute("insert into big values (zeroblob(64 * 1024 * 1024))")


def _suppress_all(process: Any, tx: Any) -> None:
    """Commit in every way there is, and look away each time."""
    for end in (*ENDINGS.values(), _swallow_constraint):
        with contextlib.suppress(Exception):
            end(process, tx)


def _file_full(process: Any, tx: Any) -> None:
    """Take all room there is, once."""
    filler = process.path.with_name("filler")
    if not filler.exists():
        fill(filler)


def _wait_at_gate(process: Any, tx: Any) -> None:
    from tests.waiting import eventually

    eventually((process.folder / "go").exists, "the gate opens")


def _outlive_lease(process: Any, tx: Any) -> None:
    from tests.waiting import eventually

    eventually(lambda: process.points.reached("after subscription.extend"), "the lease is renewed")


# --- ending the transaction by oneself


def _with(process: Any, tx: Any) -> None:
    with tx.connection:
        pass


def _unguarded_commit(process: Any, tx: Any) -> None:
    sqlite3.Connection.commit(tx.connection)


def _level(process: Any, tx: Any) -> None:
    tx.connection.isolation_level = None


def _unguarded_level(process: Any, tx: Any) -> None:
    level: Any = sqlite3.Connection.__dict__["isolation_level"]
    level.__set__(tx.connection, None)


def _execute(sql: str) -> Callable[[Any, Any], None]:
    def end(process: Any, tx: Any) -> None:
        tx.connection.execute(sql)

    return end


def _cursor(sql: str) -> Callable[[Any, Any], None]:
    def end(process: Any, tx: Any) -> None:
        sqlite3.Cursor(tx.connection).execute(sql)

    return end


ENDINGS: dict[str, Callable[[Any, Any], None]] = {
    "commit()": lambda process, tx: tx.connection.commit(),
    "rollback()": lambda process, tx: tx.connection.rollback(),
    "with connection": _with,
    "executescript()": lambda process, tx: tx.connection.executescript("select 1"),
    "a cursor's executescript()": lambda process, tx: tx.connection.cursor().executescript("--"),
    "close()": lambda process, tx: tx.connection.close(),
    "isolation_level": _level,
    "COMMIT": _execute("COMMIT"),
    "END": _execute("END"),
    "ROLLBACK": _execute("ROLLBACK"),
    "a comment and commit": _execute("/* no */ commit -- yes"),
    "a plain cursor's COMMIT": _cursor("commit"),
    "a plain cursor's ROLLBACK": _cursor("rollback"),
    "the driver's own commit()": _unguarded_commit,
    "the driver's own isolation_level": _unguarded_level,
}

DEATHS: dict[str, Callable[[Any, Any], None]] = {
    "SIGKILL": _kill,
    "os._exit": _exit_at_once,
    "segfault": _segfault,
    "abort": _abort,
    "sys.exit": _sys_exit,
    "hang": _hang,
}

ALL: dict[str, Callable[[Any, Any], None]] = {
    **ENDINGS,
    **DEATHS,
    "raise": _raise,
    "CancelledError": _raise_cancelled,
    "swallow a constraint": _swallow_constraint,
    "swallow a rollback": _swallow_rollback,
    "swallow a full disk": _swallow_full,
    "every ending, suppressed": _suppress_all,
    "fill the disk": _file_full,
    "wait at the gate": _wait_at_gate,
    "wait for a renewal": _outlive_lease,
}
