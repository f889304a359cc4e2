"""`Book`: what was published and whom the killer killed, written down apart from duly.

A database of its own with one writer, the process that publishes and kills. What is published
is written down before (``invoked``) and its outcome after, so that the verdict compares with
what was asked for and not with what duly believes to have got.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

BOOK = "published.db"

Outcome = Literal["invoked", "ok", "fail", "unknown"]
"""``ok``: certainly stored, or known to be stored already. ``fail``: certainly not stored."""

TABLES = """
create table if not exists sensors (
    id text primary key, sensor integer, number integer, value real, outcome text
);
create table if not exists rides (
    id text primary key, ride integer, step integer, status text, outcome text
);
create table if not exists checkout (
    id text primary key, payer integer, payee integer, cents integer, outcome text
);
create table if not exists repeated (id text primary key);
create table if not exists accounts (account integer primary key, opening integer);
create table if not exists kills (
    number integer primary key, at_s real, worker text, struck text, in_transaction integer
);
create table if not exists held (kill integer, consumer text, messages integer);
create table if not exists limits (
    consumer text primary key, crash_loses integer, crash_repeats integer
)
"""

_PUT = {
    "sensors": "insert into sensors values (?, ?, ?, ?, 'invoked')",
    "rides": "insert into rides values (?, ?, ?, ?, 'invoked')",
    "checkout": "insert into checkout values (?, ?, ?, ?, 'invoked')",
}
_END = {
    "sensors": "update sensors set outcome = ? where id = ?",
    "rides": "update rides set outcome = ? where id = ?",
    "checkout": "update checkout set outcome = ? where id = ?",
}


@dataclass(frozen=True, slots=True)
class Kill:
    """One SIGKILL, with what the database showed of the victim while it stood still before it.

    ``struck`` is the consumer that was aimed at and hit, if any. ``held`` are the messages
    claimed and unsettled, by consumer; ``in_transaction`` says whether it held the writers'
    turn, None where the system does not tell.
    """

    at_s: float
    worker: str
    struck: str | None
    held: Mapping[str, int]
    in_transaction: bool | None

    @property
    def in_work(self) -> bool:
        """Whether it hit a worker with work in its hands."""
        return bool(self.held)


class Book:
    """The record of one run, in ``folder``. Safe to use from any thread."""

    def __init__(self, folder: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(folder / BOOK, isolation_level=None, check_same_thread=False)
        # It has to survive the death of workers, not of the machine.
        self._db.execute("pragma journal_mode = wal")
        self._db.execute("pragma synchronous = off")
        self._db.executescript(TABLES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._db.close()

    def invoke(self, topic: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """About to publish these: (id, the payload's fields)."""
        self._write(_PUT[topic], rows)

    def end(self, topic: str, outcomes: Iterable[tuple[Outcome, str]]) -> None:
        """How publishing ended: (outcome, id)."""
        self._write(_END[topic], outcomes)

    def repeat(self, ids: Iterable[str]) -> None:
        """These are published once more, under the same ids."""
        self._write("insert or ignore into repeated values (?)", [(id,) for id in ids])

    def open_accounts(self, accounts: Iterable[tuple[int, int]]) -> None:
        """(account, cents it starts with)."""
        self._write("insert into accounts values (?, ?)", accounts)

    def note_limits(self, limits: Iterable[tuple[str, int, int]]) -> None:
        """(consumer, messages that one crash may lose, and may repeat), as the contract says."""
        self._write("insert into limits values (?, ?, ?)", limits)

    def note_kill(self, number: int, kill: Kill) -> None:
        """A worker was killed."""
        self._write(
            "insert into kills values (?, ?, ?, ?, ?)",
            [(number, kill.at_s, kill.worker, kill.struck, kill.in_transaction)],
        )
        self._write(
            "insert into held values (?, ?, ?)",
            [(number, consumer, count) for consumer, count in kill.held.items()],
        )

    def _write(self, statement: str, rows: Iterable[tuple[Any, ...]]) -> None:
        with self._lock:
            self._db.execute("begin")
            self._db.executemany(statement, rows)
            self._db.execute("commit")
