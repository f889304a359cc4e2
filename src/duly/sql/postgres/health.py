"""What endangers a PostgreSQL database: settings, old snapshots, and how much is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg

from duly.errors import BrokerError
from duly.inspection.health import Finding
from duly.sql.postgres.database import Database
from duly.sql.postgres.errors import first_line
from duly.sql.postgres.pooling import Way

# Clocks of hosts that are kept in step differ by less.
_CLOCKS_S = 5.0
# A worker keeps one connection and takes one more for each lane that is at work.
_LEAST_FREE = 10
# Autovacuum freezes from 200 million on; at two thousand million the server stops taking writes.
_OLD_XIDS, _TOO_OLD_XIDS = 1_000_000_000, 1_500_000_000
# For as long as a snapshot is held, nothing that was deleted since can be made room of.
_LONG_SNAPSHOT_S = 600
# A log this dead is walked through by whoever looks for what lives.
_MANY_DEAD = 100_000
_OLDEST_GOOD = "14"


class _Server(NamedTuple):
    version: str
    version_no: int
    recovering: bool
    read_only: bool
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    standby_names: str
    most: int
    reserved: int
    used: int
    autovacuum: str
    xid_age: int
    slots: int
    epoch_s: float


_SERVER = """
select current_setting('server_version'), current_setting('server_version_num')::int,
    pg_is_in_recovery(), current_setting('transaction_read_only')::boolean,
    current_setting('fsync'), current_setting('full_page_writes'),
    current_setting('synchronous_commit'), current_setting('synchronous_standby_names'),
    current_setting('max_connections')::int,
    current_setting('superuser_reserved_connections')::int,
    (select count(*) from pg_stat_activity where backend_type = 'client backend')::int,
    current_setting('autovacuum'),
    (select max(age(datfrozenxid)) from pg_database)::int,
    (select count(*) from pg_replication_slots
        where not active and age(coalesce(xmin, catalog_xmin)) > 1000000)::int,
    extract(epoch from clock_timestamp())::float8
"""

_SNAPSHOTS = """
select pid, coalesce(application_name, ''), coalesce(state, ''),
    extract(epoch from clock_timestamp() - coalesce(xact_start, query_start))::float8
from pg_stat_activity
where (backend_xmin is not null or backend_xid is not null) and pid <> pg_backend_pid()
and datname = current_database() and backend_type = 'client backend'
and clock_timestamp() - coalesce(xact_start, query_start) > make_interval(secs => %s)
order by 4 desc limit 3
"""

_PREPARED = """
select gid, extract(epoch from clock_timestamp() - prepared)::float8 from pg_prepared_xacts
where database = current_database() and clock_timestamp() - prepared > make_interval(secs => %s)
order by 2 desc limit 3
"""

_TABLES = """
select c.relname, coalesce(s.n_dead_tup, 0)::bigint, coalesce(s.n_live_tup, 0)::bigint,
    pg_total_relation_size(c.oid)::bigint
from pg_class c join pg_namespace n on n.oid = c.relnamespace
    left join pg_stat_all_tables s on s.relid = c.oid
where n.nspname = %s and c.relkind = 'r'
"""

_TRIGGERS = """
select c.relname || '.' || t.tgname from pg_trigger t join pg_class c on c.oid = t.tgrelid
    join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %s and not t.tgisinternal order by 1
"""


def examine(database: Database) -> Iterator[Finding]:
    """Everything that can be seen from here; changes nothing."""
    try:
        with database.connection() as connection:
            yield from _on(connection, database.schema)
        yield _way(database.way)
    except BrokerError as error:
        yield Finding("wrong", "server", str(error), "Look at the server and the way to it.")
    except psycopg.Error as error:
        yield Finding(
            "wrong", "server", f"{database.shown}: {first_line(error)}", "Look at the server's log."
        )


def _on(connection: psycopg.Connection[Any], schema: str) -> Iterator[Finding]:
    before_s = time.time()
    [row] = connection.execute(_SERVER).fetchall()
    server = _Server(*row)
    local_s = (before_s + time.time()) / 2
    yield _version(server)
    yield _role(server)
    yield from _durability(server)
    yield _connections(server)
    yield _clock(server.epoch_s - local_s)
    yield _wraparound(server)
    yield from _snapshots(connection, server)
    yield from _tables(connection, schema)


def _version(server: _Server) -> Finding:
    if server.version_no >= int(_OLDEST_GOOD) * 10_000:
        return Finding("ok", "PostgreSQL", server.version)
    return Finding("wrong", "PostgreSQL", server.version, f"Use {_OLDEST_GOOD} or newer.")


def _role(server: _Server) -> Finding:
    if server.recovering:
        return Finding(
            "wrong",
            "server",
            "a standby: it only reads",
            "Name the primary, or several hosts with target_session_attrs=read-write.",
        )
    if server.read_only:
        return Finding(
            "wrong",
            "server",
            "transactions only read (default_transaction_read_only)",
            "alter role ... set default_transaction_read_only = off",
        )
    return Finding("ok", "server", "a primary that can be written")


def _durability(server: _Server) -> Iterator[Finding]:
    if server.fsync != "on":
        yield Finding(
            "wrong",
            "fsync",
            "off: what was acknowledged is lost, and the database may be damaged, when the "
            "machine stops",
            "fsync = on in postgresql.conf, and restart the server.",
        )
    if server.full_page_writes != "on":
        yield Finding(
            "wrong",
            "full_page_writes",
            "off: a machine that stops in the middle of a write damages pages",
            "full_page_writes = on in postgresql.conf, and reload.",
        )
    if server.fsync == server.full_page_writes == "on":
        yield Finding("ok", "durability", "fsync and full_page_writes are on")
    if server.synchronous_commit == "off":
        yield Finding(
            "warning",
            "synchronous_commit",
            "off: duly sets it on in its own transactions, and your own (within=) are refused",
            "alter role ... set synchronous_commit = on",
        )
    elif server.synchronous_commit == "local" and server.standby_names:
        yield Finding(
            "warning",
            "synchronous_commit",
            "local: commits do not wait for the synchronous standby, and a failover may lose them",
            "alter role ... set synchronous_commit = on",
        )
    else:
        waits = f", waits for {server.standby_names}" if server.standby_names else ""
        yield Finding("ok", "synchronous_commit", f"{server.synchronous_commit}{waits}")


def _connections(server: _Server) -> Finding:
    free = server.most - server.reserved - server.used
    found = f"{server.used:,} of {server.most - server.reserved:,} in use"
    if free < _LEAST_FREE:
        return Finding(
            "warning",
            "connections",
            found,
            "Raise max_connections, or give duly a pool with a limit: a worker that gets none "
            "claims nothing.",
        )
    return Finding("ok", "connections", found)


def _clock(ahead_s: float) -> Finding:
    if abs(ahead_s) <= _CLOCKS_S:
        return Finding("ok", "clocks", f"server and this host {abs(ahead_s):.1f} s apart")
    return Finding(
        "warning",
        "clocks",
        f"the server's is {ahead_s:+,.1f} s from this host's",
        "Keep both in step (NTP): leases and due times go by the server's, the time of a message "
        "by its publisher's.",
    )


def _wraparound(server: _Server) -> Finding:
    age = server.xid_age
    found = f"the oldest unfrozen is {age:,} transactions old"
    remedy = (
        "vacuum freeze the database that pg_database.datfrozenxid shows; look for what holds it "
        "back: old snapshots, prepared transactions, replication slots."
    )
    if age > _TOO_OLD_XIDS:
        return Finding("wrong", "transaction ids", found, f"Soon nothing can be written: {remedy}")
    if age > _OLD_XIDS or server.autovacuum != "on":
        off = "; autovacuum is off" if server.autovacuum != "on" else ""
        remedy = "autovacuum = on" if off else remedy
        return Finding("warning", "transaction ids", found + off, remedy)
    return Finding("ok", "transaction ids", found)


def _snapshots(connection: psycopg.Connection[Any], server: _Server) -> Iterator[Finding]:
    held = 0
    for pid, name, state, age_s in connection.execute(_SNAPSHOTS, (_LONG_SNAPSHOT_S,)):
        held += 1
        yield Finding(
            "warning",
            "snapshots",
            f"session {pid}{f' ({name})' if name else ''} has held one for {age_s / 60:,.0f} min "
            f"({state or 'unknown'})",
            f"End it if nobody needs it (select pg_terminate_backend({pid})): until then dead rows "
            "stay, and what it has published does not come.",
        )
    for gid, age_s in connection.execute(_PREPARED, (_LONG_SNAPSHOT_S,)):
        held += 1
        yield Finding(
            "warning",
            "snapshots",
            f"transaction {gid!r} was prepared {age_s / 60:,.0f} min ago",
            "COMMIT PREPARED or ROLLBACK PREPARED it: until then dead rows stay.",
        )
    if server.slots:
        held += 1
        yield Finding(
            "warning",
            "snapshots",
            f"{server.slots} replication slots that nobody reads hold one",
            "Drop those that are not needed (pg_drop_replication_slot).",
        )
    if not held:
        yield Finding("ok", "snapshots", "none is held for long")


def _tables(connection: psycopg.Connection[Any], schema: str) -> Iterator[Finding]:
    triggers = [name for (name,) in connection.execute(_TRIGGERS, (schema,))]
    if triggers:
        more = f" and {len(triggers) - 4} more" if len(triggers) > 4 else ""
        yield Finding(
            "wrong",
            "triggers",
            f"on duly's tables: {', '.join(triggers[:4])}{more}",
            "Drop them: what they do becomes part of every claim and settlement.",
        )
    rows = connection.execute(_TABLES, (schema,)).fetchall()
    size = sum(bytes for *_, bytes in rows)
    bloated = [name for name, dead, live, _ in rows if dead > max(_MANY_DEAD, 2 * live)]
    found = f"{size // (1024 * 1024):,} MiB in {len(rows)} tables"
    if bloated:
        yield Finding(
            "warning",
            "tables",
            f"{found}; mostly dead rows in {', '.join(sorted(bloated))}",
            "Let autovacuum come to them (autovacuum_vacuum_scale_factor), or vacuum them.",
        )
    else:
        # How much the disk has left, no role but a superuser's may ask.
        yield Finding("ok", "tables", f"{found}; watch the room of the server's disk there")


def _way(way: Way) -> Finding:
    """Whether sessions are lent by the transaction; see `duly.sql.postgres.pooling`."""
    if not way.pooled:
        return Finding("ok", "connection", "to the server itself")
    return Finding(
        "warning",
        "connection",
        "a pooler stands between: lanes look every 0.05 s instead of being woken, and a dead "
        "worker is known by its lease",
        "Name the server itself for workers, and the pooler for whoever only publishes.",
    )
