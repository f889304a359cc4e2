"""duly's tables in a SQLite file: made, brought up to date, and watched for who may use them."""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duly.errors import BrokerUnusable, ConfigurationError
from duly.sql import migrations
from duly.sql.migrations import Schema
from duly.sql.sqlite.driver import (
    DIALECTS,
    StatementRunner,
    in_namespace,
    roll_back,
    single_statements,
)
from duly.sql.steps import statements

_NAMESPACE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
# So that the longest name of an index has room in every database's 63 bytes.
_MAX_NAMESPACE_CHARS = 24

_META = "create table if not exists duly_meta (name text primary key, value not null) without rowid"


def check_namespace(namespace: str) -> None:
    """Refuse what cannot be part of a table's name. Raises `ConfigurationError`."""
    if namespace and (
        len(namespace) > _MAX_NAMESPACE_CHARS or _NAMESPACE.fullmatch(namespace) is None
    ):
        raise ConfigurationError(
            f"namespace {namespace!r}: lower-case letters, digits and single underscores between "
            f"them, starting with a letter, at most {_MAX_NAMESPACE_CHARS}: staging, eu_west_1"
        )


def set_up(connection: sqlite3.Connection, path: Path, namespace: str) -> str:
    """Make what is missing or bring up what is older, in one transaction; returns the identity.

    To be called with the file's turn. Raises `sqlite3.Error`, and `BrokerUnusable` where newer
    code has changed the tables beyond what this code may use.
    """
    connection.execute("begin immediate")
    try:
        connection.execute(in_namespace(_META, namespace))
        meta = _meta(connection, namespace)
        if not meta:
            meta = _make(connection, namespace)
        else:
            _bring_up(connection, path, namespace, _schema(meta))
        connection.commit()
    finally:
        roll_back(connection)
    return str(meta["identity"])


def _meta(connection: sqlite3.Connection, namespace: str) -> dict[str, Any]:
    sql = in_namespace("select name, value from duly_meta", namespace)
    return dict(connection.execute(sql).fetchall())


def _schema(meta: Mapping[str, Any]) -> Schema:
    version = int(meta["schema"])
    return Schema(version, int(meta.get("oldest", version)))


def _make(connection: sqlite3.Connection, namespace: str) -> dict[str, Any]:
    for dialect in DIALECTS:
        for name, block in statements(dialect).items():
            if name == "log_schema" or name.startswith("create_"):
                _run(connection, block, namespace)
    schema = migrations.newest("sqlite")
    meta = {"identity": f"sqlite:{secrets.token_hex(16)}"}
    _put(connection, namespace, "identity", meta["identity"])
    _put(connection, namespace, "schema", schema.version)
    _put(connection, namespace, "oldest", schema.oldest)
    return meta


def _bring_up(connection: sqlite3.Connection, path: Path, namespace: str, found: Schema) -> None:
    if refusal := found.refusal(str(path)):
        raise BrokerUnusable(refusal)
    steps = migrations.migrations("sqlite", found.version)
    for step in steps:
        _run(connection, step.sql, namespace)
    if steps:
        reached = migrations.after(found, steps)
        _put(connection, namespace, "schema", reached.version)
        _put(connection, namespace, "oldest", reached.oldest)


def _run(connection: sqlite3.Connection, script: str, namespace: str) -> None:
    for statement in single_statements(in_namespace(script, namespace)):
        connection.execute(statement)


def _put(connection: sqlite3.Connection, namespace: str, name: str, value: str | int) -> None:
    sql = "insert into duly_meta values (?, ?) on conflict do update set value = excluded.value"
    connection.execute(in_namespace(sql, namespace), (name, value))


class Tables:
    """duly's tables in one namespace of a file: their names, and whether this code may use them.

    Another process may bring them to a schema that this code must not write. SQLite counts the
    changes of a file's schema in its header; reading the count costs some microseconds a
    transaction, and only when it has moved is `duly_meta` read.
    """

    def __init__(self, path: Path, namespace: str) -> None:
        self.namespace = namespace
        self._path = path
        self._sql = in_namespace(
            "select name, value from duly_meta where name in ('schema', 'oldest')", namespace
        )
        self._seen = -1

    def runner(self, connection: sqlite3.Connection) -> StatementRunner:
        """Runs the named statements on these tables."""
        return StatementRunner(connection, self.namespace)

    def check(self, runner: StatementRunner) -> None:
        """To be called inside each transaction, before duly's statements.

        Raises `BrokerUnusable` once newer code has left this one behind, and `sqlite3.Error`.
        """
        [(count,)] = runner.execute("pragma schema_version")
        if count == self._seen:
            return
        if refusal := _schema(dict(runner.execute(self._sql))).refusal(str(self._path)):
            raise BrokerUnusable(refusal)
        self._seen = count
