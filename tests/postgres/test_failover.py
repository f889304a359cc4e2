"""The primary dies, its standby is promoted, and a URL that names both goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

import duly
from duly.broker import Published, RepeatDropped
from duly.errors import DulyError
from duly.message import Topic
from duly.worker import Worker
from tests.postgres.brokers import opened, topic
from tests.postgres.crowd import Crowd
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

SETTINGS = ["max_wal_senders=4"]
ONCE = topic("once", "exactly-once")
orders: Topic[str] = Topic("orders", str, guarantee="exactly-once")
CHARGES = "create table if not exists charges (name text)"


def both(*servers: PostgresServer) -> str:
    """A URL that names several servers and wants the one that can be written to."""
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return f"postgresql://duly@{hosts}/duly?target_session_attrs=read-write&connect_timeout=5"


@contextmanager
def pair() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """A primary, and a standby that follows it asynchronously."""
    with (
        PostgresServer(durable=False, settings=SETTINGS) as primary,
        primary.standby() as standby,
    ):
        yield primary, standby


def wait_for_standby(primary: PostgresServer) -> None:
    """From now on a commit is acknowledged when the standby has it on disk."""
    with psycopg.connect(primary.url, autocommit=True) as connection:
        connection.execute("alter system set synchronous_standby_names = '*'")
        connection.execute("select pg_reload_conf()")
        sync = "select sync_state from pg_stat_replication"
        eventually(lambda: connection.execute(sync).fetchone() == ("sync",), "it is waited for")


def cut_off(standby: PostgresServer) -> None:
    """What is committed from now on does not reach the standby any more."""
    with psycopg.connect(standby.url, autocommit=True) as connection:
        connection.execute("alter system set primary_conninfo = ''")
        connection.execute("select pg_reload_conf()")
        receiving = "select count(*) from pg_stat_wal_receiver"
        eventually(lambda: connection.execute(receiving).fetchone() == (0,), "nothing is received")


def fail_over(primary: PostgresServer, standby: PostgresServer) -> None:
    primary.kill()
    standby.promote()


@pytest.mark.slow
def test_publishers_and_workers_go_on_and_nothing_acknowledged_is_lost():
    """Synchronous: what the old primary acknowledged, the new one has."""
    with pair() as (primary, standby):
        wait_for_standby(primary)
        with opened(Schema(both(primary, standby), "public"), ONCE) as broker:
            crowd = Crowd(broker)
            crowd.some_more()
            fail_over(primary, standby)
            crowd.some_more()
            crowd.end()
        crowd.judge()


@pytest.mark.slow
def test_effects_are_once_across_a_failover():
    """A worker in each colour, a publisher that repeats what it is not sure of, one failover."""
    with pair() as (primary, standby):
        wait_for_standby(primary)
        url = both(primary, standby)
        with psycopg.connect(url) as connection:
            connection.execute(CHARGES)
        app = duly.App("shop", broker=url)

        @app.consumer(orders, name="blocking", guarantee="exactly-once", batch=5, lease_s=3.0)
        def charge(name: str, tx: duly.Transaction[psycopg.Connection]) -> None:
            tx.connection.execute("insert into charges values (%s)", (f"blocking {name}",))

        @app.consumer(orders, name="awaited", guarantee="exactly-once", batch=5, lease_s=3.0)
        async def acharge(name: str, tx: duly.Transaction[psycopg.AsyncConnection]) -> None:
            await tx.connection.execute("insert into charges values (%s)", (f"awaited {name}",))

        acknowledged: list[str] = []
        stop = threading.Event()

        def publish() -> None:
            while not stop.is_set():
                name = f"o-{len(acknowledged)}"
                try:
                    app.publish(orders, name, id=name)
                except DulyError:
                    continue  # nobody knows: the same once more
                acknowledged.append(name)

        with app:
            publisher = threading.Thread(target=publish)
            with Worker(app):
                publisher.start()
                eventually(lambda: len(acknowledged) > 40, "some are published")
                fail_over(primary, standby)
                enough = len(acknowledged) + 40
                eventually(lambda: len(acknowledged) > enough, "publishing goes on")
                stop.set()
                publisher.join(30)
                wanted = sorted(f"{w} {n}" for w in ("awaited", "blocking") for n in acknowledged)
                eventually(lambda: len(charged(standby)) >= len(wanted), "all took effect")
        assert sorted(charged(standby)) == wanted
        the_old_one_may_follow(primary, standby, acknowledged[0])


def the_old_one_may_follow(old: PostgresServer, new: PostgresServer, known: str) -> None:
    """Brought back as operators do, as a standby: a URL that names it first passes it over."""
    eventually(lambda: _writable(new), "the standby is promoted")
    with new.standby(port=old.port), duly.App("shop", broker=both(old, new)) as app:
        assert isinstance(app.publish(orders, known, id=known), RepeatDropped)


def _writable(server: PostgresServer) -> bool:
    with psycopg.connect(server.url, autocommit=True) as connection:
        return connection.execute("select pg_is_in_recovery()").fetchone() == (False,)


def charged(server: PostgresServer) -> list[str]:
    with psycopg.connect(server.url) as connection:
        return [name for (name,) in connection.execute("select name from charges")]


@pytest.mark.slow
def test_what_an_asynchronous_standby_had_not_received_is_lost_together():
    """Message, effect, settlement and identity: none of them stands without the others. What
    was handled and lost is handled again, once; what was published and lost is published anew.
    """
    with pair() as (primary, standby):
        url = both(primary, standby)
        with psycopg.connect(url) as connection:
            connection.execute(CHARGES)
        app = duly.App("shop", broker=url)

        @app.consumer(orders, name="billing", guarantee="exactly-once")
        def charge(name: str, tx: duly.Transaction[psycopg.Connection]) -> None:
            tx.connection.execute("insert into charges values (%s)", (name,))

        with app:
            app.publish(orders, "received", id="received")
            eventually(lambda: primary.is_level_with(standby), "the standby has caught up")
            cut_off(standby)
            app.publish(orders, "lost", id="lost")
            with Worker(app):
                eventually(lambda: len(charged(primary)) == 2, "both took effect")
            fail_over(primary, standby)
            eventually(lambda: _takes(app, "new"), "the new primary takes messages")
            assert isinstance(app.publish(orders, "received", id="received"), RepeatDropped)
            assert isinstance(app.publish(orders, "lost", id="lost"), Published)
            with Worker(app):
                eventually(lambda: len(charged(standby)) >= 3, "all took effect")
        assert sorted(charged(standby)) == ["lost", "new", "received"]


def _takes(app: duly.App, name: str) -> bool:
    try:
        app.publish(orders, name, id=name)
    except DulyError:
        return False
    return True
