"""The tables in PostgreSQL: an older schema becomes this one; upgrades beside work in flight."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

import duly
from duly.errors import BrokerUnavailable, BrokerUnusable
from duly.guarantees import Done
from duly.sql import log
from duly.sql.migrations import SCHEMA_VERSION
from duly.sql.postgres import OwnLine
from duly.sql.postgres.statements import for_schema
from duly.stores.postgres import PostgresStore
from tests.postgres.brokers import claim, drain, lane, opened, publish, publish_in, topic
from tests.schema.versions import NOW, WITH_CODE, newer_code
from tests.servers.postgres import Schema
from tests.sqlite.programs import Program, run, running
from tests.waiting import eventually

SCHEMA_1 = (Path(__file__).parent / "postgres_1.sql").read_text()
NEXT = SCHEMA_VERSION + 1
T = topic()
ADDS = "alter table duly.messages add column colour text;"
BREAKS = "alter table duly.messages rename column source to origin;"
LEFT_BEHIND = (
    rf"schema {NEXT}, which code of schema {NEXT} or later may use, .* runs schema "
    rf"{SCHEMA_VERSION}: upgrade duly here and start it again\. Nothing was changed\."
)

OPEN = f"""
{WITH_CODE}
from duly.brokers.postgres import PostgresBroker
from duly.errors import DulyError
try:
    PostgresBroker(sys.argv[2], schema=sys.argv[3]).close()
    print("opened")
except DulyError as error:
    print(type(error).__name__, error)
"""


def older_schema(schema: Schema) -> None:
    """A log and a store of schema 1, with nothing in it."""
    with schema.connect(autocommit=True) as connection:
        connection.execute(f"create schema {schema.duly}".encode())
        connection.execute(for_schema(SCHEMA_1, schema.duly).encode())
        connection.execute(
            f"insert into {schema.duly}.meta values ('broker', 1), ('store', 1)".encode()
        )


def shape(schema: Schema) -> dict[str, Any]:
    """Every table, view, column, index and function, however it came to be."""
    found: dict[str, Any] = {}
    with schema.connect(autocommit=True) as connection:
        for what, query in {
            "columns": "select c.relname, a.attname, format_type(a.atttypid, a.atttypmod), "
            "a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attidentity, a.attstorage "
            "from pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 "
            "left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum "
            "where c.relnamespace = %s::regnamespace and c.relkind in ('r', 'v') order by 1, 2",
            "indexes": "select tablename, indexname, indexdef from pg_indexes "
            "where schemaname = %s order by 1, 2",
            "constraints": "select conrelid::regclass::text, pg_get_constraintdef(oid) "
            "from pg_constraint where connamespace = %s::regnamespace order by 1, 2",
            "views": "select viewname, definition from pg_views where schemaname = %s order by 1",
            "functions": "select proname, prosrc, provolatile from pg_proc "
            "where pronamespace = %s::regnamespace order by 1",
            "sequences": "select sequencename from pg_sequences where schemaname = %s order by 1",
        }.items():
            found[what] = connection.execute(query.encode(), (schema.duly,)).fetchall()
        found["meta"] = meta(schema)
    return found


def meta(schema: Schema) -> dict[str, list[int]]:
    with schema.connect(autocommit=True) as connection:
        query = f"select part, version, oldest from {schema.duly}.meta order by part"
        return {part: told for part, *told in connection.execute(query.encode())}


def test_an_older_schema_becomes_what_a_new_one_is(pg_schema: Schema):
    older_schema(pg_schema)
    brought_up = _opened_both(pg_schema)
    with pg_schema.connect(autocommit=True) as connection:
        connection.execute(f"drop schema {pg_schema.duly} cascade".encode())
    assert brought_up == _opened_both(pg_schema)
    assert brought_up["meta"] == {"broker": [SCHEMA_VERSION, 2], "store": [SCHEMA_VERSION, 1]}


def _opened_both(schema: Schema) -> dict[str, Any]:
    with opened(schema, T):
        PostgresStore(schema.url, schema=schema.duly).close()
    return shape(schema)


def test_what_an_older_log_holds_is_worked_on(pg_schema: Schema):
    older_schema(pg_schema)
    with pg_schema.connect(autocommit=True) as connection:
        line = OwnLine(connection, pg_schema.duly)
        line.run(log.declare([T]))
        publish_in(connection, pg_schema, T, "older")
    with opened(pg_schema, T) as broker:
        publish(broker, T, "newer")
        sub = lane(broker, T)
        assert drain(sub) == ["older", "newer"]
        assert broker.pause("sub")


def test_code_that_was_left_behind_is_refused_in_one_sentence(tmp_path: Path, pg_schema: Schema):
    newer = newer_code(tmp_path / "newer", ADDS, oldest=NEXT, dialect="postgres")
    place = (pg_schema.url, pg_schema.duly)
    assert run(OPEN, newer, *place) == ["opened"]
    [said] = run(OPEN, NOW, *place)
    assert said.startswith("BrokerUnusable")
    assert f"a newer duly has brought this database to schema {NEXT}" in said
    assert said.endswith("upgrade duly here and start it again. Nothing was changed.")
    assert run(OPEN, newer, *place) == ["opened"]


def test_what_is_open_is_left_behind_in_the_middle_of_its_work(tmp_path: Path, pg_schema: Schema):
    newer = newer_code(tmp_path / "code", BREAKS, oldest=NEXT, dialect="postgres")
    with opened(pg_schema, T) as broker, pg_schema.connect() as own:
        store = PostgresStore(
            pg_schema.url,
            schema=pg_schema.duly,
            broker_database=broker.capabilities.database,
            log=broker.log,
        )
        sub = lane(broker, T)
        publish(broker, T, "before")
        [held] = claim(sub)
        assert run(OPEN, newer, pg_schema.url, pg_schema.duly) == ["opened"]
        [outcome] = broker.publish([T.message("after", source="tests")])
        assert isinstance(outcome, duly.PublishFailed)
        with pytest.raises(duly.PublishFailed, match=LEFT_BEHIND):
            raise outcome
        with pytest.raises(BrokerUnusable, match=LEFT_BEHIND):
            sub.settle([Done(held.receipt)])
        with pytest.raises(BrokerUnusable, match=LEFT_BEHIND):
            store.begin(None)
        own.execute("select 1")
        with pytest.raises(BrokerUnusable, match=LEFT_BEHIND):
            store.publish_within(own, [T.message("x", source="tests")], [T])
        own.rollback()
        store.close()
    with pg_schema.connect(autocommit=True) as connection:
        query = f"select count(*) from {pg_schema.duly}.messages"
        assert connection.execute(query.encode()).fetchall() == [(1,)]


def test_what_is_open_goes_on_while_newer_code_adds(tmp_path: Path, pg_schema: Schema):
    newer = newer_code(tmp_path / "code", ADDS, oldest=SCHEMA_VERSION, dialect="postgres")
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, "before")
        assert run(OPEN, newer, pg_schema.url, pg_schema.duly) == ["opened"]
        publish(broker, T, "after")
        assert drain(sub) == ["before", "after"]
    assert run(OPEN, NOW, pg_schema.url, pg_schema.duly) == ["opened"]


def test_a_migration_waits_for_a_transaction_and_gives_up_on_a_long_one(
    tmp_path: Path, pg_schema: Schema
):
    """Nobody is in the middle of writing when the tables change."""
    newer = newer_code(tmp_path / "code", BREAKS, oldest=NEXT, dialect="postgres")
    with opened(pg_schema, T) as broker:
        store = PostgresStore(
            pg_schema.url,
            schema=pg_schema.duly,
            broker_database=broker.capabilities.database,
            log=broker.log,
        )
        session = store.begin(None)
        session.publish([T.message("at work", source="tests")])
        [said] = run(OPEN, newer, pg_schema.url, pg_schema.duly)
        assert said.startswith(BrokerUnavailable.__name__)
        assert "open for long" in said
        session.commit()
        store.close()
        assert drain(lane(broker, T)) == ["at work"]
    assert run(OPEN, newer, pg_schema.url, pg_schema.duly) == ["opened"]


# --- a rolling upgrade, with messages in flight

APP = f"""
{WITH_CODE}
import random, threading
import psycopg
import duly
from duly.sql.migrations import SCHEMA_VERSION
from duly.worker import Worker

orders = duly.Topic("orders", int, guarantee="exactly-once")
receipts = duly.Topic("receipts", int, guarantee="at-least-once")
app = duly.App("shop", broker=sys.argv[2])
retry = duly.RetryPolicy(attempts=50, first_s=0.05, longest_s=0.1)

@app.consumer(orders, name="billing", guarantee="exactly-once", batch=5, retry=retry)
def charge(n: int, tx: duly.Transaction[psycopg.Connection]) -> None:
    if n % 7 == 0 and random.random() < 0.5:
        raise ValueError("try again")
    tx.connection.execute("insert into charges values (%s, %s)", (n, SCHEMA_VERSION))
    tx.publish(receipts, n, id=str(n))

@app.consumer(receipts, name="mail", guarantee="at-least-once")
def send(n: int) -> None:
    pass

told = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
"""

WORKER = f"""
{APP}
worker = Worker(app)
worker.start()
print("working with schema", SCHEMA_VERSION)
told.wait()
worker.drain()
print("drained")
"""

# Some are due later: they are parked while the tables change.
PUBLISHER = f"""
{APP}
n = int(sys.argv[3])
while not told.wait(0.002):
    app.publish(orders, n, id=str(n), delay_s=0.3 if n % 10 == 0 else None)
    print(n)
    n += 1
print("done")
"""


class Crowd:
    """The workers and publishers of one log."""

    def __init__(self, schema: Schema, newer: Path, stack: ExitStack) -> None:
        self._schema = schema
        self._newer = newer
        self._stack = stack
        self._published = 0
        mark = "&" if "?" in schema.url else "?"
        self._url = f"{schema.url}{mark}schema={schema.duly}"
        self.rows("create table charges (n integer, schema integer)")

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self._schema.url, autocommit=True) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []

    def worker(self, version: int) -> Program:
        program = self._start(WORKER, version)
        program.expect(f"working with schema {version}")
        return program

    def publisher(self, version: int) -> Program:
        self._published += 1_000_000
        return self._start(PUBLISHER, version, self._published)

    def _start(self, source: str, version: int, *args: object) -> Program:
        code = NOW if version == SCHEMA_VERSION else self._newer
        return self._stack.enter_context(running(source, code, self._url, *args))

    def charged(self) -> list[int]:
        return [n for (n,) in self.rows("select n from charges")]

    def more_by(self, version: int) -> None:
        """Wait until workers of this version have done some more."""
        query = f"select n from charges where schema = {version}"
        already = len(self.rows(query))
        eventually(lambda: len(self.rows(query)) >= already + 40, f"work done by schema {version}")

    def version(self) -> int:
        return meta(self._schema)["broker"][0]

    def dead(self) -> list[tuple[Any, ...]]:
        return self.rows(f"select * from {self._schema.duly}.dead")


def end(program: Program) -> list[str]:
    program.tell("that is all")
    said = program.rest()
    assert program.process.returncode == 0, "\n".join(said[-20:])
    return said


@pytest.mark.parametrize("first", ["workers", "publishers", "all at once"])
def test_nothing_is_lost_or_charged_twice(first: str, tmp_path: Path, pg_schema: Schema):
    newer = newer_code(tmp_path / "newer", ADDS, oldest=SCHEMA_VERSION, dialect="postgres")
    with ExitStack() as stack:
        crowd = Crowd(pg_schema, newer, stack)
        old_worker, old_publisher = crowd.worker(SCHEMA_VERSION), crowd.publisher(SCHEMA_VERSION)
        crowd.more_by(SCHEMA_VERSION)
        if first == "all at once":
            for old in (old_publisher, old_worker):
                old.signal(signal.SIGKILL)
            published = [old_publisher.rest()]
            worker, publisher = crowd.worker(NEXT), crowd.publisher(NEXT)
        elif first == "workers":
            worker = crowd.worker(NEXT)
            crowd.more_by(SCHEMA_VERSION)  # side by side
            crowd.more_by(NEXT)
            assert end(old_worker)[-1] == "drained"
            publisher = crowd.publisher(NEXT)
            published = [end(old_publisher)]
        else:
            publisher = crowd.publisher(NEXT)
            eventually(lambda: crowd.version() == NEXT, "the new tables")
            crowd.more_by(SCHEMA_VERSION)  # what both published
            published = [end(old_publisher)]
            worker = crowd.worker(NEXT)
            assert end(old_worker)[-1] == "drained"
        crowd.more_by(NEXT)
        assert crowd.version() == NEXT
        published.append(end(publisher))
        acknowledged = {int(line) for said in published for line in said if line.isdigit()}
        eventually(lambda: acknowledged <= set(crowd.charged()), "every message charged")
        assert end(worker)[-1] == "drained"
    charged = crowd.charged()
    assert len(charged) == len(set(charged)), "charged twice"
    # What was being published as its publisher was killed may be there.
    assert len(set(charged) - acknowledged) <= (first == "all at once")
    assert crowd.dead() == []
