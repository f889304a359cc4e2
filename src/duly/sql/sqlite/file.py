"""`DatabaseFile`: one SQLite file as duly uses it, shared by all who use it in a process."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from duly.errors import BrokerUnavailable, BrokerUnusable, ConfigurationError
from duly.sql.sqlite.changes import Changes
from duly.sql.sqlite.driver import StatementRunner, broker_error, connect
from duly.sql.sqlite.liveness import WorkerLock, boot_ns
from duly.sql.sqlite.place import lock_folder, prepare
from duly.sql.sqlite.schema import Tables, check_namespace, set_up
from duly.sql.sqlite.turn import Turn, forked
from duly.sql.sqlite.wal import Checkpoints
from duly.sql.sqlite.writer import GroupWriter, Together
from duly.sql.steps import Steps

R = TypeVar("R")
C = TypeVar("C", bound=sqlite3.Connection)


@dataclass(slots=True)
class Stats:
    """What this process did to the file: commits, and those of them that were synced."""

    commits: int = 0
    fsyncs: int = 0


class DatabaseFile:
    """One namespace of one database file. Safe to use from any thread; not across fork().

    - ``path``: the real path; ``folder``: the lock files beside it.
    - ``identity``: names the namespace's tables, wherever the file was moved; broker and store
      recognise by it that they are one.
    - ``tables``: those tables.
    - ``busy_s``: how long a writer waits for its turn, and then for a foreign write lock.
    """

    def __init__(self, path: Path, namespace: str, busy_s: float) -> None:
        self.path = path
        self.namespace = namespace
        self.folder = lock_folder(path)
        self.busy_s = busy_s
        self.stats = Stats()
        self._pid = os.getpid()
        self._users = 1
        self._mutex = threading.Lock()
        self._readers: deque[tuple[sqlite3.Connection, StatementRunner]] = deque()
        self._worker: WorkerLock | None = None
        self._token = 0
        self.tables = Tables(path, namespace)
        self.identity = _set_up(path, self.folder, namespace, busy_s)
        # A checkpoint that has to wait for readers holds up every writer: not for long.
        self._checkpoints = Checkpoints(path, lambda: connect(path, sqlite3.Connection, busy_s=0.1))
        self._changes = Changes(lambda: connect(path, sqlite3.Connection, busy_s=busy_s))
        self._writer = GroupWriter(
            path,
            Turn(self.folder),
            self.tables,
            busy_s=busy_s,
            committed=self.committed,
            before_release=self.before_release,
        )

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, namespace: str = "", busy_s: float = 30.0
    ) -> DatabaseFile:
        """The one object in this process for a file's namespace; every `open` needs its `close`.

        Creates the file where the directory exists, makes duly's tables where they are missing
        and brings up older ones. Raises `ConfigurationError`, `BrokerUnusable` or
        `BrokerUnavailable`, each saying what to do.
        """
        check_namespace(namespace)
        with _opening:
            real = prepare(path)
            if any(real == inherited for inherited, _ in _inherited):
                raise ConfigurationError(forked(real))
            file = _open_files.get((real, namespace))
            if file is None:
                file = _open_files[real, namespace] = cls(real, namespace, busy_s)
            else:
                file._users += 1
            return file

    def close(self) -> None:
        """Give the file up; the last user's call closes its connections."""
        with _opening:
            if os.getpid() != self._pid or self._users == 0:
                return
            self._users -= 1
            if self._users:
                return
            _open_files.pop((self.path, self.namespace), None)
        # Not in the lock: the writer may have to wait for its turn before it ends.
        self._changes.close()
        self._writer.close()
        self._checkpoints.close()
        while self._readers:
            self._readers.pop()[0].close()
        if self._worker is not None:
            self._worker.close()

    def write(self, make_steps: Callable[[], Steps[R]], *, durable: bool = True) -> R:
        """Run steps in a transaction that is committed on return, together with other callers'.

        ``make_steps`` makes the generator; it is called again when the transaction must be
        tried again. With ``durable`` the commit is synced; without, it survives the death of
        every process but not a power loss (the next durable commit covers it). Raises
        `BrokerUnavailable` or `BrokerUnusable` (nothing was changed), `CommitUnknown`, or
        whatever the steps raise (rolled back).
        """
        return self._writer.write(make_steps, durable)

    def write_items(self, items: Sequence[Any], together: Together) -> Sequence[Any]:
        """Run ``together(items)`` as `write` does, with the items of all who call this with the
        same function just now in one go; returns the results of ``items``.
        """
        return self._writer.write_items(items, together)

    def read(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps that only read, on one consistent snapshot. Raises `BrokerError`."""
        self._refuse_after_fork()
        try:
            connection, runner = self._reader()
            try:
                connection.execute("begin")
                self.tables.check(runner)
                result = runner.run(make_steps())
            except BaseException:
                connection.close()  # rare, and a connection in doubt must not be used again
                raise
            connection.execute("commit")
        except sqlite3.Error as error:
            raise broker_error(error, self.path) from error
        self._readers.append((connection, runner))
        return result

    def changes(self) -> int:
        """A number that moves when any process has committed; take it before reading."""
        self._refuse_after_fork()
        return self._changes.number()

    def wait(self, seen: int, timeout_s: float) -> int:
        """The change number, once it is not ``seen`` or ``timeout_s`` seconds have passed."""
        return self._changes.wait(seen, timeout_s)

    def notify(self) -> None:
        """Wake this process's waiters: something was committed, or they should look again."""
        self._changes.notify()

    def committed(self, synced: bool = True) -> None:
        """Count a commit made on a connection of this file, and tell who waits."""
        self.stats.commits += 1
        self.stats.fsyncs += synced
        self._changes.notify()

    def before_release(self, before_long: Callable[[], None] = lambda: None) -> None:
        """To be called by a writer after its commit, before it gives up the turn. ``before_long``
        is called where that takes long.
        """
        self._checkpoints.run_when_due(before_long)

    def empty_log(self) -> bool:
        """Move all of SQLite's log into the database and empty it; False where somebody who
        reads an old snapshot stood in the way. Raises `BrokerError`.
        """
        turn = self.turn()
        connection = None
        try:
            turn.acquire(self.busy_s)
            connection = connect(self.path, sqlite3.Connection, busy_s=1.0)
            (busy, *_) = connection.execute("pragma wal_checkpoint(truncate)").fetchone()
        except sqlite3.Error as error:
            raise broker_error(error, self.path) from error
        finally:
            if connection is not None:
                connection.close()
            turn.close()
        return not busy

    def turn(self) -> Turn:
        """A place in the writers' queue of its own; the caller closes it."""
        self._refuse_after_fork()
        return Turn(self.folder)

    def connect(self, factory: type[C], *, isolation_level: Any = None) -> C:
        """A connection of its own; the caller closes it. Raises `sqlite3.Error`."""
        self._refuse_after_fork()
        return connect(self.path, factory, busy_s=self.busy_s, isolation_level=isolation_level)

    @property
    def worker(self) -> WorkerLock:
        """This process's identity as a worker of this file."""
        self._refuse_after_fork()
        with self._mutex:
            if self._worker is None:
                self._worker = WorkerLock.create(self.folder)
            return self._worker

    def new_token(self) -> int:
        """A claim's token: greater than all before it since the machine has started, whichever
        process made them. To be called in the file's turn, in which one is made after the other.
        A counter in the file would be a statement and a page for each claim.
        """
        self._token = max(self._token + 1, boot_ns())
        return self._token

    def _reader(self) -> tuple[sqlite3.Connection, StatementRunner]:
        try:
            return self._readers.pop()
        except IndexError:
            connection = connect(self.path, sqlite3.Connection, busy_s=self.busy_s)
            connection.execute("pragma query_only = on")
            return connection, self.tables.runner(connection)

    def _refuse_after_fork(self) -> None:
        if os.getpid() != self._pid:
            raise ConfigurationError(forked(self.path))


def _set_up(path: Path, folder: Path, namespace: str, busy_s: float) -> str:
    """Put the file into WAL mode, bring its tables up to date, and return their identity."""
    turn = Turn(folder)
    connection = None
    try:
        turn.acquire(busy_s)
        connection = connect(path, sqlite3.Connection, busy_s=busy_s)
        (mode,) = connection.execute("pragma journal_mode = wal").fetchone()
        if mode != "wal":
            raise BrokerUnusable(f"{path}: SQLite refuses WAL mode here (it stays {mode})")
        return set_up(connection, path, namespace)
    except sqlite3.Error as error:
        raise _opening_error(error, path) from error
    finally:
        if connection is not None:
            connection.close()
        turn.close()


def _opening_error(error: sqlite3.Error, path: Path) -> Exception:
    meaning = broker_error(error, path)
    code = getattr(error, "sqlite_errorcode", 0) or 0
    if isinstance(meaning, BrokerUnavailable) and code & 0xFF in (
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
    ):
        return BrokerUnusable(str(meaning))
    return meaning


_opening = threading.RLock()
_open_files: dict[tuple[Path, str], DatabaseFile] = {}
# Kept for ever, so that a child never closes what belongs to its parent.
_inherited: dict[tuple[Path, str], DatabaseFile] = {}


def _forget_after_fork() -> None:
    global _opening  # noqa: PLW0603 - another thread of the parent may have held it
    _opening = threading.RLock()
    _inherited.update(_open_files)
    _open_files.clear()


os.register_at_fork(after_in_child=_forget_after_fork)
