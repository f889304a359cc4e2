"""Versions of duly's tables: how an older database becomes one of this code, and who may use it.

A database remembers the version of its tables and the oldest version of code that may use them.
Code of version N brings older tables up to N by the blocks of ``sql/<dialect>_migrations.sql``.
Each of them declares which code may go on beside it: where it only adds something, that of N-1.
What a block has left behind is refused, whether it opens the database or has it open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from duly.sql.steps import statements

SCHEMA_VERSION = 5

_OLDEST = re.compile(r"^-- name: migration_(\d+)\n-- oldest: (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Migration:
    """From schema ``version - 1`` to ``version``; code older than ``oldest`` must stop then."""

    version: int
    oldest: int
    sql: str


@dataclass(frozen=True, slots=True)
class Schema:
    """What a database says of its tables: their version, and the oldest code that may use them."""

    version: int
    oldest: int

    def refusal(self, place: str) -> str | None:
        """Why this code must not use the tables; None: it may."""
        if self.oldest <= SCHEMA_VERSION:
            return None
        return (
            f"{place}: a newer duly has brought this database to schema {self.version}, which code "
            f"of schema {self.oldest} or later may use, and this process runs schema "
            f"{SCHEMA_VERSION}: upgrade duly here and start it again. Nothing was changed."
        )


def migrations(dialect: str, version: int) -> Sequence[Migration]:
    """What brings tables of this version up to date, in order; none where they are newer.

    Raises `ValueError` where a block is missing, or its oldest version cannot be.
    """
    text = resources.files("duly.sql").joinpath(f"{dialect}_migrations.sql").read_text("utf-8")
    oldest = {int(of): int(least) for of, least in _OLDEST.findall(text)}
    blocks = statements(f"{dialect}_migrations")
    found: list[Migration] = []
    for number in range(version + 1, SCHEMA_VERSION + 1):
        if not 1 <= oldest.get(number, 0) <= number:
            raise ValueError(f"{dialect}_migrations.sql: no migration_{number} with its oldest")
        found.append(Migration(number, oldest[number], blocks[f"migration_{number}"]))
    return found


def after(schema: Schema, steps: Sequence[Migration]) -> Schema:
    """What the database says once these have run."""
    return Schema(
        max([schema.version, *(step.version for step in steps)]),
        max([schema.oldest, *(step.oldest for step in steps)]),
    )


def newest(dialect: str) -> Schema:
    """What a new database says of itself: what one says that has come the whole way."""
    return after(Schema(1, 1), migrations(dialect, 1))
