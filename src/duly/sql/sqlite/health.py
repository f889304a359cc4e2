"""What endangers a SQLite file: where it lies, who may read it, how it is kept, what is in it."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

from duly.inspection.health import Finding, Level
from duly.sql.sqlite.file import DatabaseFile
from duly.sql.sqlite.place import is_doubtful
from duly.sql.sqlite.wal import SAFE_VERSION

_MIB = 1024 * 1024
_FULL = 2
# With less a commit fails soon; with little a backlog or a checkpoint may.
_NO_ROOM_BYTES = 64 * _MIB
_LITTLE_ROOM_BYTES = 1024 * _MIB
# A log that grew so long is held back by somebody who reads an old snapshot.
_LONG_LOG_BYTES = 512 * _MIB
# Reading all of a larger one takes too long for a look.
_CHECKED_BYTES = 256 * _MIB


def examine(file: DatabaseFile) -> Iterator[Finding]:
    """Everything that can be seen from here; changes nothing."""
    yield _version()
    yield from _place(file.path)
    yield from _permissions(file)
    try:
        connection = file.connect(sqlite3.Connection)
    except sqlite3.Error as error:
        yield Finding("wrong", "file", f"{file.path}: {error}", "Look at the file and its disk.")
        return
    try:
        yield from _settings(connection)
        yield from _contents(file.path, connection)
    except sqlite3.Error as error:
        yield Finding("wrong", "contents", f"{file.path}: {error}", _RESTORE)
    finally:
        connection.close()


_RESTORE = (
    "Stop every process, keep a copy of the file with its -wal, and restore a backup, or save "
    "what can be read: sqlite3 FILE .recover"
)


def _version() -> Finding:
    if sqlite3.sqlite_version_info >= SAFE_VERSION:
        return Finding("ok", "SQLite", sqlite3.sqlite_version)
    return Finding(
        "warning",
        "SQLite",
        f"{sqlite3.sqlite_version} can corrupt a file that two connections checkpoint at once; "
        "duly does it from one place, other programs cannot be seen from here",
        "Set PRAGMA wal_autocheckpoint = 0 on every other connection to the file, or use SQLite "
        f"{'.'.join(map(str, SAFE_VERSION))}.",
    )


def _place(path: Path) -> Iterator[Finding]:
    kind = is_doubtful(path)
    if kind:
        yield Finding(
            "warning",
            "file system",
            f"{kind}: safe only while no other machine uses the file",
            "Use a local disk.",
        )
    else:
        yield Finding("ok", "file system", "local")
    room = os.statvfs(path.parent)
    free = room.f_bavail * room.f_frsize
    found = f"{free // _MIB:,} MiB free"
    if free < _NO_ROOM_BYTES:
        yield Finding("wrong", "disk", found, "Make room: soon nothing can be published.")
    elif free < _LITTLE_ROOM_BYTES:
        yield Finding("warning", "disk", found, "Make room before a backlog fills it.")
    else:
        yield Finding("ok", "disk", found)
    log = path.with_name(path.name + "-wal")
    long = log.stat().st_size if log.exists() else 0
    if long > _LONG_LOG_BYTES:
        yield Finding(
            "warning",
            "log",
            f"{long // _MIB:,} MiB in {log.name}",
            "Look for a connection that reads an old snapshot: a cursor or transaction left open.",
        )


def _permissions(file: DatabaseFile) -> Iterator[Finding]:
    path = file.path
    beside = [path.with_name(path.name + end) for end in ("", "-wal", "-shm")]
    all_ = [*beside, file.folder, *sorted(file.folder.rglob("*"))]
    by_anybody: list[str] = []
    by_group: list[str] = []
    for each in all_:
        try:
            mode = stat.S_IMODE(each.stat().st_mode)
        except FileNotFoundError:
            continue
        name = str(each.relative_to(path.parent))
        if mode & stat.S_IRWXO:
            by_anybody.append(name)
        elif mode & stat.S_IRWXG:
            by_group.append(name)
    if by_anybody:
        yield Finding(
            "wrong", "permissions", f"open to every user: {_some(by_anybody)}", "chmod o= them."
        )
    if by_group:
        yield Finding(
            "warning",
            "permissions",
            f"open to their group: {_some(by_group)}",
            "chmod g= them, unless that is meant.",
        )
    if not (by_anybody or by_group):
        yield Finding("ok", "permissions", "the owner's only")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= len(names[:4]) else f"{shown} and {len(names) - 4} more"


def _settings(connection: sqlite3.Connection) -> Iterator[Finding]:
    [(mode,)] = connection.execute("pragma journal_mode").fetchall()
    [(synchronous,)] = connection.execute("pragma synchronous").fetchall()
    if mode != "wal":
        yield Finding(
            "wrong",
            "journal mode",
            f"{mode}: somebody changed it",
            "Stop every process and start one of duly's: it sets WAL.",
        )
    else:
        level: Level = "ok" if synchronous >= _FULL else "wrong"
        yield Finding(level, "journal mode", f"wal, synchronous {synchronous}")


def _contents(path: Path, connection: sqlite3.Connection) -> Iterator[Finding]:
    foreign = connection.execute(
        "select name from sqlite_master where type = 'trigger' "
        "and substr(tbl_name, 1, 5) = 'duly_' order by name"
    ).fetchall()
    if foreign:
        yield Finding(
            "wrong",
            "triggers",
            f"on duly's tables: {_some([name for (name,) in foreign])}",
            "Drop them: what they do becomes part of every claim and settlement.",
        )
    size = path.stat().st_size
    if size > _CHECKED_BYTES:
        yield Finding("ok", "contents", f"{size // _MIB:,} MiB, too large to be checked here")
        return
    [(said,)] = connection.execute("pragma quick_check(1)").fetchall()
    if said == "ok":
        yield Finding("ok", "contents", f"sound, {size // 1024:,} KiB")
    else:
        yield Finding("wrong", "contents", str(said), _RESTORE)
