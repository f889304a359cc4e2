"""Databases of an older schema, and code of an older or a newer one, as processes run it.

The older code is the shipped source without what later schemas added; the newer one has one more
block of migrations. Each is a copy of the package that a process puts in front of its path.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import duly
from duly.sql.migrations import SCHEMA_VERSION

SOURCE = Path(duly.__file__).parent
SCHEMA_1 = (Path(__file__).parent / "schema_1.sql").read_text()

CLAIMS_BY_TOKEN = (
    "create index if not exists duly_claims_token on duly_claims (token, subscription_no, first);"
)

NOW = "-"  # as the first argument of a program: the code that is tested

# What programs begin with: their first argument is the folder of the code they run.
WITH_CODE = """
import sys
if sys.argv[1] != "-":
    sys.path.insert(0, sys.argv[1])
"""


def older_file(path: Path) -> None:
    """A database of schema 1, with nothing in it."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.executescript(SCHEMA_1)
        connection.executemany(
            "insert into duly_meta values (?, ?)",
            [("identity", "sqlite:older"), ("schema", 1), ("oldest", 1)],
        )
        connection.commit()


def older_code(folder: Path) -> Path:
    """Code of schema 1: it makes its tables as they were, and knows of no migration."""
    shutil.copytree(SOURCE, folder / "duly", ignore=shutil.ignore_patterns("__pycache__"))
    _replace(
        folder, "sql/migrations.py", rf"^SCHEMA_VERSION = {SCHEMA_VERSION}$", "SCHEMA_VERSION = 1"
    )
    for file, made in (
        ("sqlite", "table if not exists duly_schedules"),
        ("sqlite_store", "table if not exists duly_letters"),
        ("sqlite_store", "table if not exists duly_log_parked"),
        ("sqlite_store", "index if not exists duly_log_parked_by_time"),
    ):
        _replace(folder, f"sql/{file}.sql", rf"^create {made}\s[^;]*;", "select 1;")
    made = r"index if not exists duly_claims_(free|further)\s[^;]*"
    _replace(folder, "sql/sqlite.sql", rf"^create {made};\n\ncreate {made};", CLAIMS_BY_TOKEN)
    return folder


def newer_code(folder: Path, sql: str, *, oldest: int, dialect: str = "sqlite") -> Path:
    """Code of the next schema, which these statements make of the present one."""
    shutil.copytree(SOURCE, folder / "duly", ignore=shutil.ignore_patterns("__pycache__"))
    newer = SCHEMA_VERSION + 1
    _replace(
        folder,
        "sql/migrations.py",
        rf"^SCHEMA_VERSION = {SCHEMA_VERSION}$",
        f"SCHEMA_VERSION = {newer}",
    )
    _add_migration(folder, dialect, newer, oldest, sql)
    if dialect == "postgres":  # its two parts have one version
        _add_migration(folder, "postgres_store", newer, 1, "select 1;")
    return folder


def _add_migration(folder: Path, dialect: str, version: int, oldest: int, sql: str) -> None:
    with (folder / f"duly/sql/{dialect}_migrations.sql").open("a") as file:
        file.write(f"\n\n-- name: migration_{version}\n-- oldest: {oldest}\n{sql}\n")


def _replace(folder: Path, file: str, old: str, new: str) -> None:
    path = folder / "duly" / file
    text, count = re.subn(old, new, path.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{file}: {count} times, where it should stand once: {old}"
    path.write_text(text)


def rows(path: Path, sql: str) -> list[tuple[Any, ...]]:
    """What a foreign program reads in the file; nothing where the table is not there yet."""
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        try:
            return connection.execute(sql).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise


def meta(path: Path, prefix: str = "duly_") -> dict[str, Any]:
    """What the database says of itself."""
    return dict(rows(path, f"select name, value from {prefix}meta"))


def shape(path: Path) -> dict[str, Any]:
    """Every table with its columns and indexes, however it came to be."""
    found: dict[str, Any] = {}
    with closing(sqlite3.connect(path)) as connection:
        tables = connection.execute("select name, sql from sqlite_master where type = 'table'")
        for name, sql in tables.fetchall():
            indexes = connection.execute(f"pragma index_list({name})").fetchall()
            found[name] = (
                connection.execute(f"pragma table_xinfo({name})").fetchall(),
                sorted(
                    (
                        index,
                        unique,
                        origin,
                        connection.execute(f"pragma index_xinfo({index})").fetchall(),
                    )
                    for _, index, unique, origin, _ in indexes
                ),
                "without rowid" in sql.lower(),
                "autoincrement" in sql.lower(),
            )
    return found
