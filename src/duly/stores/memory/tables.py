"""Tables in memory, and the view of them that one transaction has."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

from duly.errors import TransactionLost

Rows = dict[Hashable, Any]
Tables = dict[str, Rows]


class DuplicateKey(KeyError):
    """A row with this key is there already; nothing was inserted."""


class _Absent:
    """Stands where a transaction has no row of its own, or has deleted one."""


_UNTOUCHED = _Absent()
_DELETED = _Absent()


class MemoryTables:
    """What an exactly-once handler works on: rows by table and key, in one transaction.

    Reads see the transaction's own writes; nobody else does until it commits. Tables come into
    being with their first row. Values are copied in both directions, so that changing one in
    place changes no table.
    """

    def __init__(self, committed: Tables) -> None:
        self._committed = committed
        self._own: dict[str, Rows] = {}
        # What stood there before each write, so that a savepoint can be returned to.
        self._journal: list[tuple[str, Hashable, Any]] = []
        self._marks: list[int] = []
        self._why_over = ""

    def insert(self, table: str, key: Hashable, value: Any) -> None:
        """Add a row. Raises `DuplicateKey`."""
        if self._find(table, key) is not _DELETED:
            raise DuplicateKey(f"table {table!r} has a row {key!r} already")
        self._write(table, key, copy.deepcopy(value))

    def update(self, table: str, key: Hashable, value: Any) -> None:
        """Replace a row. Raises KeyError where there is none."""
        self._need(table, key)
        self._write(table, key, copy.deepcopy(value))

    def delete(self, table: str, key: Hashable) -> None:
        """Remove a row. Raises KeyError where there is none."""
        self._need(table, key)
        self._write(table, key, _DELETED)

    def get(self, table: str, key: Hashable, default: Any = None) -> Any:
        """The row's value, or ``default``."""
        found = self._find(table, key)
        return default if found is _DELETED else copy.deepcopy(found)

    def rows(self, table: str) -> Rows:
        """All rows of a table."""
        self._check()
        merged = {**self._committed.get(table, {}), **self._own.get(table, {})}
        return copy.deepcopy({k: v for k, v in merged.items() if v is not _DELETED})

    def rollback(self) -> None:
        """Undo everything, as a database does by itself after some failures: the transaction is
        lost, and committing it raises `TransactionLost`. For tests of what happens then.
        """
        self.end("it was rolled back inside")

    @property
    def is_open(self) -> bool:
        """Whether the transaction still runs."""
        return not self._why_over

    def _find(self, table: str, key: Hashable) -> Any:
        self._check()
        own = self._own.get(table, {}).get(key, _UNTOUCHED)
        return self._committed.get(table, {}).get(key, _DELETED) if own is _UNTOUCHED else own

    def _need(self, table: str, key: Hashable) -> None:
        if self._find(table, key) is _DELETED:
            raise KeyError(f"table {table!r} has no row {key!r}")

    def _write(self, table: str, key: Hashable, value: Any) -> None:
        own = self._own.setdefault(table, {})
        self._journal.append((table, key, own.get(key, _UNTOUCHED)))
        own[key] = value

    def _check(self) -> None:
        if self._why_over:
            raise TransactionLost(f"this transaction is over: {self._why_over}")

    # --- the session's side

    def check(self) -> None:
        """Raise `TransactionLost` unless the transaction still runs."""
        self._check()

    def mark(self) -> None:
        """Set the savepoint."""
        self._check()
        self._marks.append(len(self._journal))

    def drop_mark(self) -> None:
        """Keep everything since the savepoint."""
        self._check()
        self._marks.pop()

    def return_to_mark(self) -> None:
        """Undo everything since the savepoint, newest first."""
        self._check()
        mark = self._marks.pop()
        while len(self._journal) > mark:
            table, key, before = self._journal.pop()
            if before is _UNTOUCHED:
                del self._own[table][key]
            else:
                self._own[table][key] = before

    def apply(self) -> None:
        """Make the writes true for everybody."""
        for table, rows in self._own.items():
            stands = self._committed.setdefault(table, {})
            for key, value in rows.items():
                if value is _DELETED:
                    stands.pop(key, None)
                else:
                    stands[key] = value

    def end(self, why: str) -> None:
        """The transaction is over; what was not applied is gone."""
        self._own.clear()
        self._journal.clear()
        self._why_over = self._why_over or why
