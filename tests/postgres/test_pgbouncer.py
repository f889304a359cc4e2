"""Behind PgBouncer in transaction mode: everything works, nothing of a session is left to others.

A real one in front of a real server. What Debian 12 has (1.18) does not follow prepared
statements; where one is installed that does, the same runs with ``?prepare=on`` as well.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import psycopg
import pytest

import duly
from duly.broker import Published
from duly.brokers.postgres import PostgresBroker
from duly.errors import ConfigurationError
from duly.message import Topic
from duly.sql.postgres import Database, health
from duly.worker import Worker
from tests.postgres.brokers import claim, lane, message, opened, take, topic
from tests.postgres.crowd import ONCE, Crowd
from tests.servers.pgbouncer import PgBouncer, version
from tests.servers.postgres import PostgresServer, Schema, shared_url
from tests.waiting import eventually

T = topic()
KEYED = topic("keyed", partitions=2)
FOLLOWS_PREPARED = (1, 21)
orders: Topic[str] = Topic("orders", str, guarantee="exactly-once")
receipts: Topic[str] = Topic("receipts", str, guarantee="at-least-once")
INSERT = "insert into {} values (%s)"


@pytest.fixture
def pooler() -> Iterator[PgBouncer]:
    """Fewer sessions than clients, so that each serves many."""
    with PgBouncer(shared_url(), sessions=3) as running:
        yield running


class Pooled:
    """A test's schema, reached by way of a pooler: `opened` takes it for a `Schema`."""

    def __init__(self, pooler: PgBouncer, schema: Schema, options: str = "") -> None:
        self.url = f"{pooler.url}{options}"
        self.duly = schema.duly


def url_of(pooler: PgBouncer, schema: Schema, options: str = "") -> str:
    return f"{pooler.url}?schema={schema.duly}{options}"


@contextmanager
def working(app: duly.App) -> Iterator[Worker]:
    worker = Worker(app)
    worker.start()
    try:
        yield worker
    finally:
        assert worker.drain(20), "did not drain"


# --- the guarantees


@pytest.mark.parametrize("options", ["", "&prepare=on"], ids=["not prepared", "prepared"])
def test_each_message_takes_effect_once(pg_schema: Schema, options: str):
    """Both colours and a batch handler, on fewer sessions than there are lanes, each statement
    far more often than it takes to be prepared.
    """
    follows = version() >= FOLLOWS_PREPARED
    if options and not follows:
        pytest.skip(f"this PgBouncer ({version()}) does not follow prepared statements")
    more: dict[str, object] = {"max_prepared_statements": 400} if options else {}
    charges = f"{pg_schema.name}.charges"
    with PgBouncer(shared_url(), sessions=3, settings=more) as pooler, pg_schema.connect() as own:
        own.execute("create table charges (name text)")
        own.commit()
        app = duly.App("shop", broker=url_of(pooler, pg_schema, options))
        insert = INSERT.format(charges).encode()

        @app.consumer(orders, name="blocking", guarantee="exactly-once", batch=7)
        def charge(name: str, tx: duly.Transaction[psycopg.Connection]) -> None:
            tx.connection.execute(insert, (f"blocking {name}",))
            tx.publish(receipts, name)

        @app.consumer(orders, name="awaited", guarantee="exactly-once", batch=7)
        async def acharge(name: str, tx: duly.Transaction[psycopg.AsyncConnection]) -> None:
            await tx.connection.execute(insert, (f"awaited {name}",))

        @app.batch_consumer(orders, name="together", guarantee="exactly-once", batch=9)
        def load(names: list[str], tx: duly.Transaction[psycopg.Connection]) -> None:
            tx.connection.cursor().executemany(insert, [(f"together {n}",) for n in names])

        mailed: list[str] = []
        app.consumer(receipts, name="mail", guarantee="at-least-once")(mailed.append)
        names = [f"o-{number}" for number in range(60)]
        with app, working(app):
            for name in names:  # one publish each: the statement would be prepared at the sixth
                app.publish(orders, name, id=name)
            app.publish_many(orders, names, ids=names)  # all of them repeats
            eventually(lambda: len(mailed) >= 60 and _count(own, charges) >= 180, "all is handled")
        wanted = [f"{way} {n}" for way in ("awaited", "blocking", "together") for n in names]
        assert sorted(n for (n,) in own.execute("select name from charges")) == sorted(wanted)
        assert sorted(mailed) == sorted(names)


def test_the_doctor_says_so(pg_schema: Schema, pooler: PgBouncer):
    with closing(Database(pooler.url, schema=pg_schema.duly)) as database:
        [said] = [f for f in health.examine(database) if f.what == "connection"]
    assert said.level == "warning"
    assert "Name the server itself for workers" in said.remedy


def _count(connection: psycopg.Connection[Any], table: str) -> int:
    [(count,)] = connection.execute(f"select count(*) from {table}".encode()).fetchall()
    connection.rollback()
    return int(count)


def test_publishing_within_the_applications_own_transaction(pg_schema: Schema, pooler: PgBouncer):
    """On its own connection, whose statements it does not have prepared either."""
    own = psycopg.connect(pooler.url, prepare_threshold=None)
    with (
        opened(Pooled(pooler, pg_schema), T) as broker,
        duly.App("shop", broker=broker) as app,
        closing(own),
    ):
        for number in range(20):
            app.publish(T, str(number), within=own)
            own.commit()
        app.publish(T, "rolled back", within=own)
        own.rollback()
        assert take(lane(broker, T)) == [str(number) for number in range(20)]


# --- what it says, and what is different


def test_a_worker_says_so_and_leaves_no_session_changed(
    pg_schema: Schema, caplog: pytest.LogCaptureFixture
):
    """One session of the server's for everybody: what stayed on it another client would find."""
    with PgBouncer(shared_url(), sessions=1) as pooler:
        place = Pooled(pooler, pg_schema)
        with (
            caplog.at_level(logging.WARNING, "duly.postgres"),
            opened(place, T, KEYED) as broker,
            psycopg.connect(pooler.url, autocommit=True, prepare_threshold=None) as somebody,
        ):
            subs = lane(broker, T), lane(broker, KEYED, order_by_key=True)
            for number in range(10):
                broker.publish([message(T, str(number)), message(KEYED, str(number))])
                assert [take(sub) for sub in subs] == [[str(number)]] * 2
            assert "behind a pooler in transaction mode" in caplog.text
            [found] = somebody.execute(
                """
                select (select count(*) from pg_listening_channels()),
                    (select count(*) from pg_prepared_statements),
                    (select count(*) from pg_locks
                        where locktype = 'advisory' and pid = pg_backend_pid()),
                    pg_my_temp_schema()::int, coalesce(current_setting('duly.mark', true), ''),
                    current_setting('statement_timeout'), current_setting('synchronous_commit'),
                    current_setting('transaction_isolation'), current_setting('search_path')
                """
            ).fetchall()
            plain = ("0", "on", "read committed", '"$user", public')
            assert found == (0, 0, 0, 0, "", *plain)


def test_a_lane_that_waits_finds_what_is_published_by_looking(pg_schema: Schema, pooler: PgBouncer):
    place = Pooled(pooler, pg_schema)
    with opened(place, T) as here, opened(place, T) as there:
        found: list[str] = []
        sub = lane(here, T)
        waiting = threading.Thread(target=lambda: found.extend(take(sub, wait_s=20)))
        waiting.start()
        there.publish([message(T, "a")])
        waiting.join(30)
        assert found == ["a"]


def test_a_dead_worker_is_known_by_its_lease_alone(pg_schema: Schema, pooler: PgBouncer):
    place = Pooled(pooler, pg_schema)
    with opened(place, T) as dying, opened(place, T) as other:
        dying.publish([message(T, "a")])
        assert len(claim(lane(dying, T, lease_s=3.0))) == 1
        waiting = lane(other, T)
        assert list(claim(waiting, wait_s=1.5)) == [], "its session says nothing of it"
        assert take(waiting, wait_s=20) == ["a"]


def test_in_session_mode_lanes_are_woken(pg_schema: Schema, caplog: pytest.LogCaptureFixture):
    with PgBouncer(shared_url(), mode="session", sessions=20) as pooler:
        place = Pooled(pooler, pg_schema, "?pooler=session")
        with caplog.at_level(logging.WARNING, "duly.postgres"), opened(place, T) as broker:
            broker.publish([message(T, str(number)) for number in range(3)])
            assert len(take(lane(broker, T))) == 3
            [holder] = {d.worker for d in _claims(broker)}
            assert not holder.startswith("-")
        assert not caplog.records


def _claims(broker: PostgresBroker) -> Any:
    broker.publish([message(T, "held")])
    assert len(claim(lane(broker, T))) == 1
    return broker.holders()


def test_without_a_pooler_nothing_is_recognised(pg_schema: Schema, pooler: PgBouncer):
    ways = {}
    for url in (
        shared_url(),
        pooler.url,
        f"{pooler.url}?prepare=on",
        f"{shared_url()}?prepare=off",
    ):
        database = Database(url, schema=pg_schema.duly)
        ways[url] = (database.way.pooled, database.way.prepares)
        database.close()
    assert list(ways.values()) == [(False, True), (True, False), (True, True), (False, False)]


@pytest.mark.parametrize("option", ["pooler=statement", "prepare=maybe"])
def test_an_option_that_means_nothing_is_refused(option: str):
    with pytest.raises(ConfigurationError, match=option.partition("=")[0]):
        Database(f"postgresql://127.0.0.1:1/x?{option}")


# --- cancelling


def test_a_cancelled_handler_cancels_its_own_statement(pg_schema: Schema, pooler: PgBouncer):
    """The request goes to the pooler, which knows whose session it has lent to whom."""
    app = duly.App("shop", broker=url_of(pooler, pg_schema))
    cancelled: list[str] = []

    @app.consumer(orders, name="slow", guarantee="exactly-once", max_run_s=1.0, batch=1)
    async def slow(name: str, tx: duly.Transaction[psycopg.AsyncConnection]) -> None:
        if not cancelled:
            try:
                await tx.connection.execute("select pg_sleep(60)")
            except asyncio.CancelledError:
                cancelled.append(name)
                raise

    bystander = psycopg.connect(pooler.url, prepare_threshold=None)
    with app, bystander, pg_schema.connect(autocommit=True) as watching:
        bystander.execute("select 1")  # holds a session of the pool, in a transaction
        app.publish(orders, "a")
        with working(app) as worker:
            eventually(lambda: worker.counts()["slow"].handled == 1, "the second run ends well")
        assert cancelled == ["a"]
        sleeping = "select count(*) from pg_stat_activity where query like '%pg_sleep(60)%'"
        sleeping += " and state = 'active' and pid <> pg_backend_pid()"
        eventually(lambda: watching.execute(sleeping).fetchone() == (0,), "nobody sleeps any more")
        assert bystander.execute("select 1").fetchone() == (1,)


# --- killed


@pytest.mark.slow
def test_killed_and_started_again_it_loses_nothing(pg_server: PostgresServer):
    """Publishers and a worker go on over three deaths of the pooler, and one of the server."""
    with PgBouncer(pg_server.url, settings={"server_login_retry": 1}) as pooler:
        place = Pooled(pooler, Schema(pg_server.url, "public"))
        with opened(place, ONCE) as broker:
            crowd = Crowd(broker)
            for _ in range(3):
                crowd.some_more()
                pooler.kill()
                pooler.start()
            crowd.some_more()
            pg_server.kill()
            pg_server.start()
            crowd.some_more()
            crowd.end()
    crowd.judge()


def test_a_publish_while_it_is_away_is_certainly_not_stored(pg_schema: Schema, pooler: PgBouncer):
    with opened(Pooled(pooler, pg_schema), T) as broker:
        pooler.kill()
        [outcome] = broker.publish([message(T, "a", id="a")])
        assert not isinstance(outcome, Published)
        pooler.start()
        assert isinstance(broker.publish([message(T, "a", id="a")])[0], Published)
        assert take(lane(broker, T)) == ["a"]
