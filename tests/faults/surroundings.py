"""What a process is put into before it works: another clock, less patience, less room."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Callable
from typing import Any

from duly.sql.sqlite.file import DatabaseFile
from duly.sql.sqlite.guard import GuardedConnection
from duly.testing.chaos.surroundings import go_by, step


def _impatient(process: Any, busy_s: float) -> None:
    """Wait for the file's turn, and for foreign locks, only so long."""
    DatabaseFile.open.__func__.__kwdefaults__["busy_s"] = busy_s  # type: ignore[attr-defined]


def _clock(process: Any, offset_s: float) -> None:
    """A wall clock that is wrong by what stands in the file ``clock``, and may be stepped."""
    path = process.folder / "clock"
    if not path.exists():
        step(path, offset_s)
    go_by(path)


def _small_files(process: Any, max_bytes: int) -> None:
    """No file may grow beyond this: a disk that is full."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))


def _few_pages(process: Any, spare: int) -> None:
    """A handler's connection may add only so many pages to the database."""
    connect = DatabaseFile.connect

    def limited(self: DatabaseFile, factory: Any, **options: Any) -> Any:
        connection = connect(self, factory, **options)
        if factory is GuardedConnection:
            cursor = sqlite3.Cursor(connection)
            (pages,) = cursor.execute("pragma page_count").fetchone()
            cursor.execute(f"pragma max_page_count = {pages + spare}")
        return connection

    DatabaseFile.connect = limited  # type: ignore[method-assign]


def _nobody(process: Any) -> None:
    """Be a user who owns nothing."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


ALL: dict[str, Callable[..., None]] = {
    "impatient": _impatient,
    "clock": _clock,
    "small files": _small_files,
    "few pages": _few_pages,
    "nobody": _nobody,
}
