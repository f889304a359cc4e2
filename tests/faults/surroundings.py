"""What a process is put into before it works: another clock, less patience, less room."""

from __future__ import annotations

import mmap
import os
import resource
import sqlite3
import struct
import time
from collections.abc import Callable
from typing import Any

from duly.sql.sqlite.file import DatabaseFile
from duly.sql.sqlite.guard import GuardedConnection


def _impatient(process: Any, busy_s: float) -> None:
    """Wait for the file's turn, and for foreign locks, only so long."""
    DatabaseFile.open.__func__.__kwdefaults__["busy_s"] = busy_s  # type: ignore[attr-defined]


def _clock(process: Any, offset_s: float) -> None:
    """A wall clock that is wrong by what stands in the file ``clock``, and may be stepped."""
    path = process.folder / "clock"
    if not path.exists():
        step(path, offset_s)
    with path.open("rb") as file:
        shared = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
    now_ns = time.time_ns

    def offset_ns() -> int:
        (seconds,) = struct.unpack("<q", shared)
        return int(seconds) * 1_000_000_000

    time.time_ns = lambda: now_ns() + offset_ns()
    time.time = lambda: (now_ns() + offset_ns()) / 1e9


def step(path: Any, offset_s: float) -> None:
    """Set the clock of the processes that go by this file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, struct.pack("<q", int(offset_s)), 0)
    os.close(fd)


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
