"""A server that takes writes and is not the one to work: each is refused when it is met."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from duly.brokers.postgres import PostgresBroker
from duly.errors import BrokerUnavailable, BrokerUnusable, PublishFailed
from duly.stores.postgres import PostgresStore
from tests.postgres.brokers import message, publish, topic
from tests.postgres.test_failover import both, fail_over, pair
from tests.servers.postgres import PostgresServer
from tests.waiting import eventually

ONCE = topic("once", "exactly-once")
COUNT = b"select count(*) from duly.messages"


@contextmanager
def opened_on(database: Any) -> Iterator[PostgresBroker]:
    broker = PostgresBroker(database)
    try:
        broker.declare([ONCE])
        yield broker
    finally:
        broker.close()


def stored(server: PostgresServer) -> int:
    with psycopg.connect(server.url) as connection:
        [(count,)] = connection.execute(COUNT).fetchall()
        return int(count)


def goes_on(broker: PostgresBroker, body: str) -> bool:
    try:
        publish(broker, ONCE, body, id=body)
    except AssertionError:
        return False
    return True


def refusal(broker: PostgresBroker, body: str) -> str:
    [outcome] = broker.publish([message(ONCE, body, id=body)])
    assert isinstance(outcome, PublishFailed), outcome
    return str(outcome)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["url", "pool", "function"])
def test_the_old_primary_is_refused_by_who_has_seen_the_new_one(given: str):
    with pair() as (old, new):
        with given_as(given, both(old, new)) as database, opened_on(database) as broker:
            publish(broker, ONCE, "before", id="before")
            eventually(lambda: old.is_level_with(new), "the standby has caught up")
            fail_over(old, new)
            eventually(lambda: goes_on(broker, "after"), "the new primary is worked")
            had = stored(new)
            old.start()
            new.stop()  # every connection is lost, and the name leads to the old one only
            eventually(lambda: "before a failover" in refusal(broker, "lost"), "it is refused")
            new.start()
            old.stop()
            eventually(lambda: goes_on(broker, "at last"), "the new one is worked again")
        assert stored(new) == had + 1
        assert stored(old.start()) == 1


@contextmanager
def given_as(kind: str, url: str) -> Iterator[Any]:
    if kind == "url":
        yield url
    elif kind == "function":
        yield lambda: psycopg.connect(url)
    else:
        pools = pytest.importorskip("psycopg_pool")
        with pools.ConnectionPool(url, min_size=1, max_size=4, timeout=5.0) as pool:
            yield pool


@pytest.mark.slow
def test_who_starts_and_is_led_to_the_old_primary_looks_at_the_others_that_the_url_names(
    caplog: pytest.LogCaptureFixture,
):
    with pair() as (old, new):
        with opened_on(old.url):
            eventually(lambda: old.is_level_with(new), "the standby has caught up")
        fail_over(old, new)
        eventually(lambda: is_writable(new), "the standby is promoted")
        old.start()
        with pytest.raises(BrokerUnavailable, match=r"timeline 1, .* gone on at .* timeline 2"):
            PostgresBroker(both(old, new))
        with caplog.at_level(logging.ERROR, "duly.postgres"), opened_on(both(new, old)) as broker:
            publish(broker, ONCE, "one")
        assert f"127.0.0.1:{old.port} can be written too, on timeline 1" in caplog.text


@pytest.mark.slow
def test_two_standbys_that_were_both_promoted_cannot_be_told_apart():
    with pair() as (old, new), old.standby() as other:
        with opened_on(old.url):
            eventually(lambda: old.is_level_with(new), "one has caught up")
            eventually(lambda: old.is_level_with(other), "the other has caught up")
        fail_over(old, new)
        other.promote()
        eventually(lambda: is_writable(new) and is_writable(other), "both are promoted")
        with pytest.raises(BrokerUnavailable, match="two servers of this cluster can be written"):
            PostgresBroker(both(new, other))


def is_writable(server: PostgresServer) -> bool:
    with psycopg.connect(server.url, autocommit=True) as connection:
        return connection.execute("select pg_is_in_recovery()").fetchone() == (False,)


@pytest.mark.slow
def test_one_server_under_two_names_is_one():
    with PostgresServer(durable=False) as server:
        url = f"postgresql://duly@127.0.0.1:{server.port},localhost:{server.port}/duly"
        with opened_on(url) as broker:
            publish(broker, ONCE, "one")


@pytest.mark.slow
def test_a_dump_restored_at_the_old_address_is_not_gone_on_with():
    """Its transaction ids begin anew: ticks by the old snapshots would never see its messages."""
    with PostgresServer(durable=False) as old, PostgresServer(durable=False) as new:
        with opened_on(old.url) as broker:
            publish(broker, ONCE, "before")
            old.copy_to(new)
            port = old.port
            old.stop()
            new.stop()
            new.port = port
            new.start()
            assert "leads to another PostgreSQL cluster now" in refusal(broker, "lost")
        with pytest.raises(BrokerUnusable, match="duly adopt"):
            PostgresBroker(new.url)
        assert stored(new) == 1


@pytest.mark.slow
def test_a_connection_that_leads_to_a_standby_is_refused():
    with pair() as (primary, standby):
        PostgresStore(primary.url).close()
        with pytest.raises(BrokerUnavailable, match=r"only reads \(a standby\)"):
            PostgresStore(standby.url)


@pytest.mark.slow
def test_no_right_of_a_superuser_is_needed_to_tell_the_timeline():
    with pair() as (old, new):
        with psycopg.connect(old.url, autocommit=True) as connection:
            connection.execute("create role plain login")
            connection.execute("grant create on database duly to plain")
        url = both(old, new).replace("duly@", "plain@")
        with opened_on(url) as broker:
            eventually(lambda: old.is_level_with(new), "the standby has caught up")
            fail_over(old, new)
            eventually(lambda: goes_on(broker, "after"), "the new primary is worked")
        old.start()
        with pytest.raises(BrokerUnavailable, match="timeline 1"):
            PostgresBroker(old.url_of("duly", user="plain"))
