"""duly's tables in a schema of a database: made, brought up to date, watched for who may use them.

Each part (``broker``, ``store``) has its own version, from the one registry of
`duly.sql.migrations`: a store may be in a database where no log is.

Another process may bring the tables to a schema that this code must not write. So every
transaction compares, in the statement that begins it anyway, and keeps the lock of having read
``meta`` until it ends; a migration takes that table for itself first. Thus nobody is in the
middle of writing when the tables change, and who comes next sees that they have.
"""

from __future__ import annotations

import psycopg

from duly.errors import BrokerUnusable
from duly.sql import migrations
from duly.sql.migrations import SCHEMA_VERSION, Schema
from duly.sql.postgres.statements import for_schema, in_schema, quoted
from duly.sql.postgres.transactions import Say
from duly.sql.steps import Ask, Steps

# How long a migration waits for whoever is at work; who comes meanwhile waits behind it.
_PATIENCE_MS = 5_000


def found(part: str) -> Steps[Schema | None]:
    """What the database says of a part; None: it is not there. Only reads."""
    try:
        rows = yield Ask("version_of", (part,))
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None
    return Schema(*rows[0]) if rows else None


def require(schema: Schema | None, shown: str) -> bool:
    """Whether a part is as this code has it. Raises `BrokerUnusable` where it is beyond it."""
    if schema is None:
        return False
    if refusal := schema.refusal(shown):
        raise BrokerUnusable(refusal)
    return schema.version >= SCHEMA_VERSION


def bring_up(part: str, dialect: str, schema: str, identity: str, shown: str) -> Steps[None]:
    """Make what is missing of a part, or bring up what is older, in one transaction."""
    # One at a time, over all hosts: "if not exists" alone fails where two create.
    yield Say(f"select pg_advisory_xact_lock(hashtext('duly schema {identity}'))")
    yield Say(f"create schema if not exists {quoted(schema)}")
    meta = in_schema("postgres_meta", schema)
    yield Say(meta["create_meta"])
    there = yield from found(part)
    if require(there, shown):
        return  # by another, meanwhile
    if there is None:
        for name, text in in_schema(dialect, schema).items():
            if name.startswith("create_"):
                yield Say(text)
        reached = migrations.newest(dialect)
    else:
        yield Say(f"select set_config('lock_timeout', '{_PATIENCE_MS}', true)")
        yield Say(meta["take_meta"])
        steps = migrations.migrations(dialect, there.version)
        for step in steps:
            yield Say(for_schema(step.sql, schema))
        reached = migrations.after(there, steps)
    yield Ask("set_version", (part, reached.version, reached.oldest))


def fits(schema: str) -> str:
    """SQL that is true where this code may use the tables."""
    meta = f"{quoted(schema)}.meta"
    # Half as long to plan as comparing the greatest, which every transaction would pay.
    return f"(not exists (select from {meta} where oldest > {SCHEMA_VERSION}))"


def left_behind(shown: str) -> Steps[None]:
    """Raise `BrokerUnusable`, saying what the database was brought to."""
    for version, oldest in (yield Ask("left_behind", (SCHEMA_VERSION,))):
        raise BrokerUnusable(Schema(version, oldest).refusal(shown))
