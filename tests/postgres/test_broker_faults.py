"""Connections cut at every point, servers killed, standbys promoted: what is promised holds."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from duly import cli
from duly.brokers.postgres import PostgresBroker
from duly.errors import BrokerUnavailable, BrokerUnusable, CommitUnknown
from duly.guarantees import Done
from tests.postgres.brokers import (
    claim,
    drain,
    lane,
    message,
    opened,
    publish,
    publish_in,
    take,
    topic,
)
from tests.postgres.crowd import ONCE, Crowd, kinds
from tests.postgres.proxy import Cut, Proxy
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

T = topic()


@pytest.fixture
def proxy(pg_schema: Schema) -> Iterator[Proxy]:
    port = conninfo_to_dict(pg_schema.url)["port"]
    with Proxy(int(str(port))) as between:
        yield between


def by(proxy: Proxy, schema: Schema) -> PostgresBroker:
    return PostgresBroker(proxy.url(schema.url), schema=schema.duly)


# --- a connection that is lost


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publish_whose_commit_was_not_answered_is_unknown(
    pg_schema: Schema, proxy: Proxy, when: Cut
):
    broker = by(proxy, pg_schema)
    broker.declare([ONCE])
    one = message(ONCE, "a", id="one")
    proxy.cut_at(b"and commits", when)
    [outcome] = broker.publish([one])
    assert (type(outcome).__name__, proxy.cuts) == ("PublishUnknown", 1)
    assert getattr(outcome, "message_id", None) == "one"
    [again] = broker.publish([one])
    assert type(again).__name__ == ("Published" if when == "before" else "RepeatDropped")
    assert drain(lane(broker, ONCE)) == ["a"]
    broker.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_publish_of_several_topics_is_as_unknown_as_its_commit(
    pg_schema: Schema, proxy: Proxy, when: Cut
):
    broker = by(proxy, pg_schema)
    broker.declare([ONCE, T])
    both = [message(ONCE, "a", id="one"), message(T, "b")]
    proxy.cut_at(b"commit\0", when)
    assert kinds(broker.publish(both)) == ["PublishUnknown"] * 2
    stands = when == "after"
    assert drain(lane(broker, ONCE)) == ["a"] * stands
    assert drain(lane(broker, T)) == ["b"] * stands
    broker.close()


def test_a_publish_that_was_cut_before_its_commit_is_done_again(pg_schema: Schema, proxy: Proxy):
    broker = by(proxy, pg_schema)
    broker.declare([ONCE, T])
    proxy.cut_at(b"batches", "after")
    both = [message(ONCE, "a", id="one"), message(T, "b")]
    assert kinds(broker.publish(both)) == ["Published"] * 2
    assert proxy.cuts == 1
    assert drain(lane(broker, ONCE)) == ["a"]
    broker.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_settlement_whose_commit_was_not_answered_is_neither(
    pg_schema: Schema, proxy: Proxy, when: Cut
):
    broker = by(proxy, pg_schema)
    broker.declare([T])
    publish(broker, T, "a")
    sub = lane(broker, T)
    held = claim(sub)
    proxy.cut_at(b"commit\0", when)
    with pytest.raises(CommitUnknown):
        sub.settle([Done(held[0].receipt)])
    # Asked again it shows: what was settled is refused as lost, what was not is settled now.
    refused = list(sub.settle([Done(held[0].receipt)]))
    assert refused == ([] if when == "before" else [held[0].receipt])
    assert drain(sub) == []
    broker.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_claim_whose_commit_was_not_answered_comes_again(
    pg_schema: Schema, proxy: Proxy, when: Cut
):
    broker = by(proxy, pg_schema)
    broker.declare([T])
    publish(broker, T, "a")
    sub = lane(broker, T, lease_s=1.0)
    assert take(sub) == ["a"]
    publish(broker, T, "b")
    sub._shared.ticker.tick()  # the next COMMIT is the claim's
    proxy.cut_at(b"commit\0", when)
    with pytest.raises(CommitUnknown):
        claim(sub)
    assert bodies_of(claim(sub, wait_s=10)) == ["b"]
    broker.close()


def bodies_of(deliveries: Any) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]


def test_sessions_that_an_administrator_ends_are_made_anew(pg_schema: Schema):
    """A publish that was under way is unknown, and published again under its identity."""
    with opened(pg_schema, ONCE) as broker:
        sub = lane(broker, ONCE)
        publish(broker, ONCE, "a")
        held = claim(sub)

        def is_published(body: str) -> bool:
            outcomes = kinds(broker.publish([message(ONCE, body, id=body)]))
            return outcomes in (["Published"], ["RepeatDropped"])

        with pg_schema.connect(autocommit=True) as admin:
            for round in range(3):
                ended = admin.execute(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity "
                    "where application_name = 'duly' and datname = current_database()"
                ).fetchall()
                assert ended[0][0] >= 1
                eventually(partial(is_published, f"b{round}"), "it is published")
        assert list(sub.settle([Done(held[0].receipt)])) == [], "nobody took it for dead"
        assert drain(sub) == ["b0", "b1", "b2"]


# --- a worker that dies


HOLDS = """
import sys
from duly import Topic
from duly.broker import SubscribeOptions
from duly.brokers.postgres import PostgresBroker
from duly.guarantees import Guarantee

url, schema, subscription = sys.argv[1:]
broker = PostgresBroker(url, schema=schema)
topic = Topic("t", str, guarantee="at-least-once")
broker.declare([topic])
options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, lease_s=3600)
lane = broker.subscribe([topic], subscription, options)
print([d.message.body.decode() for d in lane.claim(10, 1 << 20, 10)], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def worker(schema: Schema, subscription: str) -> Iterator[subprocess.Popen[str]]:
    """A process that claims "a" and "b", for an hour."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, schema.url, schema.duly, subscription],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "['a', 'b']\n"
            yield process
        finally:
            process.kill()


def test_a_killed_worker_is_known_by_its_session(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        publish(broker, T, "a", "b")
        with worker(pg_schema, "sub") as process:
            sub = lane(broker, T)
            assert list(claim(sub, wait_s=0.6)) == [], "it lives"
            assert [holder.alive for holder in broker.holders()] == [True]
            os.kill(process.pid, signal.SIGKILL)
            process.wait(20)
            [delivery] = claim(sub, wait_s=10)
            assert (bodies_of([delivery]), delivery.alone) == (["a"], True)
            assert delivery.repeated


def test_the_dead_of_two_subscriptions_are_known_side_by_side(pg_schema: Schema):
    """Lanes of one process look in turn, each for those that hold its own claims."""
    names = ["one", "two"]
    with opened(pg_schema, T) as broker, contextlib.ExitStack() as stack:
        publish(broker, T, "a", "b")
        processes = [stack.enter_context(worker(pg_schema, name)) for name in names]
        lanes = {name: lane(broker, T, name=name) for name in names}
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        got: dict[str, list[str]] = {}

        def look() -> bool:
            for name, sub in lanes.items():
                if name not in got and (deliveries := claim(sub, wait_s=0.05)):
                    got[name] = bodies_of(deliveries)
            return len(got) == len(names)

        eventually(look, "both are given out again", timeout_s=10)
        assert got == {"one": ["a"], "two": ["a"]}


def test_a_worker_that_stands_still_keeps_its_claims_for_its_lease(pg_schema: Schema):
    with opened(pg_schema, T) as broker, opened(pg_schema, T) as other:
        publish(broker, T, "a")
        silent = lane(broker, T, lease_s=1.5)
        [held] = claim(silent)
        sub = lane(other, T)
        assert list(claim(sub, wait_s=0.5)) == []
        [again] = claim(sub, wait_s=10)
        assert again.message.id == held.message.id
        assert list(silent.settle([Done(held.receipt)])) == [held.receipt]


# --- a server that dies


def test_a_server_that_is_killed_loses_nothing(pg_server: PostgresServer):
    """Publishers and a worker go on over three deaths of the server."""
    with opened(Schema(pg_server.url, "public"), ONCE) as broker:
        crowd = Crowd(broker)
        for _ in range(3):
            crowd.some_more()
            pg_server.kill()
            pg_server.start()
        crowd.some_more()
        crowd.end()
    crowd.judge()


def test_claims_survive_the_server(pg_server: PostgresServer):
    """The worker that holds one opens its session anew before others take it for dead."""
    schema = Schema(pg_server.url, "public")
    with opened(schema, T) as broker, opened(schema, T) as other:
        publish(broker, T, "a")
        sub, waiting = lane(broker, T), lane(other, T)
        [held] = claim(sub)
        pg_server.kill()
        with pytest.raises(BrokerUnavailable):
            claim(waiting)
        pg_server.start()
        assert list(waiting.claim(1, 1, 0.0)) == []
        assert list(sub.settle([Done(held.receipt)])) == []


# --- another server


def test_a_promoted_standby_goes_on_where_the_primary_was(tmp_path: Path):
    settings = ["wal_level=replica", "max_wal_senders=4"]
    with PostgresServer(durable=False, settings=settings) as primary:
        schema = Schema(primary.url, "public")
        with opened(schema, ONCE) as broker, schema.connect() as lost:
            publish(broker, ONCE, "handled", id="handled")
            sub = lane(broker, ONCE)
            assert drain(sub) == ["handled"]
            publish(broker, ONCE, "held", id="held")
            [held] = claim(sub)
            publish_in(lost, schema, ONCE, "open at the end")
            publish(broker, ONCE, "waits", id="waits")
            with primary.standby() as standby:
                primary.kill()
                standby.promote()
                there = Schema(standby.url, "public")
                with opened(there, ONCE) as after:
                    publish(after, ONCE, "new", id="new")
                    again = kinds(after.publish([message(ONCE, "handled", id="handled")]))
                    assert again == ["RepeatDropped"]
                    successor = lane(after, ONCE)
                    got = drain(successor)
                    while len(got) < 3:
                        got += take(successor, wait_s=10)
                    assert sorted(got) == ["held", "new", "waits"]
                    assert list(successor.settle([Done(held.receipt)])) == [held.receipt]
            with pytest.raises(psycopg.OperationalError):
                lost.commit()


def test_a_standby_is_no_broker(tmp_path: Path):
    with PostgresServer(durable=False, settings=["max_wal_senders=4"]) as primary:
        with opened(Schema(primary.url, "public"), T):
            pass
        with primary.standby() as standby, pytest.raises(BrokerUnavailable, match="standby"):
            PostgresBroker(standby.url)


def test_a_log_restored_elsewhere_is_refused_until_somebody_adopts_it():
    """There transaction ids begin anew: what is published would never be seen."""
    with (
        PostgresServer(durable=False) as old,
        PostgresServer(durable=False) as new,
    ):
        schema = Schema(old.url, "log")
        with opened(schema, ONCE) as broker, schema.create().connect(autocommit=True) as burning:
            for _ in range(2_000):
                burning.execute("select pg_current_xact_id()")
            publish(broker, ONCE, "settled", id="settled")
            sub = lane(broker, ONCE)
            assert drain(sub) == ["settled"]
            publish(broker, ONCE, "positioned")
            assert len(claim(sub)) == 1
            sub.close()
            publish(broker, ONCE, "arrived")
        old.copy_to(new)
        there = Schema(new.url, "log")
        with pytest.raises(BrokerUnusable, match="duly adopt"):
            PostgresBroker(there.url, schema=there.duly)
        mark = "&" if "?" in there.url else "?"
        assert cli.run(["adopt", f"{there.url}{mark}schema={there.duly}"]) == 0
        with opened(there, ONCE) as broker:
            publish(broker, ONCE, "new")
            assert sorted(drain(lane(broker, ONCE))) == ["arrived", "new", "positioned"]
            again = kinds(broker.publish([message(ONCE, "settled", id="settled")]))
            assert again == ["RepeatDropped"]


def test_only_a_log_in_postgres_is_adopted(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["adopt", "memory://"]) == 2
    assert "only a log in PostgreSQL" in capsys.readouterr().err
