"""The named statements of PostgreSQL's dialect, for one schema, and what runs them.

In the ``.sql`` files parameters are ``$1``, ``$2``, ... and duly's tables stand in the schema
``duly``, which is replaced by the one in use. A statement for many rows takes them as columns:
``unnest($3::bigint[], $4::text[])`` after the ``$1``, ``$2`` that all rows share.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row
from psycopg.types.numeric import Int8BinaryDumper
from psycopg.types.string import StrBinaryDumper

from duly.sql.postgres.columns import column, register
from duly.sql.steps import statements

_DIALECTS = ("postgres_meta", "postgres", "postgres_operating", "postgres_store")
_SCHEMA = re.compile(r"\bduly\.(?=\w)")


@functools.cache
def named_statements(schema: str) -> Mapping[str, str]:
    """Every named statement of this dialect, for this schema. A name in two files is an error."""
    found: dict[str, str] = {}
    for dialect in _DIALECTS:
        if not resources.files("duly.sql").joinpath(f"{dialect}.sql").is_file():
            continue
        for name, text in in_schema(dialect, schema).items():
            if name in found:
                raise ValueError(f"{dialect}.sql: another file has the statement {name} too")
            found[name] = text
    return found


def in_schema(dialect: str, schema: str) -> Mapping[str, str]:
    """The statements of one file, for this schema."""
    return {name: for_schema(text, schema) for name, text in statements(dialect).items()}


def for_schema(text: str, schema: str) -> str:
    """SQL as it is written, on the tables of this schema."""
    prefix = f"{quoted(schema)}."
    return _SCHEMA.sub(lambda _: prefix, text)


def quoted(name: str) -> str:
    """A name as an identifier."""
    return sql.Identifier(name).as_string(None)


def own_cursor(kind: Any, connection: Any) -> Any:
    """A cursor for duly's statements: what others set on the connection does not reach it."""
    cursor = kind(connection, row_factory=tuple_row)
    # Always the same types: each other one would be another prepared statement.
    cursor.adapters.register_dumper(int, Int8BinaryDumper)
    cursor.adapters.register_dumper(str, StrBinaryDumper)
    register(cursor)
    cursor.format = psycopg.pq.Format.BINARY
    return cursor


class StatementRunner:
    """Runs named statements on one connection; the `Executor` that `run` wants.

    ``statements`` are others than those of the schema's files.
    """

    __slots__ = ("_cursor", "_sql", "schema")

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        schema: str,
        statements: Mapping[str, str] | None = None,
    ) -> None:
        self.schema = schema
        self._cursor = own_cursor(psycopg.RawCursor, connection)
        self._sql = statements or named_statements(schema)

    def ask(self, name: str, params: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        cursor = self._cursor
        cursor.execute(self._sql[name], params)
        return cursor.fetchall() if cursor.description else []

    def many(self, name: str, rows: Sequence[Sequence[Any]], shared: Sequence[Any] = ()) -> int:
        """Run one statement for all rows and return how many rows changed."""
        if not rows:
            return 0
        self._cursor.execute(self._sql[name], _columns(rows, shared))
        return self._cursor.rowcount  # type: ignore[no-any-return]

    def each(self, name: str, rows: Sequence[Sequence[Any]]) -> Sequence[tuple[Any, ...] | None]:
        """Ask for one row for each of these parameters; the statement gives nulls for none."""
        return [_row_or_none(row) for row in self.ask(name, _columns(rows))] if rows else []

    def column(self, name: str, params: Any) -> list[Any]:
        """Run one statement and return the first column of its rows."""
        return [row[0] for row in self.ask(name, params)]

    def change(self, name: str, params: Any) -> int:
        """Run one statement and return how many rows changed."""
        self._cursor.execute(self._sql[name], params)
        return self._cursor.rowcount  # type: ignore[no-any-return]

    def say(self, text: str) -> str:
        """Run statements that have no name; returns what the last was answered with."""
        cursor = self._cursor
        # Several go without parameters only, and then as text.
        cursor.execute(text, binary=False, prepare=False)
        while cursor.nextset():
            pass
        return cursor.statusmessage or ""


class AsyncStatementRunner:
    """The same for an async connection; the `AsyncExecutor` that `arun` wants."""

    __slots__ = ("_cursor", "_sql", "schema")

    def __init__(self, connection: psycopg.AsyncConnection[Any], schema: str) -> None:
        self.schema = schema
        self._cursor = own_cursor(psycopg.AsyncRawCursor, connection)
        self._sql = named_statements(schema)

    async def ask(self, name: str, params: Any) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        cursor = self._cursor
        await cursor.execute(self._sql[name], params)
        return await cursor.fetchall() if cursor.description else []

    async def many(
        self, name: str, rows: Sequence[Sequence[Any]], shared: Sequence[Any] = ()
    ) -> int:
        """Run one statement for all rows and return how many rows changed."""
        if not rows:
            return 0
        await self._cursor.execute(self._sql[name], _columns(rows, shared))
        return self._cursor.rowcount  # type: ignore[no-any-return]

    async def each(
        self, name: str, rows: Sequence[Sequence[Any]]
    ) -> Sequence[tuple[Any, ...] | None]:
        """Ask for one row for each of these parameters; the statement gives nulls for none."""
        return [_row_or_none(row) for row in await self.ask(name, _columns(rows))] if rows else []

    async def column(self, name: str, params: Any) -> list[Any]:
        """Run one statement and return the first column of its rows."""
        return [row[0] for row in await self.ask(name, params)]

    async def change(self, name: str, params: Any) -> int:
        """Run one statement and return how many rows changed."""
        await self._cursor.execute(self._sql[name], params)
        return self._cursor.rowcount  # type: ignore[no-any-return]

    async def say(self, text: str) -> str:
        """Run statements that have no name; returns what the last was answered with."""
        cursor = self._cursor
        await cursor.execute(text, binary=False, prepare=False)
        while cursor.nextset():
            pass
        return cursor.statusmessage or ""


def _row_or_none(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return None if row[0] is None else row


def _columns(rows: Sequence[Sequence[Any]], shared: Sequence[Any] = ()) -> list[Any]:
    return [*shared, *map(column, zip(*rows, strict=True))]
